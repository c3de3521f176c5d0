"""What the engine asks of a method: a few functions on stacks of equal blocks.

A rule is mathematics only. The engine decides which blocks it sees and when; options come from the
parameter group at every call, so that schedules and users may change them between steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Named tensors of a stack of blocks, ``(n, ...)`` each."""


class StateShape(NamedTuple):
    """One tensor of state per block."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    """Dim of the block that a factor belongs to; None for state of the block's own shape."""
    starts_as_identity: bool = False
    """Whether a factor starts as the identity and not at zero."""


class Clock(NamedTuple):
    """Where each block of a stack is in its own time."""

    step: Tensor
    """Step of each block, counted from 1, ``(n,)`` int64."""
    ready: Tensor | bool
    """Which blocks have been refreshed once, ``(n,)`` bool, or one answer for all."""
    starts_at_one: Tensor
    """Which blocks are refreshed in their very first step, ``(n,)`` bool."""


class Rule(Protocol):
    """A second-order method for blocks."""

    name: str
    rests_at_first: bool
    """Whether a parameter that is refreshed in its very first step is not moved by it at all."""

    def state_shapes(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[StateShape]:
        """State of one block of ``shape``."""

    def cost(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[float, float]:
        """Floating-point operations (in every step, in a refresh) for one block of ``shape``."""

    def accumulate_(
        self, state: State, grad: Tensor, step: Tensor, options: Mapping[str, Any]
    ) -> None:
        """Add the gradient to the statistics."""

    def refresh(
        self,
        state: State,
        due: Tensor,
        clock: Clock,
        shape: tuple[int, ...],
        options: Mapping[str, Any],
    ) -> State:
        """New roots or bases of the blocks at ``due``; what is not finite is not taken."""

    def direction(
        self,
        state: State,
        grad: Tensor,
        clock: Clock,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Direction of each block, ``(n, *block)``."""


def power(base: float, exponents: Tensor, like: Tensor) -> Tensor:
    """``base ** exponents`` in double precision, ``(n, 1, ...)`` as ``like`` wants it."""
    return per_block(torch.pow(base, exponents.double()), like).to(like.dtype)


def bias_correction(beta: float, step: Tensor, like: Tensor) -> Tensor:
    """``1 - beta^step`` in double precision, ``(n, 1, ...)`` as ``like`` wants it."""
    return per_block(1 - torch.pow(beta, step.double()), like).to(like.dtype)


def per_block(values: Tensor, like: Tensor) -> Tensor:
    """``(n,)`` as ``(n, 1, ...)`` with as many dims as ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))
