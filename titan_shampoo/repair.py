"""Refreshes that fail: what is not finite is not taken, counted, named once, repeated in float64.

State is that of stacks of blocks, named tensors ``(n, ...)``. Among them are ``refreshes``, how
many of a block have been taken, and ``failures``, how many have failed in a row.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


def put_(state: State, chosen: Tensor, new: State, where: Tensor) -> None:
    """Put new state of some blocks into its place.

    Args:
        state: Of a stack; keeps its dtypes.
        chosen: Positions of the blocks, ``(k,)`` int64.
        new: Their new state, ``(k, ...)``.
        where: Which of them take it, ``(k,)`` bool.
    """
    for name, value in new.items():
        mask = where.view(-1, *[1] * (value.ndim - 1))
        state[name][chosen] = torch.where(mask, value.to(state[name].dtype), state[name][chosen])


def take_(state: State, chosen: Tensor, new: State, allowed: Tensor | None = None) -> Tensor:
    """Take a refresh of some blocks where all of it is finite; returns how many failed, 0-dim.

    Args:
        state: As for :func:`put_`, and so are ``chosen`` and ``new``.
        chosen: Positions.
        new: What the refresh gave.
        allowed: Which blocks may change at all, ``(k,)`` or ``()`` bool; None for all.
    """
    finite = _finite(state, chosen, new)
    good = finite if allowed is None else finite & allowed
    failed = ~finite if allowed is None else ~finite & allowed
    put_(state, chosen, new, good)
    state["refreshes"][chosen] += good
    failures = state["failures"]
    failures[chosen] = torch.where(good, 0, failures[chosen] + failed)
    return failed.sum()


def _finite(state: State, chosen: Tensor, new: State) -> Tensor:
    """Which blocks are finite in the dtypes that they are kept in, ``(k,)``."""
    finite = torch.ones_like(chosen, dtype=torch.bool)
    for name, value in new.items():
        kept = value.to(state[name].dtype).isfinite()
        finite &= kept.flatten(1).all(1) if kept.ndim > 1 else kept
    return finite


def worst_failure(stacks: Sequence[State], device: torch.device) -> Tensor:
    """Largest number of refreshes in a row that failed for any block here, 0-dim."""
    counts = [state["failures"].max().float() for state in stacks]
    return torch.stack([torch.zeros((), device=device), *counts]).max()


class Repairs:
    """Repeats failed refreshes of the blocks of one optimizer on this rank.

    Args:
        name_of: Name of a block, by numbers of its stack and of its place in it.
        refresh: A refresh of blocks of a stack: its number, their state in float64, their
            positions.
    """

    def __init__(
        self,
        name_of: Callable[[int, int], str],
        refresh: Callable[[int, State, Tensor], State],
    ) -> None:
        self._name_of, self._refresh = name_of, refresh
        self._named: set[str] = set()

    @torch.no_grad()
    def repeat(self, stacks: Sequence[State]) -> list[str]:
        """Repeat what failed in float64; returns what is to be said, each block once.

        No communication: every rank sees to its own blocks.
        """
        said = []
        for number, state in enumerate(stacks):
            failing = state["failures"].nonzero().flatten()
            if not len(failing):
                continue
            names = {self._name_of(number, position): None for position in failing.tolist()}
            said += [f"{name}: a refresh failed; the last good one is kept, and it is repeated in "
                     "float64" for name in names if name not in self._named]  # fmt: skip
            self._named.update(names)
            wide = {name: value[failing].double() for name, value in state.items()}
            new = self._refresh(number, wide, failing)
            good = _finite(state, failing, new)
            put_(state, failing, new, good)
            state["refreshes"][failing] += good
            # A repetition is no refresh of its own: it mends a failure or leaves it as it was.
            state["failures"][failing] = torch.where(good, 0, state["failures"][failing])
        return said
