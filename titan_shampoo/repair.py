"""Failed refreshes: kept out of the state, counted, reported once, and repeated in float64.

State belongs to stacks of blocks: named tensors ``(n, ...)``. Among them are ``refreshes``, the
number of successful refreshes of a block, and ``failures``, the number of failures in a row.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


def put_(state: State, chosen: Tensor, new: State, where: Tensor) -> None:
    """Write new state of some blocks to its place.

    Args:
        state: State of a stack; dtypes do not change.
        chosen: Positions of the blocks, ``(k,)`` int64.
        new: New state of these blocks, ``(k, ...)``.
        where: True for blocks to write, ``(k,)`` bool.
    """
    for name, value in new.items():
        mask = where.view(-1, *[1] * (value.ndim - 1))
        state[name][chosen] = torch.where(mask, value.to(state[name].dtype), state[name][chosen])


def take_(state: State, chosen: Tensor, new: State, allowed: Tensor | None = None) -> Tensor:
    """Write refreshed state of the blocks where it is finite; return the number of failures, 0-dim.

    Args:
        state: As in :func:`put_`.
        chosen: As in :func:`put_`.
        new: Result of the refresh.
        allowed: True for blocks that may change at all, ``(k,)`` or ``()`` bool; None for all.
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
    """True for blocks whose new state is finite in the dtypes of the state, ``(k,)``."""
    finite = torch.ones_like(chosen, dtype=torch.bool)
    for name, value in new.items():
        kept = value.to(state[name].dtype).isfinite()
        finite &= kept.flatten(1).all(1) if kept.ndim > 1 else kept
    return finite


def worst_failure(stacks: Sequence[State], device: torch.device) -> Tensor:
    """Largest number of failed refreshes in a row over the blocks of this rank, 0-dim."""
    counts = [state["failures"].max().float() for state in stacks]
    return torch.stack([torch.zeros((), device=device), *counts]).max()


class Repairs:
    """Repeats failed refreshes of the blocks of one optimizer on this rank.

    Args:
        name_of: Takes the number of a stack and a position in it; returns the name of the block.
        refresh: Takes the number of a stack, state in float64 and positions; refreshes the blocks.
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
        """Repeat failed refreshes in float64; return warnings, one per block in all.

        No communication: every rank repeats its own blocks.
        """
        said = []
        for number, state in enumerate(stacks):
            failing = state["failures"].nonzero().flatten()
            if not len(failing):
                continue
            names = {self._name_of(number, position): None for position in failing.tolist()}
            said += [f"{name}: a refresh failed and is repeated in float64; the last good one "
                     "stays in use" for name in names if name not in self._named]  # fmt: skip
            self._named.update(names)
            wide = {name: value[failing].double() for name, value in state.items()}
            new = self._refresh(number, wide, failing)
            good = _finite(state, failing, new)
            put_(state, failing, new, good)
            state["refreshes"][failing] += good
            # A repetition does not count as a refresh: it clears the failure or leaves it.
            state["failures"][failing] = torch.where(good, 0, state["failures"][failing])
        return said
