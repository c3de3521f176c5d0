"""This rank's tile of a layer's matrix, and the ranks that hold the others.

Methods with one statistic per layer do not move the matrix: a rank works on its own tile, and only
vectors and scalars travel. Everything is read off the parameter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_shampoo.distributed.layout import (
    Interval,
    PlacementGroup,
    axes_group,
    chunk,
    cut_order,
    layout_of,
)

Axes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """The box of one parameter on this rank, in global coordinates."""

    ranges: tuple[Interval, ...]
    """``[start, stop)`` of each dim, as stored here; may be empty."""
    seen: tuple[Interval, ...]
    """``[start, stop)`` of each dim that this rank computes with: the part that FSDP2 gathers."""
    is_first: tuple[bool, bool]
    """True if no earlier rank holds the same rows; the same for columns (all dims but the first).

    Sums over ranks count a range that several ranks hold on the first of them only. In a stack,
    ranks are compared within the same matrices.
    """
    cut_dims: frozenset[int]
    """Dims along which other ranks hold other ranges."""
    placement_group: PlacementGroup
    """Placement group of the parameter."""
    token_group: dist.ProcessGroup | None
    """Ranks that compute the same part of the layer on other tokens; None for this one alone."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Ranks whose tiles make up one copy of the parameter; None if it is whole here."""
        return self.placement_group.shard_group

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tile."""
        return tuple(stop - start for start, stop in self.ranges)

    def transposed(self) -> "Tile":
        """The tile of the transposed matrix."""
        return replace(
            self,
            ranges=self.ranges[::-1],
            seen=self.seen[::-1],
            is_first=(self.is_first[1], self.is_first[0]),
            cut_dims=frozenset(1 - dim for dim in self.cut_dims),
        )

    def positions_in_seen(self, dims: slice) -> Tensor:
        """Flat positions of the stored ranges of ``dims`` within ``seen``."""
        seen = [stop - start for start, stop in self.seen[dims]]
        inside = tuple(
            slice(start - origin, stop - origin)
            for (start, stop), (origin, _) in zip(self.ranges[dims], self.seen[dims], strict=True)
        )
        return torch.arange(math.prod(seen)).view(seen)[inside].flatten()


def tile_of(
    param: Tensor,
    replicas: dist.ProcessGroup | None,
    name: str,
    *,
    row_axes: Axes = (),
    batch_dims: int = 0,
) -> Tile:
    """The tile of ``param`` on this rank.

    Args:
        param: A plain tensor or a DTensor.
        replicas: Ranks that hold plain tensors as replicas, each with its own tokens.
        name: Name of the parameter, for errors.
        row_axes: Axes of its mesh along which ranks have different tokens.
        batch_dims: Leading dims that stack matrices.

    Raises:
        ValueError: If a placement is neither Shard nor Replicate.
    """
    placement_group, _ = layout_of(param, replicas, name)
    whole = tuple((0, size) for size in param.shape)
    if not isinstance(param, DTensor):
        return Tile(
            whole, whole, (True, True), frozenset(), placement_group, placement_group.replica_group
        )
    mesh = param.device_mesh
    cuts = _cuts(param)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a parameter is on a mesh without this rank"
    ranges, seen = list(whole), list(whole)
    for axis, dim in cuts:
        ranges[dim] = chunk(ranges[dim], mesh.shape[axis], coordinate[axis])
        if axis not in row_axes:
            seen[dim] = chunk(seen[dim], mesh.shape[axis], coordinate[axis])
    return Tile(
        ranges=tuple(ranges),
        seen=tuple(seen),
        is_first=(
            all(coordinate[axis] == 0 for axis, dim in cuts if dim > batch_dims),
            all(coordinate[axis] == 0 for axis, dim in cuts if dim == batch_dims),
        ),
        cut_dims=frozenset(dim for _, dim in cuts),
        placement_group=placement_group,
        token_group=axes_group(mesh, tuple(axis for axis in row_axes if mesh.shape[axis] > 1)),
    )


def _cuts(param: DTensor) -> list[tuple[int, int]]:
    """Pairs (mesh axis, tensor dim) of the cuts of ``param``, first cut first."""
    sizes, placements = param.device_mesh.shape, param.placements
    axes = [axis for axis, p in enumerate(placements) if sizes[axis] > 1 and not p.is_replicate()]
    order = cut_order([(placements[axis], sizes[axis]) for axis in axes])
    return [(axes[position], dim) for position, dim in order]


def vector_tile(
    vector: Tensor, weight: Tensor, name: str, *, dim: int = 0
) -> tuple[Interval, bool] | None:
    """Range of a layer's bias on this rank, and True if no earlier rank has the same range.

    None if the ranks of the bias are not those of ``weight``: the two then cannot be preconditioned
    together.

    Args:
        vector: The bias, ``(d_out,)``.
        weight: Weight of the same layer.
        name: Name of the bias, for errors.
        dim: Dim of the weight that is ``d_out`` long.
    """
    if not isinstance(vector, DTensor) or not isinstance(weight, DTensor):
        same_kind = isinstance(vector, DTensor) == isinstance(weight, DTensor)
        return ((0, vector.shape[0]), True) if same_kind else None
    if vector.device_mesh != weight.device_mesh:
        return None
    own = {axis for axis, _ in _cuts(vector)}
    axes = {axis for axis, _ in _cuts(weight)}
    coordinate = vector.device_mesh.get_coordinate()
    assert coordinate is not None, "a parameter is on a mesh without this rank"
    (interval,) = tile_of(vector, None, name).ranges
    rows = tile_of(weight, None, name).ranges[dim]
    inside = rows[0] <= interval[0] and interval[1] <= rows[1]
    if not own <= axes or not (inside or interval[0] == interval[1]):
        return None
    return interval, all(coordinate[axis] == 0 for axis in axes - own)


def all_reduce_together(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sums of ``tensors`` over the ranks of ``group``, by one collective for all of them.

    Args:
        tensors: Tensors of one dtype, contiguous or not; of equal shapes on all ranks.
        group: None for this rank alone, which returns the tensors unchanged.
    """
    if group is None or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    sizes = [tensor.numel() for tensor in tensors]
    parts = zip(flat.split(sizes), tensors, strict=True)
    return [part.view(tensor.shape) for part, tensor in parts]
