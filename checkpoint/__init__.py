"""Checkpoints of a run: save, verify, resume, convert.

The manager is imported on first use: ``python -m checkpoint verify`` must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from checkpoint.manager import CheckpointManager

__all__ = ["CheckpointError", "CheckpointManager"]


def __getattr__(name: str) -> object:
    """The manager, imported now because it needs torch."""
    if name != "CheckpointManager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("checkpoint.manager").CheckpointManager
