"""Averages in bfloat16 keep moving, are right on average, and do not drift."""

import pytest
import torch

from titan_shampoo.functional.grafting import accumulate_squares_
from titan_shampoo.functional.rounding import average_, dithered
from titan_shampoo.functional.rule import Clock

SIZE = (4, 50)


def steps(number: int) -> torch.Tensor:
    return torch.full((4,), number, dtype=torch.int64)


def values(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rounded_values_are_bfloat16_neighbours(scale: float) -> None:
    exact = values(scale)
    rounded = dithered(exact, steps(3))
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert ((rounded - exact).abs() <= exact.abs() * 2**-7).all()


def test_what_bfloat16_holds_stays() -> None:
    exact = values().bfloat16().float()
    assert torch.equal(dithered(exact, steps(5)), exact)


def test_the_mean_over_steps_is_right() -> None:
    exact = values()
    mean = torch.stack([dithered(exact, steps(t)).double() for t in range(1, 401)]).mean(0)
    assert ((mean - exact).abs() <= exact.abs() * 2**-7 / 50).all()


def test_a_slow_average_reaches_its_limit() -> None:
    """Rounded to the nearest, an average with decay 0.999 stands still a third of the way."""
    target, stored = torch.ones(SIZE), torch.zeros(SIZE, dtype=torch.bfloat16)
    nearest = torch.zeros(SIZE, dtype=torch.bfloat16)
    for step in range(1, 5001):
        average_(stored, target, 0.001, steps(step))
        nearest.lerp_(target.bfloat16(), 0.001)
    assert nearest.float().max() < 0.6
    assert (stored.float() - 1 + 0.999**5000).abs().max() < 0.02


def test_in_full_precision_the_average_is_exact() -> None:
    stored, new = values().clone(), torch.ones(SIZE)
    expected = stored.lerp(new, 0.1)
    assert torch.equal(average_(stored, new, 0.1, steps(1)), expected)
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("method", [None, "adagrad"])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_averages_kept_in_another_full_precision_lose_none_of_it(
    kept: torch.dtype, method: str | None
) -> None:
    """Float64 state beside float32 arithmetic, and the other way round, is good to float32."""
    other = {torch.float32: torch.float64, torch.float64: torch.float32}[kept]
    stored, expected = torch.zeros(SIZE, dtype=kept), torch.zeros(SIZE, dtype=torch.float64)
    for step in range(1, 21):
        new = (values() + step).to(other)
        if method is None:
            found = average_(stored, new, 0.1, steps(step))
            expected.lerp_(new.double(), 0.1)
        else:
            clock = Clock(steps(step), ready=True, starts_at_one=torch.zeros(4, dtype=torch.bool))
            found = accumulate_squares_(stored, new, "adagrad", 1.0, clock)
            expected.addcmul_(new.double(), new.double())
        assert found.dtype == other
    for result in (stored, found):
        assert ((result - expected) / expected).abs().max() < 1e-6
    if kept == torch.float64:
        assert ((stored - expected) / expected).abs().max() < 1e-14
