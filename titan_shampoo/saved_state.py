"""Saved state: what it must have in common with the optimizer, and loading it in place."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_FIXED_KEYS = ("params", "param_names", "method", "compile", "precondition")
"""Keys of a parameter group that a loaded state does not change."""

Groups = Sequence[Mapping[str, Any]]


def check_groups(groups: Groups, saved: Groups, shape_options: Sequence[str]) -> None:
    """Raise ValueError if saved parameter groups do not fit.

    Args:
        groups: Those of the optimizer.
        saved: Those of the state.
        shape_options: Options that give state its shape.
    """
    counts, others = [[len(group["params"]) for group in some] for some in (groups, saved)]
    if counts != others:
        raise ValueError(f"param_groups: the state has {others} parameters, wanted {counts}")
    for group, other in zip(groups, saved, strict=True):
        names = zip(group.get("param_names", ()), other.get("param_names", ()), strict=False)
        for mine, theirs in names:
            if mine != theirs:
                raise ValueError(f"{mine}: the state has {theirs!r} in its place")
        method, wanted = other.get("method"), group["method"]
        if method != wanted:
            raise ValueError(f"the state is of {_called(method)}, wanted {wanted!r}")
        for key in shape_options:
            if other[key] != group[key]:
                raise ValueError(f"{key}: the state has {other[key]!r}, got {group[key]!r}; "
                                 f"set {key} = {other[key]!r}")  # fmt: skip


def _called(method: str | None) -> str:
    return f"method {method!r}" if method else "an optimizer that is not one of titan_shampoo"


def load_options(groups: Sequence[dict[str, Any]], saved: Groups) -> None:
    """Take over the options of saved groups."""
    for group, other in zip(groups, saved, strict=True):
        group.update({key: value for key, value in other.items() if key not in _FIXED_KEYS})


def check_state(name: str, mine: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise ValueError if saved state does not fit a parameter."""
    if mine.keys() != other.keys():
        differing = sorted(mine.keys() ^ other.keys())
        raise ValueError(f"{name}: the state has {len(other)} entries, wanted {len(mine)}; "
                         f"differing: {', '.join(differing[:5])}")  # fmt: skip
    for key, value in mine.items():
        if value.shape != other[key].shape:
            raise ValueError(f"{name}: {key} of the state has shape {tuple(other[key].shape)}, "
                             f"wanted {tuple(value.shape)}")  # fmt: skip


def copy_state(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Copy saved state into live memory."""
    with torch.no_grad():
        for key, value in other.items():
            mine[key].copy_(value)


def has_begun(state: Mapping[str, Tensor]) -> bool:
    """Whether a parameter has state that is not what it is made with, for all that is known."""
    return bool(state.get("cursor", len(state)))
