"""Files that a run writes, never through a link: another user could have put the link there."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def open_own(path: Path, flags: int) -> int:
    """Open a regular file with a single name, created if missing, and return its descriptor.

    Args:
        path: Links in its folders are followed: who can write to those can do worse.
        flags: Flags of ``os.open``; not ``O_TRUNC``, which would act before the file is checked.

    Raises:
        OSError: If it cannot be opened, or is a link or not a regular file.
    """
    try:
        # O_NONBLOCK: a pipe would otherwise wait for its other end.
        own = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags | own, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads
            raise _refused(path) from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _refused(path)
    return descriptor


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that replaces ``path``, even a link, if the block succeeds."""
    written = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with written.open("xb") as file:
            yield file
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def _refused(path: Path) -> OSError:
    reason = "a link or not a regular file, which is not written to; remove it"
    return OSError(errno.ELOOP, reason, str(path))
