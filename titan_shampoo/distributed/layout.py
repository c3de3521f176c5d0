"""Where a parameter is stored: which ranks hold it, and which part each of them holds.

Everything is read off the parameter. A sharding along a dim that is merged with others is a list
of intervals of the merged dim, so one description covers FSDP2, HSDP, tensor parallelism and their
products.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from titan_shampoo.distributed.geometry import Grid

Interval = tuple[int, int]
Region = tuple[tuple[Interval, ...], ...]
"""For each merged dim, the ranges ``[start, stop)`` that a shard holds, in memory order."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is cut: which mesh axes shard it, along which dim, in the order of cutting."""

    num_shards: tuple[int, ...]
    """Size of each sharding mesh axis, in mesh order."""
    cuts: tuple[tuple[int, int], ...]
    """Pairs (position of the axis in ``num_shards``, tensor dim), first cut first."""

    def region(self, shape: tuple[int, ...], grid: Grid, shard: int) -> Region:
        """The part of a parameter of ``shape`` that shard number ``shard`` holds; may be empty."""
        return _region(self, shape, grid, shard)

    @property
    def num_regions(self) -> int:
        """How many shards there are."""
        return math.prod(self.num_shards)

    def edges(self, shape: tuple[int, ...], grid: Grid) -> tuple[tuple[int, ...], ...]:
        """Where shards of a parameter of ``shape`` begin and end along each merged dim."""
        return _edges(self, shape, grid)


@functools.cache
def _region(sharding: Sharding, shape: tuple[int, ...], grid: Grid, shard: int) -> Region:
    coordinates: list[int] = []
    for size in reversed(sharding.num_shards):
        shard, coordinate = divmod(shard, size)
        coordinates.insert(0, coordinate)
    ranges = [(0, extent) for extent in shape]
    for axis, dim in sharding.cuts:
        ranges[dim] = _chunk(ranges[dim], sharding.num_shards[axis], coordinates[axis])
    return tuple(_merged_intervals(shape, ranges, group) for group in grid.dim_groups)


@functools.cache
def _edges(sharding: Sharding, shape: tuple[int, ...], grid: Grid) -> tuple[tuple[int, ...], ...]:
    found: list[set[int]] = [set() for _ in grid.merged_shape]
    for shard in range(sharding.num_regions):
        for edges, intervals in zip(found, _region(sharding, shape, grid, shard), strict=True):
            edges.update(itertools.chain.from_iterable(intervals))
    return tuple(tuple(sorted(edges)) for edges in found)


def _chunk(interval: Interval, num_chunks: int, index: int) -> Interval:
    """The ``index``-th of ``num_chunks`` chunks, as ``torch.chunk`` cuts."""
    start, stop = interval
    size = -(-(stop - start) // num_chunks)
    return min(start + index * size, stop), min(start + (index + 1) * size, stop)


def _merged_intervals(
    shape: tuple[int, ...], ranges: list[Interval], group: tuple[int, ...]
) -> tuple[Interval, ...]:
    """Ranges of the merged dim that a box over the dims of ``group`` covers, neighbours joined."""
    intervals: list[Interval] = [(0, 1)]
    for dim in group:
        start, stop = ranges[dim]
        extent = shape[dim]
        if (start, stop) == (0, extent):
            intervals = [(a * extent, b * extent) for a, b in intervals]
        else:
            rows = itertools.chain.from_iterable(range(a, b) for a, b in intervals)
            intervals = [(row * extent + start, row * extent + stop) for row in rows]
    joined: list[Interval] = []
    for start, stop in intervals:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks that hold a parameter, ``ranks[replica][shard]``, and how they talk."""

    ranks: tuple[tuple[int, ...], ...]
    replica: int
    """Row of this rank."""
    shard: int
    """Column of this rank."""
    shard_group: dist.ProcessGroup | None
    """Connects ``ranks[replica]``, in that order; None where there is one shard."""
    replica_group: dist.ProcessGroup | None
    """Connects column ``shard`` of ``ranks``, in that order; None where there is one replica."""

    @property
    def num_replicas(self) -> int:
        """How many ranks hold the same shard."""
        return len(self.ranks)

    @property
    def num_shards(self) -> int:
        """How many ranks hold a part each of one copy."""
        return len(self.ranks[0])


def layout_of(
    param: Tensor, process_group: dist.ProcessGroup | None, name: str
) -> tuple[Team, Sharding]:
    """Who holds ``param`` and how it is cut.

    Args:
        param: A plain tensor (the same on every rank of ``process_group``) or a DTensor.
        process_group: Ranks that hold plain tensors as replicas; None for one rank alone.
        name: Name of the parameter, for error messages.

    Raises:
        ValueError: If a placement is neither a shard nor a replica, or the parameter is kept in
            other memory than its mesh communicates from.
    """
    if isinstance(param, DTensor):
        check_device(param.device.type, param.device_mesh.device_type, name)
        return _dtensor_layout(param, name)
    if process_group is None or process_group.size() == 1:
        # By its own number: whoever compares teams must not take it for a part of rank 0's.
        me = dist.get_rank() if dist.is_initialized() else 0
        return Team(((me,),), 0, 0, None, None), Sharding((), ())
    ranks = tuple((rank,) for rank in dist.get_process_group_ranks(process_group))
    return Team(ranks, process_group.rank(), 0, None, process_group), Sharding((), ())


def check_device(stored: str, mesh: str, name: str) -> None:
    """Raise ValueError for parameters that are offloaded to the host (FSDP2's CPUOffloadPolicy).

    Their gradients and state would have to cross the bus twice in each step, and their process
    groups do not reach host memory.

    Args:
        stored: Type of the device that holds the local shard; "meta" stands for any.
        mesh: Type of the device that its mesh communicates from.
        name: Name of the parameter.
    """
    if stored not in (mesh, "meta"):
        raise ValueError(f"{name}: got a shard in {stored} memory on a mesh of {mesh} devices, "
                         f"wanted both on {mesh}; switch off CPU offload")  # fmt: skip


def _dtensor_layout(param: DTensor, name: str) -> tuple[Team, Sharding]:
    mesh, placements = param.device_mesh, param.placements
    for placement in placements:
        if not (placement.is_replicate() or _is_shard(placement)):
            raise ValueError(f"{name}: got placement {placement}, wanted Shard or Replicate")
    axes = [axis for axis, size in enumerate(mesh.shape) if size > 1]
    sharding_axes = [axis for axis in axes if not placements[axis].is_replicate()]
    replica_axes = [axis for axis in axes if placements[axis].is_replicate()]
    team = _team(mesh, tuple(replica_axes), tuple(sharding_axes))
    cuts = _cut_order([(placements[axis], mesh.shape[axis]) for axis in sharding_axes])
    return team, Sharding(tuple(mesh.shape[axis] for axis in sharding_axes), cuts)


def _is_shard(placement: Placement) -> bool:
    return isinstance(placement, (Shard, _StridedShard))


def _cut_order(shards: list[tuple[Placement, int]]) -> tuple[tuple[int, int], ...]:
    """Order of cutting: left to right, but a strided shard after those it interleaves with."""
    order: list[tuple[int, int]] = []
    for axis in reversed(range(len(shards))):
        placement = shards[axis][0]
        dim: int = placement.dim  # type: ignore[attr-defined]  # Shard and _StridedShard have one
        position = 0
        if isinstance(placement, _StridedShard):
            interleaved = 1
            while interleaved < placement.split_factor:
                other_axis, other_dim = order[position]
                interleaved *= shards[other_axis][1] if other_dim == dim else 1
                position += 1
        order.insert(position, (axis, dim))
    return tuple(order)


def _team(mesh: DeviceMesh, replica_axes: tuple[int, ...], sharding_axes: tuple[int, ...]) -> Team:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a parameter lies on a mesh without this rank"
    axes = replica_axes + sharding_axes
    index = tuple(slice(None) if a in axes else coordinate[a] for a in range(mesh.ndim))
    table = mesh.mesh[index].permute([sorted(axes).index(axis) for axis in axes])
    sizes = [math.prod(mesh.shape[a] for a in some) for some in (replica_axes, sharding_axes)]
    ranks = tuple(tuple(row) for row in table.reshape(sizes).tolist())
    me = int(mesh.mesh[tuple(coordinate)])
    replica = next(r for r, row in enumerate(ranks) if me in row)
    shard_group, replica_group = _group(mesh, sharding_axes), _group(mesh, replica_axes)
    return Team(ranks, replica, ranks[replica].index(me), shard_group, replica_group)


def _group(mesh: DeviceMesh, axes: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Process group over ``axes`` through this rank; several axes are flattened into one group."""
    if not axes:
        return None
    if len(axes) == 1:
        return mesh.get_group(axes[0])
    names = mesh.mesh_dim_names
    assert names is not None, "a parameter sharded over several mesh axes needs a mesh with names"
    return mesh[tuple(names[axis] for axis in axes)]._flatten().get_group()


def local_tensor(tensor: Tensor) -> Tensor:
    """The memory of ``tensor`` on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
