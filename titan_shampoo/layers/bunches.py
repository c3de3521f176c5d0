"""Small equal layers that are stepped together, as a stack of matrices.

A step of a small matrix is a score of operations that each take longer to be called than to be
done. Stacked, thousands of matrices take as many operations as one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_shampoo.distributed.gradients import Grads
from titan_shampoo.distributed.tiles import Tile
from titan_shampoo.layers.layer import Layer, Span

SMALL_NUMEL = 1 << 14
"""Elements of a matrix up to which it is stacked; larger ones do not repay the copy."""
BUNCH_NUMEL = 1 << 20
"""Elements of a stack, at most: what caches hold."""


@dataclass(frozen=True, slots=True, eq=False)
class Bunch:
    """One layer, or several of equal shape, placement and options without joined biases.

    To its user, several layers are one whose matrices are stacked.
    """

    layers: Sequence[Layer]

    @property
    def first(self) -> Layer:
        """The first layer, which stands for all: only the numbers in their tensors differ."""
        return self.layers[0]

    @property
    def is_stacked(self) -> bool:
        """True if it has several layers."""
        return len(self.layers) > 1

    @property
    def batch_dims(self) -> int:
        """Leading dims of its matrices, 0 or 1."""
        return 1 if self.is_stacked else self.first.batch_dims

    @property
    def num_matrices(self) -> int:
        """Number of its matrices on all ranks."""
        return len(self.layers) if self.is_stacked else self.first.num_matrices

    @property
    def matrices_here(self) -> range:
        """Numbers of the matrices that this rank stores parts of."""
        return range(len(self.layers)) if self.is_stacked else self.first.matrices_here

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Dims that its matrices here have in front: ``()``, or their number."""
        return (len(self.matrices_here),) if self.batch_dims else ()

    @property
    def numel(self) -> int:
        """Elements of all its weights, on all ranks."""
        return self.first.weight.numel() * len(self.layers)

    @property
    def options(self) -> dict[str, Any]:
        """The parameter group."""
        return self.first.options

    @property
    def tile(self) -> Tile:
        """Place of each of its layers; of several, without their number in front."""
        return self.first.tile

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of statistics."""
        return self.first.dtype

    @property
    def bias(self) -> Tensor | None:
        """The joined bias; None of several."""
        return self.first.bias

    @property
    def matrix_numel(self) -> int:
        """Elements of one of its matrices; 1 for none."""
        return max(1, self.numel // max(1, self.num_matrices))

    def gradient(self, grads: Grads) -> Tensor | None:
        """Gradient as ``(rows, columns)``, or stacked; zero where one is missing, None if all are.

        A layer whose bias alone has a gradient has zeros.
        """
        if not self.is_stacked:
            return self.first.gradient(grads) if self.first.moves(grads) else None
        if not any(layer.weight in grads for layer in self.layers):
            return None
        return torch.stack([layer.gradient(grads) for layer in self.layers])

    def stacked(self, vectors: Sequence[Tensor]) -> Tensor:
        """One for each layer, together."""
        return torch.stack(list(vectors)) if self.is_stacked else vectors[0]

    def spans(self, dims: list[slice]) -> list[Span]:
        """Places of vectors along each of ``dims`` in those of all its layers, one by one."""
        spans = self.first.spans(dims)
        if not self.is_stacked:
            return spans
        count = len(self.layers)
        starts = torch.arange(count, device=self.first.weight.device)[:, None]
        return [
            Span(
                span.size * count,
                (starts * span.size + span.positions).flatten(),
                (count, *span.shape),
                span.is_partial,
            )
            for span in spans
        ]


def bunches_of(layers: Sequence[Layer]) -> list[Bunch]:
    """The layers in bunches, in the order of their first ones; the same on all ranks."""
    found: dict[object, list[list[Layer]]] = defaultdict(list)
    for number, layer in enumerate(layers):
        numel = layer.weight.numel()
        may_stack = (
            layer.bias is None
            and not (layer.batch_dims or layer.is_transposed)
            and 0 < numel <= SMALL_NUMEL
        )
        parts = found[_kind(layer) if may_stack else number]
        if not parts or (len(parts[-1]) + 1) * numel > BUNCH_NUMEL:
            parts.append([])
        parts[-1].append(layer)
    return [Bunch(part) for parts in found.values() for part in parts]


def _kind(layer: Layer) -> tuple[object, ...]:
    """Layers of equal kind can be stacked, on every rank or on none."""
    tile, weight = layer.tile, layer.weight
    return (
        id(layer.options), weight.dtype, weight.shape, tile.ranges, tile.seen, tile.is_first,
        tile.cut_dims, id(tile.group), id(tile.token_group),
        layer.gradient_divisor,
    )  # fmt: skip
