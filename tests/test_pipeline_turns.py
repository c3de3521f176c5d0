"""The stages of a pipeline refresh as one process would that holds the whole model."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_on_ranks
from tests.titan_runs import text_run, trainer_of, write_text
from titan_shampoo import SOAP, KLShampoo, Shampoo

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (20, 6),
    **{f"layers.{n}.w1": (12, 8) for n in range(12)},
    **{f"layers.{n}.w2": (5, 12) for n in range(12)},
    "norm": (8,),
    "output.weight": (20, 8),
}
STEPS = 12
METHODS: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo}


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def train(method: str, names: list[str], others: dict[str, Any]) -> dict[str, Tensor]:
    weights = tensors(0)
    params = {name: torch.nn.Parameter(weights[name]) for name in names}
    optimizer = METHODS[method](
        params.items(), lr=0.1, block_size=4, precondition_frequency=5, start_step=2, **others
    )
    for step in range(1, STEPS + 1):
        grads = tensors(step)
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


def train_stage(method: str, knows_the_rest: bool) -> dict[str, Tensor]:
    """Half of the layers on each of two ranks; the second stage lists its own in another order."""
    alone, _ = dist.new_subgroups(group_size=1)
    names = [name for name in SHAPES if stage_of(name) == dist.get_rank()]
    whole = [(name, torch.empty(shape, device="meta")) for name, shape in SHAPES.items()]
    others: dict[str, Any] = {"process_group": alone}
    if knows_the_rest:
        others["all_params"] = whole
    return train(method, names[:: -1 if dist.get_rank() else 1], others)


def stage_of(name: str) -> int:
    if name.startswith("layers."):
        return int(name.split(".")[1]) // 6
    return 0 if name == "embed.weight" else 1


@pytest.mark.parametrize("method", METHODS)
def test_two_stages_give_the_iterates_of_one_process(method: str) -> None:
    expected = train(method, list(SHAPES), {})
    first, second = run_on_ranks(2, train_stage, method, True)
    assert not first.keys() & second.keys()
    for name, tensor in (first | second).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


def test_a_stage_that_does_not_know_the_rest_differs() -> None:
    expected = train("Shampoo", list(SHAPES), {})
    first, second = run_on_ranks(2, train_stage, "Shampoo", False)
    assert any(not torch.allclose(t, expected[name]) for name, t in (first | second).items())


def test_a_parameter_that_is_not_the_models_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"w: is not in all_params, which has 1 parameters"):
        Shampoo([("w", weight)], all_params=[("v", weight)])


def test_parameters_of_a_model_need_names() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="tensor without a name"):
        Shampoo([("w", weight)], all_params=[weight])


def test_a_copy_of_a_stage_keeps_its_turns() -> None:
    weights = tensors(0)
    names = [name for name in SHAPES if stage_of(name) == 1]
    whole = [(name, torch.empty(shape, device="meta")) for name, shape in SHAPES.items()]
    params = [(name, torch.nn.Parameter(weights[name])) for name in names]
    optimizer = Shampoo(params, block_size=4, all_params=whole)
    again = pickle.loads(pickle.dumps(optimizer))
    assert optimizer._engine is not None
    expected = [block.slot for block in optimizer._engine.plan.blocks]
    assert [block.slot for block in again._engine.plan.blocks] == expected


def turns_of(args: list[str]) -> dict[tuple[str, int], int]:
    """Refresh turn of each block of this rank's stages."""
    found: dict[tuple[str, int], int] = {}
    with trainer_of(args) as trainer:
        for optimizer in trainer.optimizers.optimizers:
            if optimizer._engine is not None:  # embedding and head have stages of their own
                names = [member.name for member in optimizer._engine.members]
                found |= {(names[b.param], b.index): b.slot for b in optimizer._engine.plan.blocks}
    return found


def test_stages_of_a_run_take_the_turns_of_one_rank(tmp_path: Path) -> None:
    write_text(tmp_path)
    settings: dict[str, Any] = {"optimizer__name": "Shampoo", "optimizer__shampoo__block_size": 64}
    stages = {
        "parallelism__pipeline_parallel_degree": 2,
        "parallelism__pipeline_parallel_microbatch_size": 2,
        "parallelism__pipeline_parallel_schedule": "Interleaved1F1B",
    }
    (expected,) = run_on_ranks(1, turns_of, text_run(tmp_path, "one", **settings))
    first, second = run_on_ranks(2, turns_of, text_run(tmp_path, "two", **settings, **stages))
    assert first
    assert second
    assert first | second == expected
