"""Whether the name of a data set is a path that is not there; asked before torch is imported."""

import difflib
import os
from pathlib import Path

PYTHON_STDLIB = "python_stdlib"
"""The source text of this Python's own standard library: real text on every machine."""

DIGITS = "digits"
"""scikit-learn's handwritten digits: real images on every machine."""

DIGITS_TUNING = "digits_tuning"
"""The digits without their test part: settings are chosen on the last 20% of what remains."""

ALL_DIGITS = (DIGITS, DIGITS_TUNING)

DEFAULT_IMAGE_SIZE = 224
"""Edge in pixels of images from disk, where nothing else is wanted."""


def missing_path(source: str) -> str | None:
    """What is wrong with ``source`` if it is meant as a path and nothing is there, else None."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (pathlib's raises for unknown users)
    if path.exists() and not (path.is_file() or path.is_dir()):
        return "a pipe, socket or device, expected a file or folder"
    if path.exists() or not _is_meant_as_path(source, path):
        return None
    return f"no such file or folder{nearest_path(path)}"


def _is_meant_as_path(source: str, path: Path) -> bool:
    """Whether ``source``, which does not exist here, cannot be a name on the hub."""
    name = source.partition(":")[0]
    if source.startswith((".", "/", "~")) or name.count("/") > 1:
        return True
    # Versions as in "name-v1.1" are no file suffixes.
    has_suffix = Path(name).suffix[1:].isalpha()
    return has_suffix or ("/" in name and path.parent.is_dir())


def nearest_path(path: Path) -> str:
    """A question that names what may have been meant, or nothing."""
    in_folder = {str(entry): entry for entry in _entries(path.parent)}
    close = difflib.get_close_matches(str(path), [*in_folder, PYTHON_STDLIB], n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _entries(folder: Path) -> list[Path]:
    """What lies in ``folder``; nothing if it is not there."""
    return list(folder.iterdir()) if folder.is_dir() else []
