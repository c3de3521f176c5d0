"""What is no matrix is stepped by Adam with the same kind of weight decay as matrices."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.internals import read_late
from titan_shampoo import Eva, Shampoo

PEAK, DECAY = 0.1, 0.2
KINDS = ("decoupled", "l2", "corrected", "independent")


def expected(kind: str, rates: list[float], peak: float) -> torch.Tensor:
    """By torch's Adam, whose decay is coupled, or AdamW with the decay that is asked for."""
    vector = nn.Parameter(torch.arange(1.0, 7.0))
    adam = torch.optim.Adam if kind == "l2" else torch.optim.AdamW
    optimizer = adam([vector], lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=DECAY)
    for step, lr in enumerate(rates):
        group = optimizer.param_groups[0]
        group["lr"] = lr
        group["weight_decay"] = DECAY * {"corrected": lr / peak, "independent": 1 / peak}.get(
            kind, 1
        )
        vector.grad = torch.full((6,), float(step)) - vector.detach()
        optimizer.step()
    return vector.detach()


def stepped(method: type[Any], shares: list[float], late: bool, **options: Any) -> torch.Tensor:
    vector = nn.Parameter(torch.arange(1.0, 7.0))
    optimizer = method([("norm.bias", vector)], lr=PEAK, betas=(0.9, 0.99), weight_decay=DECAY,
                       **options)  # fmt: skip
    read_late(optimizer, late)
    for step, share in enumerate(shares):
        optimizer.param_groups[0]["lr"] = PEAK * share
        vector.grad = torch.full((6,), float(step)) - vector.detach()
        optimizer.step()
    return vector.detach()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decay_is_of_the_kind_that_is_asked_for(kind: str, late: bool) -> None:
    shares = [1.0, 0.5, 0.25, 1.0]
    wanted = expected(kind, [PEAK * share for share in shares], PEAK)
    found = stepped(Shampoo, shares, late, grafting_beta2=0.99, weight_decay_type=kind)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_its_own_has_a_peak_of_its_own(kind: str) -> None:
    shares, own = [1.0, 0.5, 0.25, 1.0], 0.01
    wanted = expected(kind, [own * share for share in shares], own)
    found = stepped(
        Eva, shares, False, model=nn.Identity(), fallback_lr=own, weight_decay_type=kind
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_a_rate_of_zero_nothing_moves(kind: str, fallback: str) -> None:
    options: dict[str, Any] = {"fallback_lr": 0.0, "fallback": fallback, "weight_decay_type": kind}
    found = stepped(Eva, [1.0, 0.5], False, model=nn.Identity(), **options)
    assert torch.equal(found, torch.arange(1.0, 7.0))


@pytest.mark.parametrize("late", [False, True])
def test_a_gradient_may_have_another_dtype(late: bool) -> None:
    """Else the step would end after the matrices have moved."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        vector = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        vector.grad_dtype = None
        optimizer = Shampoo([("norm.bias", vector)], lr=0.5)
        read_late(optimizer, late)
        vector.grad = torch.ones(4, dtype=dtype)
        optimizer.step()
        found.append(vector.detach())
    assert torch.equal(*found)
    assert (found[0] < 1).all()
