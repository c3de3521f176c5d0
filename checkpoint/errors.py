"""What can be wrong with checkpoints, in one line that names the path."""

from torch.distributed.checkpoint.api import CheckpointException

from titan_shampoo.config import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that the settings name cannot be used, or not be written."""


def in_one_line(path: object, problem: str, cause: BaseException) -> CheckpointError:
    """Return ``path: problem: cause``, with the first failed rank's cause if several failed."""
    if isinstance(cause, CheckpointException) and cause.failures:
        rank, (cause, _) = min(cause.failures.items())
        problem = f"{problem} (rank {rank})"
    lines = str(cause).strip().splitlines() or ["no reason given"]
    return CheckpointError(f"{path}: {problem}: {type(cause).__name__}: {lines[0]}")
