"""Strided copies between shards, stacks and message buffers, joined into few.

A piece is the overlap of one block with one shard. Copies of equal form at equal distances become
one copy with one more dim: all blocks of a parameter enter a stack by a single copy.
"""

import itertools
import math
from collections import defaultdict
from typing import NamedTuple

from titan_shampoo.block_memory import memory_stride
from titan_shampoo.distributed.layout import Region

Memory = tuple[str, int]
"""Name of a piece of flat memory: a kind and a number."""


class View(NamedTuple):
    """A strided view of flat memory, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def shifted(self, distance: int) -> "View":
        """The view ``distance`` elements further on."""
        return View(self.size, self.stride, self.offset + distance)


class Copy(NamedTuple):
    """One strided copy between two pieces of memory."""

    source: Memory
    source_view: View
    target: Memory
    target_view: View

    def reversed(self) -> "Copy":
        """The copy in the other direction."""
        return Copy(self.target, self.target_view, self.source, self.source_view)


class Piece(NamedTuple):
    """The overlap of a block with a shard."""

    in_shard: View
    """The piece in the memory of the shard."""
    in_block: View
    """The piece in the memory of the block."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.in_block.size)

    def packed(self, offset: int) -> View:
        """The piece as contiguous memory that starts at ``offset``."""
        size = self.in_block.size
        return View(size, contiguous_stride(size), offset)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides of ``shape``."""
    strides = itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1)
    return tuple(strides)[::-1]


def pieces(region: Region, start: tuple[int, ...], extent: tuple[int, ...]) -> list[Piece]:
    """The overlaps of the block at ``start`` with a shard that holds ``region``, row-major."""
    shard_shape = tuple(sum(b - a for a, b in intervals) for intervals in region)
    shard_stride, block_stride = contiguous_stride(shard_shape), memory_stride(extent)
    overlaps = [
        _overlaps(intervals, first, first + length)
        for intervals, first, length in zip(region, start, extent, strict=True)
    ]
    found = []
    for parts in itertools.product(*overlaps):
        size = tuple(length for length, _, _ in parts)
        in_shard = sum(p * s for (_, p, _), s in zip(parts, shard_stride, strict=True))
        in_block = sum(p * s for (_, _, p), s in zip(parts, block_stride, strict=True))
        found.append(Piece(View(size, shard_stride, in_shard), View(size, block_stride, in_block)))
    return found


def _overlaps(
    intervals: tuple[tuple[int, int], ...], start: int, stop: int
) -> list[tuple[int, int, int]]:
    """Triples (length, position in the shard, position in the block) along one dim."""
    found = []
    passed = 0
    for a, b in intervals:
        first, last = max(a, start), min(b, stop)
        if first < last:
            found.append((last - first, passed + first - a, first - start))
        passed += b - a
    return found


def coalesce(copies: list[Copy]) -> list[Copy]:
    """Equivalent copies, as few as possible: copies at equal distances are joined.

    >>> source, target = View((2,), (1,), 0), View((2,), (1,), 0)
    >>> moves = [Copy(("a", 0), source.shifted(4 * i), ("b", 0), target.shifted(2 * i))
    ...          for i in range(3)]
    >>> coalesce(moves)[0].source_view
    View(size=(3, 2), stride=(4, 1), offset=0)
    """
    families: dict[tuple[object, ...], list[Copy]] = defaultdict(list)
    for copy in copies:
        source, target = copy.source_view, copy.target_view
        families[copy.source, copy.target, source[:2], target[:2]].append(copy)
    joined = [copy for family in families.values() for copy in _joined(family)]
    return joined if len(joined) == len(copies) else coalesce(joined)


def _joined(family: list[Copy]) -> list[Copy]:
    """Runs of equal distance in a list of copies of one form, each run as one copy."""
    joined = []
    first = 0
    while first < len(family):
        end = first + 1
        if end < len(family) and min(distance := _distance(family[first], family[end])) > 0:
            while end < len(family) and _distance(family[end - 1], family[end]) == distance:
                end += 1
            joined.append(_repeated(family[first], end - first, distance))
        else:  # the last one, or the next one is at a lower address: strides must be positive
            joined.append(family[first])
        first = end
    return joined


def _distance(first: Copy, second: Copy) -> tuple[int, int]:
    return (
        second.source_view.offset - first.source_view.offset,
        second.target_view.offset - first.target_view.offset,
    )


def _repeated(copy: Copy, times: int, distance: tuple[int, int]) -> Copy:
    """``times`` copies as one, with the repetition as the first dim."""
    views = [
        View((times, *view.size), (step, *view.stride), view.offset)
        for view, step in zip((copy.source_view, copy.target_view), distance, strict=True)
    ]
    return Copy(copy.source, views[0], copy.target, views[1])
