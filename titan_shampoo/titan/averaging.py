"""Exponential moving average of the weights, which often generalises better than the weights.

``average <- decay * average + (1 - decay) * weights`` after every step (Polyak and Juditsky 1992),
at first with a smaller decay ``(1 + step) / (10 + step)``, so that the random start is forgotten.
Running statistics of batch norm are averaged too. Each rank averages the part that it stores.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_shampoo.statistics import reshard
from titan_shampoo.titan.initialization import unwrapped_name

KEY = "average"
"""Name of the average in a parameter's optimizer state."""


class AveragedWeights:
    """Averages of the parameters and saved floating-point buffers of ``model_parts``.

    Args:
        model_parts: Parts of the model on this rank, sharded and initialised.
        decay: Weight of the old average, at least 0 and below 1.
    """

    def __init__(self, model_parts: Iterable[nn.Module], decay: float) -> None:
        """Start from the present weights."""
        self._decay = decay
        self._model_parts = list(model_parts)
        self._weights = {
            unwrapped_name(name): tensor
            for part in self._model_parts
            for name, tensor in _saved_tensors(part)
        }
        self._averages = {name: w.detach().clone() for name, w in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after ``step``, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, weights = _locals(self._averages), _locals(self._weights)
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The live averages as ``<parameter>.average``, to load in place."""
        return {f"{name}.{KEY}": average for name, average in self._averages.items()}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Swap the averages into the model as weights inside this block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        reshard(self._model_parts)  # otherwise a gathered root would use the old weights
        for average, weight in zip(_locals(self._averages), _locals(self._weights), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def _saved_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = part.state_dict().keys()
    yield from part.named_parameters()
    for name, buffer in part.named_buffers():
        if name in saved and buffer.is_floating_point():
            yield name, buffer


def _locals(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors.values()]
