"""Copies of saved state, and their comparison bit for bit."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def copied_state(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """All state of all parameters in a state dict, copied, as ``"<number>.<name>"``."""
    return {
        f"{index}.{key}": value.clone()
        for index, state in saved["state"].items()
        for key, value in state.items()
        if key != "blocks"  # whose saved form has the step of the schedule
    }


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
