"""FOOF and K-FAC give the iterates of one process on every layout, and resume on another."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from tests.support.layer_layouts import (
    LAYOUTS,
    MICROBATCHES,
    STEPS,
    batch,
    mean_loss,
    stages,
    train,
    values,
)
from tests.support.layer_models import Perceptron, made
from tests.support.ranks import run_on_ranks
from titan_shampoo import FOOF, KFAC
from titan_shampoo.layers.optimizer import LayerOptimizer

METHODS: dict[str, Any] = {"FOOF": FOOF, "KFAC": KFAC}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "blocks": {"max_factor_dim": 3, "scaling": None, "lr": 1e-3, "factor_frequency": 2},
}
SEPARATE = ("fsdp over columns", "tp", "fsdp x tp")
"""Layouts that cut the columns of a layer with a bias, which cannot be one of them then."""

Values = dict[str, Tensor]


def make(method: str, model: nn.Module, **options: Any) -> LayerOptimizer:
    defaults: dict[str, Any] = {
        "lr": 0.05,
        "precondition_frequency": 2,
        "statistics_decay": 0.5,
        "fallback": "sgd",
    }
    params = options.pop("params", model.named_parameters())
    return METHODS[method](params, model=model, **defaults | options)


def options_of(layout: str, variant: str) -> dict[str, Any]:
    return VARIANTS[variant] | ({"bias": "separate"} if layout in SEPARATE else {})


def train_layout(layout: str) -> dict[tuple[str, str], Values]:
    _, place, kind = LAYOUTS[layout]
    found = {}
    for method in METHODS:
        for variant in VARIANTS:
            model, reader, num_readers = place(made(kind))
            optimizer = make(method, model, **options_of(layout, variant))
            train(model, optimizer, kind, reader, num_readers)
            found[method, variant] = values(model)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_iterates_equal_those_of_one_process(layout: str) -> None:
    size, _, kind = LAYOUTS[layout]
    results = run_on_ranks(size, train_layout, layout)
    for method in METHODS:
        for variant in VARIANTS:
            model = made(kind)
            optimizer = make(method, model, **options_of(layout, variant))
            train(model, optimizer, kind, 0, 1)
            for result in results:
                for name, tensor in values(model).items():
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
    whole = nn.Sequential(*stages()).named_parameters()
    named = [(f"{stage}.{name}", param) for name, param in module.named_parameters()]
    optimizer = make(method, module, params=named, all_params=whole, **groups, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch(Perceptron, step)
        if stage == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets, losses=[])
        optimizer.step()
    return {f"{stage}.{name}": value for name, value in values(module).items()}


@pytest.mark.parametrize("options", [{}, {"factor_frequency": 2}], ids=["", "sparse"])
@pytest.mark.parametrize("method", METHODS)
def test_stages_of_a_pipeline_step_as_one_process(method: str, options: dict[str, Any]) -> None:
    model = nn.Sequential(*stages())
    optimizer = make(method, model, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch(Perceptron, step)
        mean_loss(model(inputs), targets).backward()
        optimizer.step()
    results = run_on_ranks(2, train_stage, method, options)
    for name, tensor in values(model).items():
        error = ((results[0] | results[1])[name] - tensor).norm() / tensor.norm()
        assert error <= 1e-12, f"{name}: {error:.1e}"


@pytest.mark.parametrize("method", METHODS)
def test_bias_of_a_layer_whose_columns_are_cut_is_refused_by_name(method: str) -> None:
    for message in run_on_ranks(2, refused, method):
        assert message.startswith("thin.weight: its columns are cut")
        assert "bias='separate'" in message


def refused(method: str) -> str:
    model, _, _ = LAYOUTS["tp"][1](made(Perceptron))
    try:
        make(method, model)
    except ValueError as error:
        return str(error)
    return "no error"
