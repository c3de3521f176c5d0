"""Check for a data set path that does not exist; made before torch is imported."""

import difflib
from pathlib import Path

PYTHON_STDLIB = "python_stdlib"
"""The source text of this Python's own standard library: real text on every machine."""

DIGITS = "digits"
"""scikit-learn's handwritten digits: real images on every machine."""

DIGITS_TUNING = "digits_tuning"
"""The digits without their test part; the last 20% of the rest serve to choose settings."""

ALL_DIGITS = (DIGITS, DIGITS_TUNING)

DEFAULT_IMAGE_SIZE = 224
"""Edge in pixels of images from disk, by default."""


def missing_path(source: str) -> str | None:
    """Reason why ``source`` holds no data if it is meant as a path; None if it may hold some."""
    if "\0" in source:
        return "has NUL, which neither paths nor names of data sets have"
    try:
        path = Path(source).expanduser()
        if path.is_file() or path.is_dir():
            return None
        if path.exists():
            return "is neither a file nor a folder"
        if path.is_symlink():
            return f"is a link that leads nowhere: {path.readlink()}"
        if not _is_meant_as_path(source, path):
            return None
        return f"no such file or folder{nearest_path(path)}"
    except OSError as error:
        return f"cannot be looked for: {error.strerror}"
    except RuntimeError as error:  # the home of a user who does not exist
        return str(error)


def _is_meant_as_path(source: str, path: Path) -> bool:
    """True if ``source``, which does not exist here, cannot be a name on the hub."""
    name = source.partition(":")[0]
    if source.startswith((".", "/", "~")) or name.count("/") > 1:
        return True
    # A suffix with a digit, as in "name-v1.1", is a version.
    has_suffix = Path(name).suffix[1:].isalpha()
    return has_suffix or ("/" in name and path.parent.is_dir())


def is_folder(source: str) -> bool:
    """True if ``source`` is the path of a folder."""
    return missing_path(source) is None and Path(source).expanduser().is_dir()


def nearest_path(path: Path) -> str:
    """A question with the most similar name, or an empty string."""
    in_folder = [str(entry) for entry in _entries(path.parent) if entry != path]
    close = difflib.get_close_matches(str(path), [*in_folder, PYTHON_STDLIB], n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _entries(folder: Path) -> list[Path]:
    """Content of ``folder``; empty if it does not exist."""
    return list(folder.iterdir()) if folder.is_dir() else []
