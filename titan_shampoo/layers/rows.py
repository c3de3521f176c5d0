"""Which rows of a table of scalars are whose: one for each layer, of a stack for each matrix."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from titan_shampoo.layers.bunches import Bunch
from titan_shampoo.layers.layer import Layer


class RowsOfLayers:
    """The rows of a table with four scalars for each layer, which are the same on all ranks.

    Args:
        layers: In the order of the rows.
        device: Of the table.
    """

    of_layer: list[int | slice]
    """Of each layer: its row, or those of a stack."""
    counts_here: Tensor
    """Which entries this rank contributes to sums over the ranks of a layer, ``(rows, 4)``."""

    def __init__(self, layers: Sequence[Layer | Bunch], device: torch.device) -> None:
        numbers = [layer.num_matrices for layer in layers]
        starts = [0, *itertools.accumulate(numbers)]
        self._size = starts[-1]
        self._has_stacks = any(layer.batch_dims for layer in layers)
        self.of_layer, self._here = [], []
        counts, places, origin = [], [], 0
        for layer, start, number in zip(layers, starts, numbers, strict=False):
            here = layer.matrices_here
            mine = slice(start + here.start, start + here.stop)
            self.of_layer.append(slice(start, start + number) if layer.batch_dims else start)
            self._here.append(mine if layer.batch_dims else start)
            is_here = torch.zeros(number, dtype=torch.bool)
            is_here[here.start : here.stop] = True
            counts.append(is_here[:, None] & torch.tensor([True, True, *layer.tile.is_first]))
            place = torch.full((number, 4), -1)  # the zero behind all
            place[is_here] = (origin + torch.arange(4 * len(here))).view(4, len(here)).T
            places.append(place)
            origin += 4 * len(here)
        self.counts_here = torch.cat(counts).to(device)
        every = torch.cat(places)
        self._places = every.where(every >= 0, origin).to(device)
        self._layer_of = torch.arange(len(layers)).repeat_interleave(torch.tensor(numbers))
        self._layer_of = self._layer_of.to(device)

    def __len__(self) -> int:
        """Number of rows."""
        return self._size

    def spread(self, values: Tensor) -> Tensor:
        """What there is of each layer, ``(layers,)``, for each row, ``(rows,)``."""
        return values[self._layer_of] if self._has_stacks else values

    def table(self, scalars: Sequence[Tensor]) -> Tensor:
        """The rows of four scalars each, ``(rows, 4)``; zero for matrices that are not here.

        Args:
            scalars: Four for each layer, of no dims, or ``(matrices here,)`` of a stack.
        """
        if not self._has_stacks:
            return torch.stack(list(scalars)).view(-1, 4)
        flat = [scalar.reshape(-1) for scalar in scalars]
        return torch.cat([*flat, flat[0].new_zeros(1)])[self._places]

    def of_layers_here(self, values: Tensor) -> Sequence[Tensor]:
        """Of values for each row those of each layer, of no dims, or ``(matrices here,)``."""
        if not self._has_stacks:
            return values.unbind()
        return [values[rows] for rows in self._here]
