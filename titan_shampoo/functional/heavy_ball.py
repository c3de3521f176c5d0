"""Heavy ball on directions, with the correction of rank one fused into it.

``B <- mu B + (1 - d) (P + w W)`` and ``W <- W - lr B``; Nesterov's form moves by ``(1 - d) (P +
w W) + mu B`` instead. Directions of rank-one methods, ``P = f G - left right^T``, enter their
buffer in two passes over it and one over the gradient, and are stored only where they must be.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Motion(NamedTuple):
    """How directions move parameters; numbers of one parameter group."""

    lr: float
    momentum: float
    dampening: float
    nesterov: bool
    decay: float
    """Weight ``w`` of the parameter in its direction."""

    @property
    def keep(self) -> float:
        """Share of the direction that is used: all of it without a heavy ball."""
        return 1 - self.dampening if self.momentum else 1.0

    def fuses(self, buffer: Tensor | None, grad: Tensor) -> bool:
        """Whether the direction can enter the buffer without being stored."""
        return buffer is not None and not self.nesterov and buffer.dtype == grad.dtype


def rank_one_(
    target: Tensor, grad: Tensor, left: Tensor, right: Tensor, factor: Tensor, *, beta: float
) -> Tensor:
    """``target <- beta target + factor grad - left right^T``, in place.

    Args:
        target: ``(rows, columns)``; not read if ``beta`` is 0.
        grad: ``(rows, columns)``.
        left: ``(rows,)``, all factors included.
        right: ``(columns,)``.
        factor: 0-dim.
        beta: At least zero.
    """
    return target.addr_(left, right, beta=beta, alpha=-1).addcmul_(grad, factor)


def move_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    motion: Motion,
) -> None:
    """Move parameters by ``directions``, which are changed; ``buffers`` only with momentum."""
    steps = list(directions)
    if not steps:
        return
    if motion.decay:
        torch._foreach_add_(steps, list(params), alpha=motion.decay)
    if motion.momentum:
        torch._foreach_mul_(steps, motion.keep)
        torch._foreach_mul_(list(buffers), motion.momentum)
        torch._foreach_add_(list(buffers), steps)
        if motion.nesterov:
            torch._foreach_add_(steps, list(buffers), alpha=motion.momentum)
        else:
            steps = list(buffers)
    torch._foreach_add_(list(params), steps, alpha=-motion.lr)


def move_by_buffers_(params: Sequence[Tensor], buffers: Sequence[Tensor], motion: Motion) -> None:
    """The rest of a step whose directions have entered their buffers already."""
    if not params:
        return
    if motion.decay:
        torch._foreach_add_(list(buffers), list(params), alpha=motion.keep * motion.decay)
    torch._foreach_add_(list(params), list(buffers), alpha=-motion.lr)
