"""Only one run writes into a folder: a lock that the operating system frees with the process.

A second run is told who is there. So are the workers of a restart whose predecessors still live,
because their torchrun was killed: two of them would delete and overwrite each other's files.
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
    """Holds a file in a folder until it is released or the process ends, however it ends."""

    error: type[ConfigError] = ConfigError
    """Class of the errors that are raised."""
    remedy = "set job.dump_folder"
    """Advice to those who are kept out."""

    def __init__(self, folder: Path, *, name: str = ".lock", patience: float | None = None) -> None:
        """Take the lock.

        Args:
            folder: Made if it is not there.
            name: Of the file.
            patience: Seconds to wait for a run that is about to end; None means some in an attempt
                of torchrun after the first, whose predecessor may not be gone, and else none.

        Raises:
            ConfigError: If another process has it, saying which.
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
        # Forked helpers, such as loaders of data, may outlive a run that is killed.
        mine = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _release(mine()))

    def is_held(self) -> bool:
        """Return whether the file that was locked is still the one that others find here.

        It is not if the file or the folder was deleted, or put in place of the old one: another run
        may have the new one.
        """
        if self._descriptor < 0:
            return False
        try:
            mine, there = os.fstat(self._descriptor), self._path.lstat()
        except OSError as error:  # of another kind, it says nothing about the file
            return error.errno not in _GONE
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def release(self) -> None:
        """Let others in; the second call does nothing."""
        self._close()
        self._descriptor = -1

    def _try(self) -> bool:
        """Open the file anew, for another run may have removed it, and lock it."""
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
            told = f"process {found['pid']} on {found['host']} since {found['since']}"
        except (ValueError, KeyError, TypeError):
            return "it has not said which"
        return told if told.isprintable() else "it has not said which"


def _release(lock: FolderLock | None) -> None:
    if lock is not None:
        lock.release()
