"""Errors of checkpoints, each in one line with the path."""

from pathlib import Path

from titan_shampoo.config.errors import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint in the settings that cannot be used or written."""


class UnreadableError(CheckpointError):
    """A read error of the file system: the file may be good, so it must not count as damaged."""


class MissingFileError(CheckpointError):
    """A file that is missing as seen from one machine; its path is the argument."""

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.args[0])

    def __str__(self) -> str:
        return f"{self.path}: missing"


def in_one_line(path: object, problem: str, cause: BaseException) -> CheckpointError:
    """Return ``path: problem: cause``, with the first failed rank's cause if several failed."""
    failures = getattr(cause, "failures", None)  # collective error of torch.distributed.checkpoint
    rank = None
    if failures:
        rank, (cause, _) = min(failures.items())
    if isinstance(cause, CheckpointError):
        return cause
    where = problem if rank is None else f"{problem} (rank {rank})"
    lines = str(cause).strip().splitlines() or ["no reason given"]
    return CheckpointError(f"{path}: {where}: {type(cause).__name__}: {lines[0]}")
