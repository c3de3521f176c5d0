r"""Shampoo's factors for another block size: ``checkpoint.reblock = "approximate"``.

A block's factors are sums of ``G G^T`` and ``G^T G`` over its own part of the gradient. A new block
can have a part of an old one, with rows ``a`` and columns ``b`` in common. Its contribution is

    L[a, a] += L_old[a, a] * tr(R_old[b, b]) / tr(R_old)
    R[b, b] += R_old[b, b] * tr(L_old[a, a]) / tr(L_old)

Splitting rows therefore gives the exact left factor, merging rows the exact right one, and likewise
for columns. The rest is scaled by its share of the energy, and the error fades with the averages.
Roots are computed again; state with the parameter's own shape is loaded unchanged.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_shampoo.blocks.state import FAILURES, REFRESHES
from titan_shampoo.distributed.geometry import Grid
from titan_shampoo.distributed.state import BlockTensor
from titan_shampoo.functional.rule import Clock
from titan_shampoo.functional.shampoo import NUM_MEASURED, ShampooRule
from titan_shampoo.functional.symmetric import pack, unpack

SIDES = ("left", "right")
PER_BLOCK = (*SIDES, "left_root", "right_root", "left_basis", "right_basis")
"""State with a tensor per block; its keys end in the block's extent."""

COUNTERS = (FAILURES.name, REFRESHES.name, NUM_MEASURED.name)
"""State with a number per block."""

Factors = dict[str, Tensor]
"""``left.<d>`` and ``right.<d>``: the factors of all blocks with that extent, ``(n, d, d)``."""


@dataclass(frozen=True, slots=True)
class Range:
    """Common rows, or columns, of an old and a new block, relative to the start of each."""

    old: slice
    new: slice


def can_reblock(own: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if two descriptions of a parameter differ only in the block size, for Shampoo.

    False if block edges are shard edges as well: the keys then name the whole grid.
    """
    mine, theirs = own.get("grid"), other.get("grid")
    return bool(
        own["method"] == other["method"] == ShampooRule.name
        and mine
        and theirs
        and not is_cut_at_shards(own)
        and not is_cut_at_shards(other)
        and own.get("meaning") == other.get("meaning")
        and mine["merged_shape"] == theirs["merged_shape"]
        and len(mine["merged_shape"]) == 2
        and mine["batch_dims"] == theirs["batch_dims"] == 0
    )


def is_cut_at_shards(description: Mapping[str, Any]) -> bool:
    """True if a parameter's blocks depend on the mesh."""
    return description.get("options", {}).get("block_alignment", "global") != "global"


def is_per_block(key: str) -> bool:
    """True if the name of a parameter's state depends on the block size."""
    name, _, extent = key.partition(".")
    return key in COUNTERS or (name in PER_BLOCK and extent.isdecimal())


def is_factor(key: str, prefix: str) -> bool:
    """True if a key is that of factors, after its prefix."""
    name, _, extent = key.removeprefix(prefix).partition(".")
    return name in SIDES and extent.isdecimal()


def grid_of(description: Mapping[str, Any]) -> Grid:
    """The grid of two dims that a checkpoint describes."""
    grid = description["grid"]
    edges = tuple(tuple(along) for along in grid["edges"])
    return Grid(((0,), (1,)), tuple(grid["merged_shape"]), edges, 0)


def new_factors(old: Grid, factors: Factors, new: Grid, position: tuple[int, ...]) -> Factors:
    """The factors of one block of a new grid.

    Args:
        old: The grid of the checkpoint.
        factors: All factors of the checkpoint.
        new: The new grid, of the same merged shape.
        position: Position of the block in the new grid.

    Returns:
        ``left``, ``(rows, rows)``, and ``right``, ``(cols, cols)``; without the sides that the
        checkpoint lacks because their exponent is 0.
    """
    extent = new.block_extent(position)
    sums = {
        side: torch.zeros(size, size, dtype=next(iter(factors.values())).dtype)
        for side, size in zip(SIDES, extent, strict=True)
        if any(key.startswith(f"{side}.") for key in factors)
    }
    places = block_places(old)
    for place, common in _overlaps(old, new, position):
        blocks = [factors[key][index] if key in factors else None for key, index in places[place]]
        for dim, side in enumerate(SIDES):
            mine, other, across = blocks[dim], blocks[1 - dim], common[1 - dim].old
            if mine is not None:
                share = _share(other, across, old.block_extent(place)[1 - dim])
                sums[side][common[dim].new, common[dim].new] += (
                    mine[common[dim].old, common[dim].old] * share
                )
    return sums


def _overlaps(
    old: Grid, new: Grid, position: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[Range, ...]]]:
    """Old blocks with a part in a new one, and the common ranges."""
    start, extent = new.block_start(position), new.block_extent(position)
    along = [list(_ranges(*one)) for one in zip(old.edges, start, extent, strict=True)]
    for pairs in itertools.product(*along):
        yield tuple(index for index, _ in pairs), tuple(common for _, common in pairs)


def _ranges(edges: tuple[int, ...], start: int, extent: int) -> Iterator[tuple[int, Range]]:
    """Old blocks along one dim with a part of ``[start, start + extent)``."""
    for index, (begin, end) in enumerate(itertools.pairwise(edges)):
        first, last = max(start, begin), min(start + extent, end)
        if first < last:
            old, new = slice(first - begin, last - begin), slice(first - start, last - start)
            yield index, Range(old, new)


def _share(factor: Tensor | None, part: slice, extent: int) -> Tensor | float:
    """Share of an old block's energy in a part of its rows or columns."""
    if factor is None:
        return (part.stop - part.start) / extent
    diagonal = factor.diagonal()
    whole = diagonal.sum()
    return diagonal[part].sum() / whole if whole > 0 else 0.0


def block_places(grid: Grid) -> dict[tuple[int, ...], tuple[tuple[str, int], ...]]:
    """For each block, the key of each side's factors and the block's index among them."""
    counts: dict[str, int] = {}
    places = {}
    for position in grid.positions():
        found = []
        for side, extent in zip(SIDES, grid.block_shape(position), strict=True):
            key = f"{side}.{extent}"
            counts[key] = counts.get(key, 0) + 1
            found.append((key, counts[key] - 1))
        places[position] = tuple(found)
    return places


def fill(
    state: Mapping[str, Tensor],
    factors: Factors,
    old: Grid,
    new: Grid,
    step: int,
    options: Mapping[str, Any],
) -> None:
    """Set factors and roots of this rank's blocks of one parameter, in place.

    Args:
        state: Live state of the parameter, by name.
        factors: All factors of the checkpoint, packed as in its files.
        old: The grid of these factors.
        new: The grid of this run.
        step: Number of steps that the parameter has taken.
        options: The parameter's group.
    """
    rule = ShampooRule()
    factors = {key: unpack(f, int(key.rpartition(".")[2])) for key, f in factors.items()}
    num_measured = -(-step // options["factor_frequency"])
    for position, places in block_places(new).items():
        mine = {
            (side, name): chunk
            for side, (key, index) in zip(SIDES, places, strict=True)
            for name in (side, f"{side}_root", f"{side}_basis")
            for chunk in _chunks(state, f"{name}.{key.partition('.')[2]}", index)
        }
        if not mine:
            continue
        sums = new_factors(old, factors, new, position)
        stack = {side: pack(factor[None]) for side, factor in sums.items()}
        stack[NUM_MEASURED.name] = torch.tensor([float(num_measured)])
        for side, factor in sums.items():
            size = len(factor)
            stack[f"{side}_basis"] = torch.eye(size, dtype=factor.dtype)[None]
        clock = Clock(torch.tensor([step]), ready=False, starts_at_one=torch.tensor([False]))
        first = torch.zeros(1, dtype=torch.int64)
        stack |= rule.refresh(stack, first, clock, new.block_shape(position), options)
        for (_, name), chunk in mine.items():
            chunk.copy_(stack[name])
    for name, value in zip(COUNTERS, (0, 1, num_measured), strict=True):
        counter = state.get(name)
        if isinstance(counter, BlockTensor):
            for chunk in counter.chunks.values():
                chunk.fill_(value)


def _chunks(state: Mapping[str, Tensor], key: str, index: int) -> Sequence[Tensor]:
    """The memory of one block in a stack, if this rank has it."""
    tensor = state.get(key)
    if not isinstance(tensor, BlockTensor):
        return ()
    return [chunk for start, chunk in tensor.chunks.items() if start[0] == index]
