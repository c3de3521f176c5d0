"""Copies of the state in CPU memory, so that training goes on while they are written.

A copy from a GPU to page-locked memory is several times as fast, and the host does not wait for it.
The copies are enqueued after the finished step and before the changes of the next one; the thread
that writes waits for them.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_shampoo.distributed.state import BlockTensor

Chunks = dict[tuple[int, ...], Tensor]


class Staging:
    """Copies states to the same memory every time: the last copies must no longer be in use.

    Args:
        pinned: True to copy from a GPU to page-locked memory, without a wait of the host.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._kept: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Copies of some tensors, and a function that waits until they are complete."""
        copies: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            chunks = {at: self._copied(key, at, t) for at, t in local_chunks(tensor).items()}
            copies[key] = BlockTensor(tuple(tensor.shape), chunks, tensor.dtype)
        if not self._pinned:
            return copies, lambda: None
        copied = torch.Event()
        copied.record()
        return copies, copied.synchronize

    def _copied(self, key: str, at: tuple[int, ...], chunk: Tensor) -> Tensor:
        chunk = chunk.detach()
        locked = self._pinned and chunk.device.type != "cpu"
        kept = self._kept.get((key, at))
        if kept is None or kept.shape != chunk.shape or kept.dtype != chunk.dtype:
            kept = torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=locked)
            self._kept[key, at] = kept
        return kept.copy_(chunk, non_blocking=locked)


def local_chunks(tensor: Tensor) -> Chunks:
    """This rank's parts of a global tensor by their first index."""
    if isinstance(tensor, BlockTensor):
        return tensor.chunks
    if not isinstance(tensor, DTensor):
        return {(0,) * tensor.ndim: tensor} if tensor.numel() else {}
    local = tensor.to_local()
    _, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return {tuple(start): local} if local.numel() else {}
