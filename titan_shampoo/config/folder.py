"""Whether a run can write where it is told to; asked before anything is built."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from titan_shampoo.config.settings import Settings
from titan_shampoo.plot import METRICS_FILE, PLOT_FILE

_ROOM = 256
"""Characters of a path that are left to what is written below the folder of a run."""

_FOLDERS = {
    "checkpoint.enable": "checkpoint.folder",
    "metrics.enable_tensorboard": "metrics.save_tb_folder",
    "profiling.enable_profiling": "profiling.save_traces_folder",
    "profiling.enable_memory_snapshot": "profiling.save_memory_snapshot_folder",
}
"""Where a run writes what it is told to, below its own folder."""


def check_dump_folder(settings: Settings) -> None:
    """Refuse a ``job.dump_folder`` that cannot be made or used here; a dry run needs none.

    Raises:
        ConfigError: Naming what is in the way.
    """
    if settings["job.dry_run"]:
        return
    folder = Path(settings["job.dump_folder"]).absolute()
    config_file = settings["job.save_config_file"]
    if config_file and (folder / config_file).is_symlink():
        problem = f"{folder / config_file} is a link, and is not written through"
        raise settings.error("job.save_config_file", f"{problem}; remove it")
    try:
        problem = _obstacle(folder)
        found = None if problem else next(_misplaced(settings, folder), None)
    except OSError as error:
        problem, found = f"{error.filename or folder}: {error.strerror}", None
    if problem:
        raise settings.error("job.dump_folder", f"{problem}; set another folder")
    if found:
        key, path, kind = found
        key = key if settings.is_set(key) else "job.dump_folder"
        problem = f"{path} is no {kind} that can be written to"
        raise settings.error(key, f"{problem}; remove it, or set another {key}")


def _obstacle(folder: Path) -> str:
    """What keeps ``folder`` from being made and written to; empty if nothing does.

    Raises:
        OSError: If the file system says it itself.
    """
    there = next(place for place in (folder, *folder.parents) if _is_there(place))
    if not there.is_dir():
        return f"{there} is a {'file' if there.exists() else 'broken link'}"
    if len(str(folder).encode()) > 4095 - _ROOM:
        return f"a path of more than {4095 - _ROOM} bytes, too long for what is written below it"
    try:
        # Permissions do not tell: nobody can make a folder in /proc.
        Path(tempfile.mkdtemp(prefix=".try-", dir=there)).rmdir()
    except OSError as error:
        return f"{there} cannot be written to: {error.strerror}"
    return ""


def _misplaced(settings: Settings, folder: Path) -> Iterator[tuple[str, Path, str]]:
    """What stands where the run will write: the key and the place, and what is wanted there.

    Raises:
        OSError: If a place cannot be looked at.
    """
    own, settings_file = "job.dump_folder", "job.save_config_file"
    names = [(own, METRICS_FILE), (own, PLOT_FILE), (settings_file, settings[settings_file])]
    for key, path in [(key, folder / name) for key, name in names if name]:
        if _is_there(path) and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
            yield key, path, "file"
    for enabled, key in _FOLDERS.items():
        path = folder / settings[key]
        if settings[enabled] and _is_there(path) and not os.access(path / ".", os.W_OK | os.X_OK):
            yield key, path, "folder"


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
