"""Parameter groups that are added on several ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from tests.support.ranks import run_on_ranks
from titan_shampoo import KFAC, Shampoo
from titan_shampoo.library_optimizer import LibraryOptimizer

METHODS = ["Shampoo", "KFAC"]
GROUPS = [["0", "1"], ["2"]]
"""Layers; the one that is added is as much work as all others."""


def model_of() -> torch.nn.Sequential:
    torch.manual_seed(0)
    sizes = [(6, 4), (5, 6), (20, 5)]
    return torch.nn.Sequential(*[torch.nn.Linear(i, o, bias=False) for o, i in sizes]).double()


def made(method: str, model: Any, layers: list[str]) -> LibraryOptimizer:
    params = [(f"{layer}.weight", model[int(layer)].weight) for layer in layers]
    options: dict[str, Any] = {"lr": 0.1, "precondition_frequency": 2}
    return (
        Shampoo(params, **options) if method == "Shampoo" else KFAC(params, model=model, **options)
    )


def advance(optimizer: LibraryOptimizer, model: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        rows = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(rows).square().mean().backward()
        optimizer.step()


def weights(model: Any) -> list[Tensor]:
    return [param.detach() for param in model.parameters()]


def added_late(method: str) -> tuple[str, bool]:
    """The error of a group that comes after some steps, and whether it changed what follows."""
    found = []
    error = ""
    for adds in (True, False):
        model = model_of()
        optimizer = made(method, model, GROUPS[0])
        advance(optimizer, model, range(5))
        if adds:
            try:
                optimizer.add_param_group({"params": [("2.weight", model[2].weight)]})
            except ValueError as caught:
                error = str(caught)
        advance(optimizer, model, range(5, 10))
        found.append(weights(model))
    return error, all(map(torch.equal, *found))


@pytest.mark.parametrize("method", METHODS)
def test_a_group_that_would_move_begun_blocks_is_refused_on_all_ranks(method: str) -> None:
    for error, is_unchanged in run_on_ranks(2, added_late, method):
        assert "its blocks would go to other ranks, without their state; add groups" in error
        assert is_unchanged


def added_at_first(method: str) -> list[Tensor]:
    model = model_of()
    optimizer = made(method, model, GROUPS[0])
    optimizer.add_param_group({"params": [("2.weight", model[2].weight)]})
    advance(optimizer, model, range(5))
    return weights(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_may_be_added_before_the_first_step(method: str) -> None:
    expected = added_at_first(method)
    for found in run_on_ranks(2, added_at_first, method):
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def added_after_an_evaluation() -> list[str]:
    """Which layers KFAC has; the root is evaluated, and FSDP2 leaves it gathered."""
    model = model_of()
    fully_shard(model)
    optimizer = made("KFAC", model, GROUPS[0])
    added = model[2].weight
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.float64))
    optimizer.add_param_group({"params": [("2.weight", added)]})
    assert isinstance(optimizer, KFAC)
    return [name for name, param in model.named_parameters() if optimizer.preconditions(param)]


def test_a_group_may_be_added_after_an_evaluation() -> None:
    for names in run_on_ranks(2, added_after_an_evaluation):
        assert names == ["0.weight", "1.weight", "2.weight"]
