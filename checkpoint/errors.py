"""What can be wrong with checkpoints, in one line that names the path."""

from titan_shampoo.config.errors import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that the settings name cannot be used, or not be written."""


def in_one_line(path: object, problem: str, cause: BaseException) -> CheckpointError:
    """Return ``path: problem: cause``, with the first failed rank's cause if several failed."""
    failures = getattr(cause, "failures", None)  # torch.distributed.checkpoint's collective error
    rank = None
    if failures:
        rank, (cause, _) = min(failures.items())
    if isinstance(cause, CheckpointError):
        return cause
    where = problem if rank is None else f"{problem} (rank {rank})"
    lines = str(cause).strip().splitlines() or ["no reason given"]
    return CheckpointError(f"{path}: {where}: {type(cause).__name__}: {lines[0]}")
