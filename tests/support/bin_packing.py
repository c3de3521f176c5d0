"""How level an assignment of indivisible work can be at all."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog

LARGEST_PATTERN = 7
"""Pieces of which a rank could take more than these are left out: the bound stays one."""


def is_impossible(work: Sequence[float], num_ranks: int, capacity: float) -> bool:
    """Whether no assignment keeps every rank within ``capacity``, as far as can be proved.

    Neither the mean nor the largest piece alone says: three ranks cannot share four equal pieces
    better than 2, 1, 1. Prices of pieces such that all that fits on one rank costs at most 1 prove
    it, if all pieces together cost more than there are ranks (Gilmore & Gomory 1961).
    """
    if max(work) > capacity:
        return True
    counts = Counter(piece for piece in work if piece * (LARGEST_PATTERN + 1) > capacity)
    sizes = sorted(counts, reverse=True)
    patterns = [np.eye(len(sizes))[i] * (capacity // size) for i, size in enumerate(sizes)]
    needed = [-counts[size] for size in sizes]
    while True:
        prices = linprog(needed, np.stack(patterns), np.ones(len(patterns))).x
        cost, pattern = _dearest(sizes, prices.tolist(), capacity)
        if cost <= 1 + 1e-9:
            return bool(-np.dot(needed, prices) / cost > num_ranks * (1 + 1e-6))
        patterns.append(np.array(pattern))


def _dearest(
    sizes: Sequence[float], prices: Sequence[float], room: float
) -> tuple[float, list[int]]:
    """Cost of the dearest set of pieces that fits into ``room``, and how many it has of each."""
    if not sizes:
        return 0.0, []
    best: tuple[float, list[int]] = (-1.0, [])
    for count in range(int(room // sizes[0]) + 1):
        rest, pattern = _dearest(sizes[1:], prices[1:], room - count * sizes[0])
        best = max(best, (rest + count * prices[0], [count, *pattern]))
    return best
