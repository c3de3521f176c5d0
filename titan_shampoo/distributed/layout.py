"""Ranks that hold a parameter, and the part that each of them holds.

Everything is read off the parameter. A cut along a merged dim is a list of intervals of that dim,
so one description covers FSDP2, HSDP, tensor parallelism and their products.
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
    """Cuts of a tensor: the mesh axes that shard it, and along which dim, in the order of cuts."""

    num_shards: tuple[int, ...]
    """Size of each sharding mesh axis, in mesh order."""
    cuts: tuple[tuple[int, int], ...]
    """Pairs (position of the axis in ``num_shards``, tensor dim), first cut first."""

    def region(self, shape: tuple[int, ...], grid: Grid, shard: int) -> Region:
        """Part of a parameter of ``shape`` in shard number ``shard``; may be empty."""
        return _region(self, shape, grid, shard)

    @property
    def num_regions(self) -> int:
        """Number of shards."""
        return math.prod(self.num_shards)

    def edges(self, shape: tuple[int, ...], grid: Grid) -> tuple[tuple[int, ...], ...]:
        """Edges of the shards of a parameter of ``shape`` along each merged dim."""
        return _edges(self, shape, grid)


@functools.cache
def _region(sharding: Sharding, shape: tuple[int, ...], grid: Grid, shard: int) -> Region:
    coordinates: list[int] = []
    for size in reversed(sharding.num_shards):
        shard, coordinate = divmod(shard, size)
        coordinates.insert(0, coordinate)
    ranges = [(0, extent) for extent in shape]
    for axis, dim in sharding.cuts:
        ranges[dim] = chunk(ranges[dim], sharding.num_shards[axis], coordinates[axis])
    return tuple(_merged_intervals(shape, ranges, group) for group in grid.dim_groups)


@functools.cache
def _edges(sharding: Sharding, shape: tuple[int, ...], grid: Grid) -> tuple[tuple[int, ...], ...]:
    found: list[set[int]] = [set() for _ in grid.merged_shape]
    for shard in range(sharding.num_regions):
        for edges, intervals in zip(found, _region(sharding, shape, grid, shard), strict=True):
            edges.update(itertools.chain.from_iterable(intervals))
    return tuple(tuple(sorted(edges)) for edges in found)


def chunk(interval: Interval, num_chunks: int, index: int) -> Interval:
    """The ``index``-th of ``num_chunks`` chunks, cut like ``torch.chunk``."""
    start, stop = interval
    size = -(-(stop - start) // num_chunks)
    return min(start + index * size, stop), min(start + (index + 1) * size, stop)


def _merged_intervals(
    shape: tuple[int, ...], ranges: list[Interval], group: tuple[int, ...]
) -> tuple[Interval, ...]:
    """Ranges of the merged dim covered by a box over the dims of ``group``, neighbours joined."""
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
class PlacementGroup:
    """Placement group: the ranks of a parameter, ``ranks[replica][shard]``, and their groups."""

    ranks: tuple[tuple[int, ...], ...]
    replica: int
    """Row of this rank."""
    shard: int
    """Column of this rank."""
    shard_group: dist.ProcessGroup | None
    """Connects ``ranks[replica]``, in that order; None if there is one shard."""
    replica_group: dist.ProcessGroup | None
    """Connects column ``shard`` of ``ranks``, in that order; None if there is one replica."""

    @property
    def num_replicas(self) -> int:
        """Number of ranks with the same shard."""
        return len(self.ranks)

    @property
    def num_shards(self) -> int:
        """Number of parts of one copy."""
        return len(self.ranks[0])


def layout_of(
    param: Tensor, process_group: dist.ProcessGroup | None, name: str
) -> tuple[PlacementGroup, Sharding]:
    """Placement group and sharding of ``param``.

    Args:
        param: A plain tensor (the same on every rank of ``process_group``) or a DTensor.
        process_group: Ranks that hold plain tensors as replicas; None for one rank alone.
        name: Name of the parameter, for error messages.

    Raises:
        ValueError: If a placement is neither Shard nor Replicate, or if the parameter is stored on
            another kind of device than its mesh.
    """
    if isinstance(param, DTensor):
        check_device(param.device.type, param.device_mesh.device_type, name)
        return _dtensor_layout(param, name)
    if process_group is None or process_group.size() == 1:
        # Its global rank, not 0: otherwise it would look like a rank of rank 0's placement group.
        me = dist.get_rank() if dist.is_initialized() else 0
        return PlacementGroup(((me,),), 0, 0, None, None), Sharding((), ())
    ranks = tuple((rank,) for rank in dist.get_process_group_ranks(process_group))
    return PlacementGroup(ranks, process_group.rank(), 0, None, process_group), Sharding((), ())


def check_device(stored: str, mesh: str, name: str) -> None:
    """Raise ValueError if a parameter is offloaded to the host (FSDP2's CPUOffloadPolicy).

    Its gradient and state would cross the bus twice per step, and its process groups cannot reach
    host memory.

    Args:
        stored: Type of the device of the local shard; "meta" matches any.
        mesh: Type of the device of its mesh.
        name: Name of the parameter.
    """
    if stored not in (mesh, "meta"):
        raise ValueError(f"{name}: got a shard in {stored} memory on a mesh of {mesh} devices, "
                         f"wanted both on {mesh}; switch off CPU offload")  # fmt: skip


def _dtensor_layout(param: DTensor, name: str) -> tuple[PlacementGroup, Sharding]:
    mesh, placements = param.device_mesh, param.placements
    for placement in placements:
        if not (placement.is_replicate() or _is_shard(placement)):
            raise ValueError(f"{name}: got placement {placement}, wanted Shard or Replicate")
    axes = [axis for axis, size in enumerate(mesh.shape) if size > 1]
    sharding_axes = [axis for axis in axes if not placements[axis].is_replicate()]
    replica_axes = [axis for axis in axes if placements[axis].is_replicate()]
    placement_group = _placement_group(mesh, tuple(replica_axes), tuple(sharding_axes))
    cuts = cut_order([(placements[axis], mesh.shape[axis]) for axis in sharding_axes])
    return placement_group, Sharding(tuple(mesh.shape[axis] for axis in sharding_axes), cuts)


def _is_shard(placement: Placement) -> bool:
    return isinstance(placement, (Shard, _StridedShard))


def cut_order(shards: list[tuple[Placement, int]]) -> tuple[tuple[int, int], ...]:
    """Order of cutting: left to right, but a strided shard after the axes it interleaves with."""
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


def _placement_group(
    mesh: DeviceMesh, replica_axes: tuple[int, ...], sharding_axes: tuple[int, ...]
) -> PlacementGroup:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a parameter is on a mesh without this rank"
    axes = replica_axes + sharding_axes
    index = tuple(slice(None) if a in axes else coordinate[a] for a in range(mesh.ndim))
    table = mesh.mesh[index].permute([sorted(axes).index(axis) for axis in axes])
    sizes = [math.prod(mesh.shape[a] for a in some) for some in (replica_axes, sharding_axes)]
    ranks = tuple(tuple(row) for row in table.reshape(sizes).tolist())
    me = int(mesh.mesh[tuple(coordinate)])
    replica = next(r for r, row in enumerate(ranks) if me in row)
    shard_group, replica_group = axes_group(mesh, sharding_axes), axes_group(mesh, replica_axes)
    return PlacementGroup(ranks, replica, ranks[replica].index(me), shard_group, replica_group)


def axes_group(mesh: DeviceMesh, axes: tuple[int, ...]) -> dist.ProcessGroup | None:
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
