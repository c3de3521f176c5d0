"""Lock of a folder that one run writes to; the operating system frees it with the process.

The error for a second run names the first one. Workers of a restart are refused as well while their
predecessors live, because their torchrun was killed: both would delete and overwrite the same
files.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from titan_shampoo.config.errors import ConfigError
from titan_shampoo.own_files import open_own

_logger = logging.getLogger(__name__)
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

_RESTART_PATIENCE = 20.0
"""Seconds that a restarted run waits for its predecessor's lock."""


class FolderLock:
    """Holds a file in a folder until it is released or the process ends in any way."""

    error: type[ConfigError] = ConfigError
    """Class of the errors."""
    remedy = "set job.dump_folder"
    """Advice in the error for a second run."""

    def __init__(self, folder: Path, *, name: str = ".lock", patience: float | None = None) -> None:
        """Take the lock.

        Args:
            folder: Created if missing.
            name: Name of the file.
            patience: Seconds to wait for a run that is about to end. None means 0, or a few seconds
                in a restart by torchrun, whose predecessor may still live.

        Raises:
            ConfigError: If another process holds it; names that process.
        """
        self._folder, self._path = folder, folder / name
        self._descriptor = -1
        self._close: Callable[[], object] = lambda: None
        if patience is None:
            restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
            patience = _RESTART_PATIENCE if restarted else 0.0
        deadline = time.monotonic() + patience
        while not self._try():
            if time.monotonic() >= deadline:
                holder = self._holder()
                self.release()
                raise self.error(
                    f"{folder}: another run writes here ({holder}); end it, or {self.remedy}"
                )
            time.sleep(0.2)
        self._sign()
        # Forked helpers, such as data loader workers, may outlive a run that is killed.
        mine = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _release(mine()))

    def is_held(self) -> bool:
        """Return whether the locked file is still the one at this path.

        It is not if the file or the folder was deleted or replaced: another run may hold the new
        one.
        """
        if self._descriptor < 0:
            return False
        try:
            mine, there = os.fstat(self._descriptor), self._path.lstat()
        except OSError as error:  # other errors say nothing about the file
            return error.errno not in _GONE
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def release(self) -> None:
        """Release the lock; the second call does nothing."""
        self._close()
        self._descriptor = -1

    def _try(self) -> bool:
        """Open the file again, since another run may have removed it, and lock it."""
        self.release()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_own(self._path, os.O_RDWR)
        except OSError as error:
            place = self._path if error.errno == errno.ELOOP else self._folder
            raise self.error(
                f"{place}: cannot be written to: {error.strerror}; {self.remedy}"
            ) from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise self.error(f"{self._path}: cannot be locked: {error.strerror}") from error
            _logger.warning(
                "%s: no locks on this file system; start no second run here", self._path
            )
        return self.is_held()

    def _sign(self) -> None:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _holder(self) -> str:
        try:
            found = json.loads(os.pread(self._descriptor, 4096, 0))
            holder = f"process {found['pid']} on {found['host']} since {found['since']}"
        except (ValueError, KeyError, TypeError):
            return "an unknown process"
        return holder if holder.isprintable() else "an unknown process"


def _release(lock: FolderLock | None) -> None:
    if lock is not None:
        lock.release()
