"""Files that a run writes for itself, and never through a link: others may be able to plant one."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def open_own(path: Path, flags: int) -> int:
    """Open a regular file that has one name, made if it is not there, and return its descriptor.

    Args:
        path: Links in its folders are followed: who may write there may do worse.
        flags: Of ``os.open``; not ``O_TRUNC``, which would come before the look at the file.

    Raises:
        OSError: If it cannot be opened, or is a link or no regular file.
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
    """Give a new file, which takes the name ``path`` if the block ends well, link or not."""
    written = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with written.open("xb") as file:
            yield file
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def _refused(path: Path) -> OSError:
    reason = "a link, or no regular file, which is not written to; remove it"
    return OSError(errno.ELOOP, reason, str(path))
