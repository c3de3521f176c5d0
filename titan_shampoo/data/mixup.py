"""Mixup (Zhang et al. 2018) between neighbours of the sample sequence.

Samples ``2k`` and ``2k + 1`` of the endless sequence are mixed by one weight keyed by (seed, k).
Both are in the same rank's batch if its size is even. Any number of ranks thus makes the same
batches, and no image is decoded twice.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["MixedLabels", "mix_pairs", "pair_weights", "swapped"]


class MixedLabels(NamedTuple):
    """Classes of a mixed batch: ``weight`` times the own class, the rest times the partner's."""

    labels: Tensor
    """int64 ``(n,)``; the two samples of a pair are adjacent."""
    weight: Tensor
    """``(n,)``, from 1/2 to 1."""


def pair_weights(seed: int, position: int, num_samples: int, alpha: float) -> Tensor:
    """Weight of the own class for ``num_samples`` samples from ``position`` on, ``(num_samples,)``.

    Args:
        seed: Seed of the run.
        position: Position of the first sample, even.
        num_samples: Number of samples, even.
        alpha: Weights are drawn from Beta(alpha, alpha); the larger part is the own weight.
    """
    pairs = range(position // 2, (position + num_samples) // 2)
    drawn = [_beta(seed, pair, alpha) for pair in pairs]
    weights = torch.tensor(drawn, dtype=torch.float32)
    return torch.maximum(weights, 1 - weights).repeat_interleave(2)


def mix_pairs(inputs: Tensor, weights: Tensor) -> Tensor:
    """``weights * inputs + (1 - weights) * partners``.

    Args:
        inputs: ``(n, ...)`` with ``n`` even.
        weights: ``(n,)``.
    """
    own = weights.view(-1, *[1] * (inputs.ndim - 1))
    return own * inputs + (1 - own) * swapped(inputs)


def swapped(rows: Tensor) -> Tensor:
    """``rows``, ``(n, ...)``, with the two rows of each pair exchanged."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _beta(seed: int, pair: int, alpha: float) -> float:
    # Four words: the keys of order and augmentation have two and three.
    key = np.random.SeedSequence((seed, pair, 2, 0))
    return float(np.random.RandomState(np.random.MT19937(key)).beta(alpha, alpha))
