"""Numerical differences between the tensors of two checkpoints."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.manifest import Manifest
from checkpoint.reader import whole_tensors


def value_differences(
    first: tuple[Path, Manifest],
    second: tuple[Path, Manifest],
    keys: Sequence[str],
    progress: Callable[[int], object],
) -> dict[str, float]:
    """Largest change of an element of each tensor that differs, relative to its largest element.

    Args:
        first: A checkpoint.
        second: Another, with tensors of the same shapes.
        keys: Keys of the tensors to compare.
        progress: Callback with the number of bytes compared since the last call.
    """
    changes = {}
    pairs = zip(whole_tensors(*first, keys), whole_tensors(*second, keys), strict=True)
    for (key, one), (_, two) in pairs:
        if not torch.equal(_bits(one), _bits(two)):
            changes[key] = _change(one.double(), two.double())
        progress(one.nbytes + two.nbytes)
    return changes


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor; unlike NaN, a byte always equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _change(one: Tensor, two: Tensor) -> float:
    largest = float(one.abs().max())
    return float((one - two).abs().max()) / largest if largest else float("inf")
