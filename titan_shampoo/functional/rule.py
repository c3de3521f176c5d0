"""What the engine asks of a method: a few functions on stacks of equal blocks.

A rule is mathematics only. The engine decides which blocks it sees and when; options come from the
parameter group at every call, so that schedules and users may change them between steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Named tensors of a stack of blocks, ``(n, ...)`` each."""

CONDITION = "condition"
"""What a refresh says of a block beside its new state: the condition number of its worst factor,
the largest over the smallest of its damped eigenvalues, ``(n, 1)``. Kept, but never saved."""


BEYOND = "beyond"
"""Which blocks had a direction that is beyond the range of its dtype, ``(n,)`` bool, where options
allow any: they rested. Kept until it is told, but never saved."""


class StateShape(NamedTuple):
    """One tensor of state per block."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    """Dim of the block that a matrix belongs to; None for state of the block's own shape."""
    extent: int = 0
    """Rows and columns of that matrix; it is packed if ``shape`` has one dim."""
    starts_as_identity: bool = False
    """Whether a matrix starts as the identity and not at zero."""
    dtype_option: str = "factor_dtype"
    """Option that sets the dtype; that of the arithmetic where it is None."""


class Clock(NamedTuple):
    """Where each block of a stack is in its own time."""

    step: Tensor
    """Step of each block, counted from 1, ``(n,)`` int64; skipped ones do not count."""
    ready: Tensor | bool
    """Which blocks have been refreshed once, ``(n,)`` bool, or one answer for all."""
    starts_at_one: Tensor
    """Which blocks are refreshed in their very first step, ``(n,)`` bool."""
    measured: Tensor | None = None
    """Positions of the blocks whose factors take this gradient, ``(k,)`` int64; None for all."""
    taken: Tensor | None = None
    """Whether this step is taken, 0-dim bool on the device; None where the host knows it is."""

    def rate(self, beta: float, like: Tensor) -> float | Tensor:
        """Weight of the newest value in an average with decay ``beta``; 0 if it is not taken."""
        return 1 - beta if self.taken is None else like.new_full((), 1 - beta) * self.taken


class Rule(Protocol):
    """A second-order method for blocks."""

    name: str
    rests_at_first: bool
    """Whether a block that is refreshed in its very first step is not moved by it."""

    def state_shapes(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[StateShape]:
        """State of one block of ``shape``."""

    def cost(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[float, float]:
        """Floating-point operations (in every step, in a refresh) for one block of ``shape``."""

    def accumulate_(
        self, state: State, grad: Tensor, clock: Clock, options: Mapping[str, Any]
    ) -> None:
        """Add the gradient to the factors."""

    def refresh(
        self,
        state: State,
        due: Tensor,
        clock: Clock,
        shape: tuple[int, ...],
        options: Mapping[str, Any],
    ) -> State:
        """New roots or bases of the blocks at ``due``, and their condition numbers.

        What is not finite is not taken.
        """

    def direction(
        self,
        state: State,
        grad: Tensor,
        clock: Clock,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Direction of each block, ``(n, *block)``; may be written into the gradient."""


def worst(conditions: Sequence[Tensor]) -> State:
    """The largest of the condition numbers ``(n, 1)`` of the factors of each block; {} of none."""
    return {CONDITION: torch.cat(list(conditions), 1).amax(1, keepdim=True)} if conditions else {}


def power(base: float, exponents: Tensor, like: Tensor) -> Tensor:
    """``base ** exponents`` in double precision, ``(n, 1, ...)`` as ``like`` wants it."""
    return per_block(torch.pow(base, exponents.double()), like).to(like.dtype)


def bias_correction(beta: float, count: Tensor, like: Tensor) -> Tensor:
    """``1 - beta^count`` in double precision, ``(n, 1, ...)``; 1 where nothing was averaged yet."""
    correction = 1 - torch.pow(beta, count.clamp(min=1).double())
    return per_block(correction, like).to(like.dtype)


def per_block(values: Tensor, like: Tensor) -> Tensor:
    """``(n,)`` as ``(n, 1, ...)`` with as many dims as ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))
