"""One layer as Eva and its relatives see it: a matrix, its bias, and where both are stored."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from titan_shampoo.distributed.gradients import Grads
from titan_shampoo.distributed.layout import Interval, local_tensor
from titan_shampoo.distributed.tiles import Tile
from titan_shampoo.functional.descent import as_tensors, coupled_gradient, rates
from titan_shampoo.functional.heavy_ball import Motion
from titan_shampoo.statistics import TappedLayer


class Span(NamedTuple):
    """Where a vector along some dims of a tile lies in that of the whole parameter.

    Of a stack: the vectors of all its matrices together.
    """

    size: int
    """Entries of the whole vector."""
    positions: Tensor
    """Of the tile's entries in it."""
    shape: tuple[int, ...]
    """Of the tile's entries: ``(k,)``, of a stack ``(matrices, k)``."""
    is_partial: bool
    """Whether sums over the other dims need other ranks."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A weight ``(d_out, ...)`` that is preconditioned, with its bias if that is joined to it.

    Or a stack of weights, each of which is preconditioned by itself. A weight that is stored as
    ``(d_in, d_out)`` is seen as its transpose: ``shape`` and ``tile`` are those of ``(d_out,
    d_in)``.
    """

    name: str
    """Of the weight."""
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]
    """The parameter group of both."""
    tile: Tile
    bias_range: Interval = (0, 0)
    """Entries of the bias that are stored here."""
    bias_counts: bool = False
    """Whether no earlier rank stores the same entries."""
    tapped: TappedLayer | None = None
    gradient_divisor: float = 1.0
    """By what the sum of the gradients of all ranks is divided."""
    batch_dims: int = 0
    """Leading dims of the weight that stack matrices, 0 or 1."""

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored as ``(d_in, d_out)``."""
        return self.tapped is not None and self.tapped.is_transposed

    @property
    def shape(self) -> torch.Size:
        """Of the whole weight, rows first."""
        return self.weight.shape[::-1] if self.is_transposed else self.weight.shape

    @property
    def num_matrices(self) -> int:
        """How many matrices the whole weight stacks; 1 for a plain one."""
        return math.prod(self.weight.shape[: self.batch_dims])

    @property
    def matrices_here(self) -> range:
        """Which of them this rank stores parts of."""
        return range(*self.tile.ranges[0]) if self.batch_dims else range(1)

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics: float32, or float64 for float64 parameters."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def bias_rows(self) -> slice:
        """Rows of the tile that the stored entries of the bias belong to."""
        start, stop = self.bias_range
        origin = self.tile.ranges[0][0]
        return slice(start - origin, stop - origin) if start < stop else slice(0, 0)

    def moves(self, grads: Grads) -> bool:
        """Whether the weight or the bias has a gradient."""
        return self.weight in grads or (self.bias is not None and self.bias in grads)

    def gradient(self, grads: Grads) -> Tensor:
        """Local gradient of the weight as :meth:`matrix`; zero if the bias alone is trained."""
        grad = grads.get(self.weight)
        if grad is None:
            grad = torch.zeros_like(local_tensor(self.weight))
        return self.matrix(grad).to(self.dtype)

    def matrix(self, tensor: Tensor) -> Tensor:
        """A local tensor like the stored weight as ``(rows, columns)``; a copy if strided.

        Of a stack ``(matrices, rows, columns)``.
        """
        if self.is_transposed:
            return tensor.T
        shape, rows = self.tile.shape, self.batch_dims
        return tensor.reshape(*shape[: rows + 1], math.prod(shape[rows + 1 :]))

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix ``(rows, columns)`` as the weight is stored; contiguous."""
        return (matrix.T if self.is_transposed else matrix).contiguous()

    def spans(self, dims: list[slice]) -> list[Span]:
        """Where vectors along each of ``dims`` lie; ``slice(1, None)`` for all columns."""
        tile, spans = self.tile, []
        for some in dims:
            kept = self._dims(some)
            sizes = [self.shape[dim] for dim in kept]
            inside = tuple(slice(*tile.ranges[dim]) for dim in kept)
            positions = torch.arange(math.prod(sizes)).view(sizes)[inside].flatten()
            is_partial = any(dim not in kept for dim in tile.cut_dims)
            here = [tile.shape[dim] for dim in kept]
            shape = (*here[: self.batch_dims], math.prod(here[self.batch_dims :]))
            positions = positions.to(self.weight.device)
            spans.append(Span(math.prod(sizes), positions, shape, is_partial))
        return spans

    def stored_along(self, dims: slice, local: Tensor) -> Tensor:
        """State along some dims as a tensor like the parameter: global if that is a DTensor.

        Args:
            dims: Those of a matrix that it has entries along: ``slice(1)`` for one per row,
                ``slice(1, None)`` for one per column, ``slice(0)`` for one per matrix of a stack.
            local: The entries of this rank's tile, ``(rows,)``, ``(columns,)`` or ``()``; of a
                stack with its matrices in front.
        """
        kept = self._dims(dims)
        local = local.view([self.tile.shape[dim] for dim in kept])
        if not kept or not isinstance(self.weight, DTensor):
            return local
        shape = torch.Size([self.shape[dim] for dim in kept])
        stride = torch.empty(shape, device="meta").stride()
        if self.is_transposed:
            kept = [1 - dim for dim in kept]
        placements = [_along(placement, kept) for placement in self.weight.placements]
        mesh = self.weight.device_mesh
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def _dims(self, some: slice) -> list[int]:
        """Dims of the weight: those that stack, and ``some`` of its matrices."""
        return [*range(self.batch_dims), *range(self.batch_dims, self.weight.ndim)[some]]


def _along(placement: Placement, kept: list[int]) -> Placement:
    """The placement of state along the dims ``kept`` of a weight with this placement."""
    if placement.is_replicate():
        return placement
    dim: int = placement.dim  # type: ignore[attr-defined]  # all shards have one
    if dim not in kept:
        return Replicate()
    return placement if kept[dim : dim + 1] == [dim] else Shard(kept.index(dim))


def motion_of(options: dict[str, Any], taken: Tensor | None, dtype: torch.dtype) -> Motion:
    """How directions move the parameters of a group, if the step is ``taken``."""
    speed = rates(options, rests=False)
    if taken is not None:
        speed = as_tensors(speed, taken, torch.empty((), dtype=dtype, device=taken.device))
    ball = options["momentum"] > 0
    return Motion(speed, float(options["dampening"]), bool(options["nesterov"]), ball)


def decayed(params: list[Tensor], grads: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Gradients with coupled weight decay added, never in place."""
    pairs = zip(params, grads, strict=True)
    return [coupled_gradient(grad, local_tensor(param), options) for param, grad in pairs]
