"""Every layout of a real model, taps included, gives the iterates of one process to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from tests.support.checkpoint_runs import LayerRun, run_in
from tests.support.layer_layouts import (
    LAYOUTS,
    METHODS,
    MICROBATCHES,
    STEPS,
    Values,
    batch,
    make,
    mean_loss,
    stages,
    train,
    values,
)
from tests.support.layer_models import Perceptron, made
from tests.support.ranks import run_on_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "clipped": {},
    "unscaled": {"scaling": None, "damping": 0.3, "lr": 1e-3},
    "relative": {"damping_mode": "relative", "damping": 0.3, "scaling": "norm"},
}


def alone(method: str, kind: Any, options: dict[str, Any]) -> Values:
    model = made(kind)
    train(model, make(method, model, **options), kind, 0, 1)
    return values(model)


def train_layout(layout: str) -> dict[tuple[str, str], Values]:
    """What every method and variant makes of the model in this layout."""
    _, place, kind = LAYOUTS[layout]
    found = {}
    for method in METHODS:
        for variant, options in VARIANTS.items():
            model, reader, num_readers = place(made(kind))
            optimizer = make(method, model, **options)
            train(model, optimizer, kind, reader, num_readers)
            found[method, variant] = values(model)
    return found


QUICK = ("fsdp 3", "hsdp 2x2", "fsdp x tp")  # of each kind the one with more to it


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS],
)
def test_iterates_equal_those_of_one_process(layout: str) -> None:
    size, _, kind = LAYOUTS[layout]
    results = run_on_ranks(size, train_layout, layout)
    for method in METHODS:
        for variant, options in VARIANTS.items():
            expected = alone(method, kind, options)
            for result in results:
                for name, tensor in expected.items():
                    mine = result[method, variant][name]
                    error = (mine - tensor).norm() / tensor.norm()
                    assert error <= 1e-12, f"{method}, {variant}, {name}: {error:.1e}"


def train_stage(method: str, options: dict[str, Any]) -> Values:
    """One of two stages, 1F1B; all weights by their names in the whole."""
    stage = dist.get_rank()
    lone = [dist.new_group([rank]) for rank in range(2)][stage]
    module = stages()[stage]
    pipeline = PipelineStage(module, stage, 2, torch.device("cpu"))
    schedule = Schedule1F1B(pipeline, MICROBATCHES * 2, loss_fn=mean_loss, scale_grads=False)
    groups = {"process_group": lone, "pipeline_group": dist.group.WORLD}
    optimizer = make(method, module, **options, **groups)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch(Perceptron, step)
        if stage == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets, losses=[])
        optimizer.step()
    return {f"{stage}.{name}": value for name, value in values(module).items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_stages_of_a_pipeline_are_scaled_by_one_number(method: str, variant: str) -> None:
    model = nn.Sequential(*stages())
    optimizer = make(method, model, **VARIANTS[variant])
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch(Perceptron, step)
        mean_loss(model(inputs), targets).backward()
        optimizer.step()
    results = run_on_ranks(2, train_stage, method, VARIANTS[variant])
    for name, tensor in values(model).items():
        mine = (results[0] | results[1])[name]
        error = (mine - tensor).norm() / tensor.norm()
        assert error <= 1e-12, f"{name}: {error:.1e}"


def weights_without_tokens_here(folder: Path, method: str, layout: str) -> Values:
    """Weights after five steps of a batch of which the first rank reads all."""
    with run_in(folder, layout, method, dtype=torch.float64, load_only=True) as run:
        assert isinstance(run, LayerRun)
        if layout != "single":
            run.mine = slice(None) if dist.get_rank() == 0 else slice(0, 0)
        for _ in range(5):
            run.step()
        return values(run.model)


@pytest.mark.parametrize("method", ["Eva", "EvaF", "EvaS", "FOOF", "KFAC"])
def test_a_rank_without_tokens_takes_nothing_from_what_the_others_measure(
    tmp_path: Path, method: str
) -> None:
    (expected,) = run_on_ranks(1, weights_without_tokens_here, tmp_path, method, "single")
    for found in run_on_ranks(2, weights_without_tokens_here, tmp_path, method, "fsdp2"):
        for name, weight in expected.items():
            error = (found[name] - weight).norm() / weight.norm()
            assert error <= 1e-12, f"{name}: {error:.1e}"
