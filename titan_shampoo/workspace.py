"""Memory that a step writes before it reads it, kept between steps where that is faster."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Workspace:
    """Uninitialised tensors for one step.

    On a CPU they are kept for the next step: the system clears fresh memory page by page, which
    costs as much as the element-wise arithmetic of a step. Allocators of accelerators keep memory
    themselves.

    Args:
        device: Device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, list[Tensor]] = {}

    def tensors(self, use: str, sizes: Iterable[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
        """One tensor of each size and dtype; the last ones for this ``use`` if they fit."""
        wanted = list(sizes)
        kept = self._kept.get(use, [])
        if [(tensor.shape, tensor.dtype) for tensor in kept] == wanted:
            return kept
        made = [torch.empty(size, dtype=dtype, device=self._device) for size, dtype in wanted]
        if self._device.type == "cpu":
            self._kept[use] = made
        return made
