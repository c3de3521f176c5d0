"""What can be wrong with checkpoints, in one line that names the path."""

from pathlib import Path

from titan_shampoo.config.errors import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that the settings name cannot be used, or not be written."""


class UnreadableError(CheckpointError):
    """What the file system does not give: it may be good, and nobody may call it damaged."""


class MissingFileError(CheckpointError):
    """A file of a checkpoint is not there, as seen from one machine; its path is the argument."""

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.args[0])

    def __str__(self) -> str:
        return f"{self.path}: missing"


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
