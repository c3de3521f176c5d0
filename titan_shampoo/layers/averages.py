"""Running averages of what layers saw: their mean input and the summed gradient at their output.

All layers of one token group are one flat tensor, so that a step costs one all-reduce and a handful
of operations, however many layers there are. A rank keeps the entries that its tiles need.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from titan_shampoo.distributed.tiles import all_reduce_together
from titan_shampoo.functional.eva import running_average_
from titan_shampoo.layers.layer import Layer


class Averages:
    """Averages of layers that share their tokens' ranks and their precision.

    Args:
        layers: All of one token group and dtype.
        with_outputs: Whether gradients at the outputs are averaged, too.
    """

    def __init__(self, layers: Sequence[Layer], *, with_outputs: bool) -> None:
        self.layers = list(layers)
        self.with_outputs = with_outputs
        self.device = layers[0].weight.device
        self.group = layers[0].tile.token_group
        numbers = [len(layer.matrices_here) for layer in layers]
        self.count = torch.zeros(sum(numbers), dtype=layers[0].dtype, device=self.device)
        """Batches averaged so far, ``(matrices,)``; batches without rows do not count."""
        self.counts = self.count.split(numbers)
        """The same of each layer, ``(1,)``, or ``(matrices,)`` of a stack."""
        self.rows = torch.zeros_like(self.count)
        """Rows that the last batch had on all ranks, ``(matrices,)``."""
        layer_of = torch.arange(len(layers)).repeat_interleave(torch.tensor(numbers))
        self._layer_of = layer_of.to(self.device)
        shapes = self._find_entries(torch.arange(sum(numbers)).split(numbers))
        sizes = [math.prod(shape) for shape in shapes]
        self._flat = torch.zeros(sum(sizes), dtype=self.count.dtype, device=self.device)
        parts = zip(self._flat.split(sizes), shapes, strict=True)
        views = [part.view(shape) for part, shape in parts]
        step = 2 if with_outputs else 1
        self.inputs = views[::step]
        """Mean input of each layer, ``(columns,)``, the bias's constant 1 not included; of a stack
        ``(matrices, columns)``."""
        self.outputs = views[1::step] if with_outputs else []
        """Summed gradient at the output of each layer, ``(rows,)``, or ``(matrices, rows)``."""

    def _find_entries(self, matrices: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Find the entries of this rank's tiles in the sums; returns the shapes that they have.

        Args:
            matrices: Numbers of the matrices of each layer, ``(matrices,)``.
        """
        sources, owners, is_input, ends, shapes = [], [], [], [], []
        origin = 0
        for layer, mine in zip(self.layers, matrices, strict=True):
            tile, row = layer.tile, layer.batch_dims
            kinds = [(slice(row + 1, None), True), (slice(row, row + 1), False)]
            for dims, with_count in kinds if self.with_outputs else kinds[:1]:
                width = self._seen(layer, dims) + with_count
                starts = origin + tile.positions_in_seen(slice(row)) * width
                entries = tile.positions_in_seen(dims)
                sources.append((starts[:, None] + entries).flatten())
                owners.append(mine.repeat_interleave(len(entries)))
                is_input.append(torch.full((len(mine) * len(entries),), with_count))
                if with_count:
                    ends.append(starts + width - 1)  # where the numbers of rows stand
                shapes.append((*tile.shape[:row], len(entries)))
                origin += self._seen(layer, slice(row)) * width
        self._sources = torch.cat(sources).to(self.device)
        self._owners = torch.cat(owners).to(self.device)
        self._is_input = torch.cat(is_input).to(self.device)
        self._row_counts = torch.cat(ends).to(self.device)
        return shapes

    @staticmethod
    def _seen(layer: Layer, dims: slice) -> int:
        return math.prod(stop - start for start, stop in layer.tile.seen[dims])

    def local_sums(self) -> list[Tensor]:
        """What this rank's layers have summed since they were reset."""
        sums = []
        for layer in self.layers:
            assert layer.tapped is not None, "averages are of layers that are tapped"
            sums.append(layer.tapped.input_sum.to(self.count.dtype))
            if self.with_outputs:
                sums.append(layer.tapped.output_sum.to(self.count.dtype))
        return sums

    def update_(self, decay: Tensor, output_divisor: Tensor, taken: Tensor | None) -> None:
        """Add a batch: one all-reduce.

        Args:
            decay: Weight of the old values, ``(layers,)``.
            output_divisor: By what sums of gradients over all ranks are divided, ``(layers,)``.
            taken: Whether the batch counts, 0-dim bool; None where the host knows that it does.
        """
        decay, output_divisor = (
            value.to(self.count.dtype)[self._layer_of] for value in (decay, output_divisor)
        )
        sums = torch.cat(
            [t.reshape(-1) for t in all_reduce_together(self.local_sums(), self.group)]
        )
        self.rows = sums[self._row_counts]
        divisor = torch.where(self._is_input, self.rows[self._owners], output_divisor[self._owners])
        owners = self._owners
        new = sums[self._sources] / divisor
        counted = self.rows if taken is None else torch.where(taken, self.rows, 0)
        running_average_(self._flat, new, self.count[owners], counted[owners], decay[owners])
        self.count += counted > 0


def averages_of(layers: Sequence[Layer], *, with_outputs: bool) -> list[Averages]:
    """The averages of all ``layers``, by token group and dtype, in the order of the layers."""
    bunches: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        bunches[layer.tile.token_group, layer.dtype].append(layer)
    return [Averages(bunch, with_outputs=with_outputs) for bunch in bunches.values()]
