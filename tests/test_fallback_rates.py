"""The fallback's learning rate follows any schedule of ``lr``, whatever ``lr`` the optimizer had.

Measured by SGD as the fallback, which moves a vector by its rate times the gradient.
"""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo

LAYER_METHODS: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "EvaS": EvaS, "FOOF": FOOF, "KFAC": KFAC}
OWN = 0.01
STEPS = 24
PEAK = 0.5

Scheduler = Callable[[torch.optim.Optimizer], Any]

# 18 of torch's; those of the second half do not begin at, or never reach, the constructor's rate.
FROM_ITS_PEAK: dict[str, Scheduler] = {
    "LambdaLR, warm-up from 0": lambda o: schedulers.LambdaLR(o, lambda t: min(1.0, t / 8)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [5, 10]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.25, 6),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.25, total_iters=8),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 6),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=2),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=6), schedulers.ExponentialLR(o, 0.8)], [6]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
}
TO_A_PEAK_OF_ITS_OWN: dict[str, Scheduler] = {
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, PEAK, total_steps=STEPS + 1),
    "OneCycleLR, three phases": lambda o: schedulers.OneCycleLR(
        o, PEAK, total_steps=STEPS + 1, three_phase=True, anneal_strategy="linear"
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, PEAK / 50, PEAK, step_size_up=6),
    "CyclicLR, triangular2": lambda o: schedulers.CyclicLR(
        o, PEAK / 50, PEAK, step_size_up=4, mode="triangular2"
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, PEAK, anneal_epochs=10),
}
SCHEDULERS = FROM_ITS_PEAK | TO_A_PEAK_OF_ITS_OWN

every_method = pytest.mark.parametrize("method", LAYER_METHODS)


def made(method: str, lr: Any, **options: Any) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer of one vector, which is the fallback's."""
    vector = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    own = {} if method == "EvaS" else {"model": nn.Identity()}
    given: dict[str, Any] = {
        "fallback": "sgd", "momentum": 0.0, "weight_decay": 0.0, "fallback_lr": OWN
    }  # fmt: skip
    groups = [("norm.bias", vector)]
    return LAYER_METHODS[method](groups, lr=lr, **own, **given | options), vector


def rates(optimizer: torch.optim.Optimizer, vector: nn.Parameter, scheduler: Any) -> list[Any]:
    """The rates of the layers and of the fallback in each step."""
    found = []
    for _ in range(STEPS):
        before = vector.detach().clone()
        vector.grad = torch.ones_like(vector)
        optimizer.step()
        lr = float(optimizer.param_groups[0]["lr"])
        found.append((lr, float((before - vector.detach())[0])))
        arguments = [1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []
        scheduler.step(*arguments)
    return found


@every_method
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rate_is_finite_and_never_above_its_own(method: str, name: str) -> None:
    for start in (0.0, 1e-12, 0.05, 0.5, 100.0):
        for lr in (start, torch.tensor(start, dtype=torch.float64)):
            optimizer, vector = made(method, lr)
            found = rates(optimizer, vector, SCHEDULERS[name](optimizer))
            assert all(math.isfinite(own) and own <= OWN * (1 + 1e-12) for _, own in found), start
            assert any(own > 0 for _, own in found) == (start > 0 or name in TO_A_PEAK_OF_ITS_OWN)
            assert [own > 0 for _, own in found] == [lr_now > 0 for lr_now, _ in found]


@every_method
@pytest.mark.parametrize("name", FROM_ITS_PEAK)
def test_the_rate_is_the_same_share_of_its_peak(method: str, name: str) -> None:
    """As it was before: of all schedules whose largest rate is the constructor's."""
    optimizer, vector = made(method, 0.05)
    for lr, own in rates(optimizer, vector, FROM_ITS_PEAK[name](optimizer)):
        assert own == pytest.approx(OWN * lr / 0.05, rel=1e-9, abs=1e-15)


@every_method
@pytest.mark.parametrize("start", [0.0, 1e-4, 0.1, 100.0])
def test_one_cycle_says_its_peak(method: str, start: float) -> None:
    optimizer, vector = made(method, start)
    scheduler = SCHEDULERS["OneCycleLR"](optimizer)
    for lr, own in rates(optimizer, vector, scheduler):
        assert own == pytest.approx(OWN * lr / PEAK, rel=1e-9)


@every_method
def test_a_rate_of_zero_that_is_set_later_moves_the_fallback(method: str) -> None:
    optimizer, vector = made(method, 0.0)
    for lr, wanted in ((0.0, 0.0), (0.2, OWN), (0.1, OWN / 2), (0.4, OWN), (0.1, OWN / 4)):
        optimizer.param_groups[0]["lr"] = lr
        before = vector.detach().clone()
        vector.grad = torch.ones_like(vector)
        optimizer.step()
        assert float((before - vector.detach())[0]) == pytest.approx(wanted, rel=1e-12)


@every_method
def test_the_peak_can_be_given(method: str) -> None:
    """For warm-up by hand, and for schedules that never reach the constructor's rate."""
    optimizer, vector = made(method, 1.0)
    optimizer.param_groups[0]["peak_lr"] = 0.2
    optimizer.param_groups[0]["lr"] = 0.1
    vector.grad = torch.ones_like(vector)
    optimizer.step()
    assert float(-vector.detach()[0]) == pytest.approx(OWN / 2, rel=1e-12)


@every_method
def test_a_schedule_far_below_the_first_rate_is_reported_once(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        optimizer, vector = made(method, 100.0)
        rates(optimizer, vector, SCHEDULERS["CyclicLR"](optimizer))
    told = [r.message for r in caplog.records if "peak_lr" in r.message]
    assert len(told) == 1
    assert "param_groups[0]['peak_lr'] = 0.5" in told[0]
    caplog.clear()
    for name in FROM_ITS_PEAK:
        optimizer, vector = made(method, 0.05)
        rates(optimizer, vector, FROM_ITS_PEAK[name](optimizer))
    assert not [r for r in caplog.records if "peak_lr" in r.message]


@every_method
def test_groups_have_peaks_of_their_own_and_saved_state_has_them(method: str) -> None:
    optimizer, vector = made(method, 1e-6)
    other = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [("other.bias", other)], "lr": 0.2})
    for group, lr in zip(optimizer.param_groups, (0.1, 0.05), strict=True):
        group["lr"] = lr
    vector.grad, other.grad = torch.ones_like(vector), torch.ones_like(other)
    optimizer.step()
    assert float(-vector.detach()[0]) == pytest.approx(OWN, rel=1e-12)
    assert float(-other.detach()[0]) == pytest.approx(OWN / 4, rel=1e-12)
    twin, _ = made(method, 1e-6)
    twin.add_param_group({"params": [("other.bias", nn.Parameter(torch.zeros(3).double()))]})
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["peak_lr"] for group in twin.param_groups] == [0.1, 0.2]


DECAYING: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo, "EvaS": EvaS}


@pytest.mark.parametrize("method", DECAYING)
@pytest.mark.parametrize("kind", ["corrected", "independent"])
@pytest.mark.parametrize("what", ["matrix", "vector"])
def test_decay_by_the_peak_is_that_of_the_schedule(method: str, kind: str, what: str) -> None:
    """With gradients of zero."""
    for start in (0.0, 1e-3, 10.0):
        shrink_by_schedule(method, kind, what, start)


def shrink_by_schedule(method: str, kind: str, what: str, start: float) -> None:
    decay, peak = 0.1, 0.5
    param = nn.Parameter(torch.ones(3, 2 if what == "matrix" else 1, dtype=torch.float64))
    options: dict[str, Any] = {"fallback_lr": None} if method == "EvaS" else {}
    optimizer = DECAYING[method](
        [("layer", param)], lr=start, weight_decay=decay, weight_decay_type=kind, momentum=0.0,
        **options,
    )  # fmt: skip
    scheduler = schedulers.OneCycleLR(optimizer, peak, total_steps=10, cycle_momentum=False)
    for step in range(6):
        lr, before = optimizer.param_groups[0]["lr"], param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
        share = lr / peak
        shrinks = decay * share * (lr if kind == "corrected" else 1)
        if (method, what, step) == ("SOAP", "matrix", 0):
            continue  # rests in its first step
        wanted = before * (1 - shrinks)
        torch.testing.assert_close(param.detach(), wanted, rtol=1e-12, atol=1e-12)
