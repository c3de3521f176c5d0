"""Walks over folders: links are followed, loops and special files (sockets, pipes) are not."""

import errno
import logging
import os
import stat
from collections.abc import Container, Iterator
from pathlib import Path

from titan_shampoo.data import DataError, printable

__all__ = ["no_file", "walk"]

_logger = logging.getLogger(__name__)


def walk(
    root: Path, *, without: Container[str] = (), follow: bool = True
) -> Iterator[tuple[str, list[str]]]:
    """Every folder from ``root`` down, with the sorted names of everything in it but folders.

    Hidden entries are left out. A link to a folder is followed, unless it leads back to a folder
    above it.

    Args:
        root: An existing folder.
        without: Names of folders to leave out.
        follow: True to follow links to folders; False to leave them out.

    Raises:
        DataError: If a folder cannot be read.
    """
    loops = []
    above = tuple(_identity(str(parent)) for parent in root.resolve().parents)
    waiting = [(str(root), above)]
    while waiting:
        folder, above = waiting.pop()
        try:
            here = _identity(folder)
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
        if here in above:
            loops.append(folder)
            continue
        shown = [(entry, _is_folder(entry, follow)) for entry in entries if entry.name[0] != "."]
        yield folder, [entry.name for entry, is_folder in shown if not is_folder]
        folders = [entry for entry, is_folder in shown if is_folder and entry.name not in without]
        waiting += [(entry.path, (*above, here)) for entry in reversed(folders)]
    if loops:
        message = "%s: did not follow %d links that lead back to a folder above them, first %s"
        _logger.warning(message, printable(root), len(loops), printable(loops[0]))


def _identity(folder: str) -> tuple[int, int]:
    """Device and inode, equal for all paths to a folder."""
    status = os.stat(folder)  # noqa: PTH116 (there may be many, and links are followed)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str], follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:  # a link to itself
        return False


def no_file(path: Path) -> str | None:
    """Reason why ``path`` cannot be read as a file; None if it can."""
    try:
        status = path.stat()
    except OSError as error:
        return (
            f"link that leads nowhere ({error.strerror})" if path.is_symlink() else error.strerror
        )
    if stat.S_ISDIR(status.st_mode):
        return "link to a folder, not followed"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"
    return None if os.access(path, os.R_OK) else os.strerror(errno.EACCES)
