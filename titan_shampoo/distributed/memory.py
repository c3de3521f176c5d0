"""Bytes that each rank holds of tensors which lie like their parameters."""

import functools
import math
from collections import Counter
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.geometry import make_grid
from titan_shampoo.distributed.layout import Sharding, layout_of


def bytes_by_rank(
    tensors: Iterable[Tensor], replicas: dist.ProcessGroup | None = None
) -> Counter[int]:
    """Bytes of ``tensors`` on each rank that holds a part of one.

    Args:
        tensors: DTensors, or plain tensors that are whole on every rank.
        replicas: Ranks that hold the plain ones; None for this one alone.
    """
    held: Counter[int] = Counter()
    for tensor in tensors:
        team, sharding = layout_of(tensor, replicas, "tensor")
        sizes = _shard_sizes(sharding, tuple(tensor.shape))
        for row in team.ranks:
            for rank, size in zip(row, sizes, strict=True):
                held[rank] += size * tensor.dtype.itemsize
    return held


@functools.cache
def _shard_sizes(sharding: Sharding, shape: tuple[int, ...]) -> list[int]:
    """Elements of each shard of a tensor of ``shape``."""
    grid = make_grid(shape, block_size=max(shape, default=1) or 1, merge="none")
    regions = [sharding.region(shape, grid, shard) for shard in range(sharding.num_regions)]
    return [math.prod(sum(b - a for a, b in dim) for dim in region) for region in regions]
