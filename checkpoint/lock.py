"""Only one run writes into a folder: a lock that the operating system frees with the process.

A second run is told who is there. So are the workers of a restart whose predecessors still live,
because their torchrun was killed: two of them would delete and overwrite each other's checkpoints.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from checkpoint.errors import CheckpointError

_logger = logging.getLogger(__name__)
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """Holds ``<folder>/.lock`` until it is released or the process ends, however it ends."""

    def __init__(self, folder: Path, *, patience: float = 0.0) -> None:
        """Take the lock.

        Args:
            folder: Made if it is not there.
            patience: Seconds to wait for a run that is about to end.

        Raises:
            CheckpointError: If another process has it, saying which.
        """
        path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO | None = path.open("a+b")
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be written to: {error.strerror}; set checkpoint.folder"
            ) from error
        deadline = time.monotonic() + patience
        while not self._try(path):
            if time.monotonic() >= deadline:
                holder = _holder(self._file)
                self._file.close()
                raise CheckpointError(
                    f"{folder}: another run writes here ({holder}); end it, or set "
                    "checkpoint.folder or job.dump_folder"
                )
            time.sleep(0.2)
        self._sign()
        # Forked helpers, such as loaders of data, may outlive a run that is killed.
        mine = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _release(mine()))

    def release(self) -> None:
        """Let others in; the second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _try(self, path: Path) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise CheckpointError(f"{path}: cannot be locked: {error.strerror}") from error
            _logger.warning("%s: no locks on this file system; start no second run here", path)
        return True

    def _sign(self) -> None:
        assert self._file is not None
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        self._file.truncate(0)
        self._file.write(json.dumps(holder).encode())
        self._file.flush()


def _release(lock: FolderLock | None) -> None:
    if lock is not None:
        lock.release()


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        found = json.loads(file.read())
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has not said which"
