"""Bytes of parameters and of their state on each rank."""

import functools
import math
from collections import Counter
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_shampoo.distributed.geometry import make_grid
from titan_shampoo.distributed.layout import Sharding, layout_of


def bytes_by_rank(
    tensors: Iterable[tuple[Tensor, Tensor]], replicas: dist.ProcessGroup | None = None
) -> Counter[int]:
    """Bytes on each rank that holds a part of one of ``tensors``.

    Args:
        tensors: Pairs (tensor, its parameter). A plain tensor (a counter) of a DTensor parameter
            is whole on each rank that holds a part of the parameter.
        replicas: Ranks that hold plain parameters; None for this one alone.
    """
    held: Counter[int] = Counter()
    for tensor, param in tensors:
        placement_group, sharding = layout_of(param, replicas, "parameter")
        if isinstance(tensor, DTensor):
            placement_group, sharding = layout_of(tensor, replicas, "state")
            sizes = _shard_sizes(sharding, tuple(tensor.shape))
        else:
            sizes = [tensor.numel()] * placement_group.num_shards
        for row in placement_group.ranks:
            for rank, size in zip(row, sizes, strict=True):
                held[rank] += size * tensor.dtype.itemsize
    return held


@functools.cache
def _shard_sizes(sharding: Sharding, shape: tuple[int, ...]) -> list[int]:
    """Elements of each shard of a tensor of ``shape``."""
    grid = make_grid(shape, block_size=max(shape, default=1) or 1, merge="none")
    regions = [sharding.region(shape, grid, shard) for shard in range(sharding.num_regions)]
    return [math.prod(sum(b - a for a, b in dim) for dim in region) for region in regions]
