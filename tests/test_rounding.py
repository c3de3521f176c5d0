"""Averages in bfloat16 keep moving, are right on average, and do not drift."""

import pytest
import torch

from titan_shampoo.functional.rounding import average_, dithered

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
