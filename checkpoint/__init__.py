"""What a run saves and how it resumes."""

from checkpoint.errors import CheckpointError
from checkpoint.manager import CheckpointManager

__all__ = ["CheckpointError", "CheckpointManager"]
