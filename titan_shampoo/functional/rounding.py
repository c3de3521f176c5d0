"""Averages that are stored in fewer bits than they are computed in.

An average that takes 1/1000 of each new value moves by less than the spacing of bfloat16 numbers:
rounded to the nearest it would stand still. So the threshold between rounding down and up runs
through [0, 1) from step to step, a Weyl sequence for each element: what is stored is right on
average over time, and as no random numbers are drawn, the same on every mesh.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B1
"""2^32 divided by the golden ratio: its multiples fill [0, 2^32) most evenly."""
LOW_BITS = 0xFFFF
"""Bits of a float32 that bfloat16 has not."""


def average_(stored: Tensor, new: Tensor, rate: float | Tensor, step: Tensor) -> Tensor:
    """``stored <- stored + rate (new - stored)``; returns it in the precision of ``new``.

    Args:
        stored: ``(n, ...)``, of any dtype.
        new: ``(n, ...)``, float32 or float64.
        rate: Weight of the new value, in [0, 1].
        step: Step of each of the ``n``, int64; moves the threshold of rounding.
    """
    if stored.dtype == new.dtype:
        return stored.lerp_(new, rate)
    wide = torch.promote_types(stored.dtype, new.dtype)
    rate = rate.to(wide) if isinstance(rate, Tensor) else rate
    average = torch.lerp(stored.to(wide), new.to(wide), rate)
    return store_(stored, average, step).to(new.dtype)


def store_(stored: Tensor, average: Tensor, step: Tensor) -> Tensor:
    """``stored <- average``, by turns rounded down and up to bfloat16; returns the average.

    Args:
        stored: ``(n, ...)``, of any dtype; all but bfloat16 can hold slow averages as they are.
        average: ``(n, ...)``, float32 or float64.
        step: As for :func:`average_`.
    """
    stored.copy_(dithered(average, step) if stored.dtype == torch.bfloat16 else average)
    return average


def dithered(values: Tensor, step: Tensor) -> Tensor:
    """``values`` as bfloat16 numbers, rounded down or up by turns; ``(n, ...)`` float32.

    Args:
        values: ``(n, ...)``, finite.
        step: Of each of the ``n``, int64.
    """
    values = values.float()
    count = values[0].numel()
    places = torch.arange(count, device=values.device).mul_(GOLDEN).bitwise_right_shift_(7)
    turns = (step * GOLDEN).bitwise_right_shift(16)
    thresholds = (places + turns.unsqueeze(-1)).bitwise_and_(LOW_BITS).to(torch.int32)
    bits = values.view(torch.int32) + thresholds.view(values.shape)
    return bits.bitwise_and_(~LOW_BITS).view(torch.float32)
