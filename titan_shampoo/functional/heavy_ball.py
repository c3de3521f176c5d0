"""Heavy ball on directions of rank-one methods, with the correction of rank one fused into it.

``B <- mu B + (1 - d) (P + w W)`` and ``W <- W - lr B``. A direction ``P = f G - left right^T``
enters its buffer in two passes over it and one over the gradient, and is stored only where it must
be: then ``functional.descent`` does the rest.
"""

from typing import NamedTuple

from torch import Tensor

from titan_shampoo.functional.descent import Rates, add_scaled_


class Motion(NamedTuple):
    """How directions move the parameters of one group."""

    rates: Rates
    dampening: float
    nesterov: bool
    has_ball: bool

    @property
    def keep(self) -> float:
        """Share of the direction that is used: all of it without a heavy ball."""
        return 1 - self.dampening if self.has_ball else 1.0

    def fuses(self, buffer: Tensor | None, grad: Tensor) -> bool:
        """Whether the direction can enter the buffer without being stored."""
        return buffer is not None and not self.nesterov and buffer.dtype == grad.dtype


def rank_one_(
    target: Tensor,
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    factor: Tensor,
    *,
    beta: float | Tensor,
) -> Tensor:
    """``target <- beta target + factor grad - left right^T``, in place.

    Args:
        target: ``(rows, columns)``, or a stack ``(n, rows, columns)``, and then everything with
            ``n`` in front; not read if ``beta`` is the number 0.
        grad: ``(rows, columns)``.
        left: ``(rows,)``, all factors included.
        right: ``(columns,)``.
        factor: 0-dim.
        beta: At least zero; a pass more where only the device knows it.
    """
    if isinstance(beta, Tensor):
        target.mul_(beta)
        beta = 1.0
    if target.dim() == 3:
        target.baddbmm_(left[..., None], right[..., None, :], beta=beta, alpha=-1)
        return target.addcmul_(grad, factor[..., None, None])
    return target.addr_(left, right, beta=beta, alpha=-1).addcmul_(grad, factor)


def move_by_buffers_(params: list[Tensor], buffers: list[Tensor], motion: Motion) -> None:
    """The rest of a step whose directions have entered their buffers already."""
    if not params:
        return
    decay = motion.rates.decay
    if isinstance(decay, Tensor) or decay:
        add_scaled_(buffers, params, decay * motion.keep)
    add_scaled_(params, buffers, -motion.rates.lr)
