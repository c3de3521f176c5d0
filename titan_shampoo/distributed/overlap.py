"""Number of elements that each shard has of each block: one table per parameter.

Regions and blocks are boxes, so the table is a product of one small table per dim. There is no
loop over pairs of a shard and a block: a large model on many ranks has millions.
"""

import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from titan_shampoo.distributed.geometry import Grid
from titan_shampoo.distributed.layout import Interval, Region, Sharding

Counts = NDArray[np.int64]


def overlap_table(sharding: Sharding, shape: tuple[int, ...], grid: Grid) -> Counts:
    """Elements of each block in each shard, ``(shards, blocks)``.

    Args:
        sharding: How the parameter is cut into shards.
        shape: Shape of the parameter.
        grid: Its blocks, row-major.
    """
    regions = [sharding.region(shape, grid, shard) for shard in range(sharding.num_regions)]
    table: Counts = np.ones((len(regions), 1), np.int64)
    for dim, edges in enumerate(grid.edges):
        along = _overlaps_along(regions, dim, edges)
        table = (table[:, :, None] * along[:, None, :]).reshape(len(regions), -1)
    return table


def holders(table: Counts) -> list[tuple[int, ...]]:
    """For each block, the shards that hold a part of it."""
    blocks, shards = np.nonzero(table.T)
    bounds = np.searchsorted(blocks, np.arange(table.shape[1] + 1)).tolist()
    numbers = shards.tolist()
    return [tuple(numbers[a:b]) for a, b in itertools.pairwise(bounds)]


def _overlaps_along(regions: list[Region], dim: int, edges: tuple[int, ...]) -> Counts:
    """Length of the overlap of each region with each cell between ``edges`` along one dim."""
    cells = np.asarray(edges)

    @functools.cache  # most dims are cut by few shards, or by none
    def row(intervals: tuple[Interval, ...]) -> Counts:
        bounds = np.asarray(intervals).reshape(-1, 2)
        stops = np.minimum(bounds[:, 1:], cells[None, 1:])
        starts = np.maximum(bounds[:, :1], cells[None, :-1])
        return np.clip(stops - starts, 0, None).sum(axis=0)

    return np.stack([row(region[dim]) for region in regions])
