"""Roots are used from a block's first refresh on, whatever the schedule says, and no host waits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.block_methods import advance, every_method, make, values
from tests.support.block_methods import parameters as all_parameters
from tests.support.copied_state import assert_same
from titan_shampoo.blocks import ready
from titan_shampoo.blocks.ready import Ready
from titan_shampoo.functional import roots, soap


def parameters() -> dict[str, torch.nn.Parameter]:
    return all_parameters(["a", "b"])


@every_method
def test_roots_stay_in_use_where_the_period_becomes_longer(method: str) -> None:
    """The first refresh is at the end of the first period, or said to be in step 2."""
    results = []
    for start_step in (None, 2):
        params = parameters()
        optimizer = make(method, params, start_step=start_step, refresh="together")
        advance(optimizer, params, range(5))
        optimizer.param_groups[0]["precondition_frequency"] = 100
        advance(optimizer, params, range(5, 10))
        results.append(values(params))
    assert_same(*results)


@every_method
def test_a_first_refresh_in_a_skipped_step_does_not_count(method: str) -> None:
    results = []
    for start_step in (3, 100):
        params = parameters()
        options = {"precondition_frequency": 3, "refresh": "together", "momentum": 0.0}
        optimizer = make(method, params, start_step=start_step, **options)
        advance(optimizer, params, range(2))
        for param in params.values():
            param.grad = torch.full_like(param, torch.nan)
        optimizer.step()
        advance(optimizer, params, range(2, 4))
        results.append(values(params))
    assert_same(*results)


def test_loaded_state_says_which_blocks_have_roots() -> None:
    params, fresh = parameters(), parameters()
    optimizer, other = make("Shampoo", params), make("Shampoo", fresh)
    start = {name: value.clone() for name, value in values(params).items()}
    beginning = optimizer.state_dict()
    saved = {
        "state": {n: {k: v.clone() for k, v in s.items()} for n, s in beginning["state"].items()},
        "param_groups": beginning["param_groups"],
    }
    advance(optimizer, params, range(6))
    optimizer.load_state_dict(saved)
    for name, param in params.items():
        param.data.copy_(start[name])
    advance(optimizer, params, range(6))
    advance(other, fresh, range(6))
    assert_same(values(params), values(fresh))


def test_after_the_first_period_a_refresh_asks_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor | bool] = []
    sound = roots.next_basis

    def watched(matrices: Tensor, old: Tensor, known: Tensor | bool, **kwargs: Any) -> Any:
        asked.append(known)
        return sound(matrices, old, known, **kwargs)

    monkeypatch.setattr(soap, "next_basis", watched)
    params = parameters()
    optimizer = make("SOAP", params, refresh="staggered", precondition_frequency=3)
    advance(optimizer, params, range(3))
    assert asked
    assert not any(known is True for known in asked)
    asked.clear()
    advance(optimizer, params, range(3, 9))
    assert asked
    assert all(known is True for known in asked)


def test_the_host_learns_that_a_stack_is_complete_when_the_answer_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Arrival:
        has_come = False

        def query(self) -> bool:
            return self.has_come

    arrival, sent = Arrival(), []

    def send(values: Tensor) -> tuple[Tensor, Arrival]:
        sent.append(values)
        return values.clone(), arrival

    monkeypatch.setattr(ready, "sent_to_host", send)
    known, refreshes = Ready(), torch.tensor([1.0, 2.0])
    assert not known.is_complete(0, refreshes)
    assert not known.is_complete(0, refreshes)
    arrival.has_come = True
    assert known.is_complete(0, refreshes)
    assert known.is_complete(0, refreshes)
    assert len(sent) == 1
    assert not known.is_complete(1, torch.tensor([1.0, 0.0]))
    known.forget()
    arrival.has_come = False
    assert not known.is_complete(0, refreshes)
