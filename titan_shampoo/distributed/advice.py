"""Block sizes that make the work of the ranks even, or keep blocks inside their shards."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from titan_shampoo.distributed.blocks import Block, Parameter, assigned_blocks

ACCEPTED = 1.05
"""Largest over mean work of a rank, up to which no advice is given."""

SMALLEST = 32
"""Smallest block size that is suggested: smaller blocks are not worth a matrix."""

SMALLEST_ALIGNED = 8
"""Smallest number of rows or columns of a block for which alignment is suggested."""

MOST_BLOCKS = 200_000
"""Number of blocks up to which another size is tried: it takes seconds of planning."""


def suggestions(params: Sequence[Parameter], blocks: Sequence[Block]) -> list[str]:
    """Settings that make the work even and avoid messages, in words; empty if there is no need.

    Args:
        params: The plan's parameters.
        blocks: The plan's blocks.
    """
    found = []
    before = imbalance(params, blocks)
    if before > ACCEPTED:
        size = balanced_block_size(params, before)
        found.append(
            f"work is uneven: the busiest rank has {before:.2f} times the mean; "
            + (f"set block_size = {size}" if size else
               "no smaller block_size that was tried makes it even")
        )  # fmt: skip
    rows = aligned_rows(params)
    if any(block.is_cut and len(block.shards) > 1 for block in blocks) and rows:
        found.append(
            f"shard edges cut blocks: nothing travels with block_size = [{rows[0]}, {rows[1]}], "
            'or with block_alignment = "shard" (iterates then depend on the mesh)'
        )
    return found


def imbalance(params: Sequence[Parameter], blocks: Sequence[Block]) -> float:
    """Largest over mean work per rank, averaged over the period."""
    work = np.zeros(
        1 + max((r for p in params for row in p.placement_group.ranks for r in row), default=0)
    )
    for block in blocks:
        param = params[block.param]
        owner = param.placement_group.ranks[block.replica][block.shard]
        work[owner] += param.block_costs[block.index].per_step(param.period)
    here = work[sorted({r for p in params for row in p.placement_group.ranks for r in row})]
    return float(here.max() / here.mean()) if here.any() else 1.0


def balanced_block_size(params: Sequence[Parameter], before: float) -> int | None:
    """The largest smaller block size with even work; None if there is none.

    Without one within ``ACCEPTED``, a size that halves the excess over the mean is returned.
    """
    tried = {}
    for size in _smaller_sizes(params):
        smaller = [_with_block_size(param, size) for param in params]
        if sum(param.grid.num_blocks for param in smaller) > MOST_BLOCKS:
            break
        tried[size] = imbalance(smaller, assigned_blocks(smaller))
        if tried[size] <= ACCEPTED:
            return size
    best = min(tried, key=lambda size: (round(tried[size], 2), -size), default=None)
    if best is None or tried[best] - 1 > (before - 1) / 2:
        return None
    return best


def _smaller_sizes(params: Sequence[Parameter]) -> Iterator[int]:
    """Halves and three quarters of the present size, largest first."""
    edges = [dim for p in params for dim in p.grid.edges[p.grid.batch_dims :]]
    present = max((b - a for dim in edges for a, b in itertools.pairwise(dim)), default=0)
    size = 1 << max(present - 1, 1).bit_length()
    while size >= SMALLEST:
        yield from (s for s in (size, 3 * size // 4) if SMALLEST <= s < present)
        size //= 2


def _with_block_size(param: Parameter, size: int) -> Parameter:
    """The parameter in blocks of at most ``size``; merged dims do not change."""
    grid = param.grid
    edges = tuple(
        mine if dim < grid.batch_dims else (*range(0, extent, size), extent)
        for dim, (mine, extent) in enumerate(zip(grid.edges, grid.merged_shape, strict=True))
    )
    finer = replace(grid, edges=edges, fingerprint="")
    if param.alignment == "shard":
        finer = finer.cut_at(param.sharding.edges(param.shape, finer))
    return replace(param, grid=finer)


def aligned_rows(params: Sequence[Parameter]) -> tuple[int, int] | None:
    """Largest block size (rows, columns) that no shard edge cuts; None if it is tiny."""
    sizes = [0, 0]
    for param in params:
        cuts = param.sharding.edges(param.shape, param.grid)
        for dim in range(param.grid.batch_dims, len(cuts)):
            inner = [edge for edge in cuts[dim] if edge != param.grid.merged_shape[dim]]
            side = min(dim - param.grid.batch_dims, 1)
            sizes[side] = math.gcd(sizes[side], *inner)
    present = [_largest_extent(params, side) for side in (0, 1)]
    rows, columns = (
        math.gcd(now, size) if size else now for now, size in zip(present, sizes, strict=True)
    )
    return (rows, columns) if min(rows, columns or rows) >= SMALLEST_ALIGNED else None


def _largest_extent(params: Sequence[Parameter], side: int) -> int:
    """Largest extent of a block along the first dim (0) or any other (1)."""
    return max(
        (b - a for p in params
         for dim, edges in enumerate(p.grid.edges[p.grid.batch_dims:]) if min(dim, 1) == side
         for a, b in itertools.pairwise(edges)),
        default=0,
    )  # fmt: skip
