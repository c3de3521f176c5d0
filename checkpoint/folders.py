r"""Names of checkpoint folders: all in one folder, and each change of state is a rename.

    checkpoint/step-20                    complete, and never written to again
    checkpoint/step-30.writing-1c9e02     being written, or left by a run that died
    checkpoint/step-10.trash-77ab40       being deleted
    checkpoint/step-25.bad                did not verify; kept for inspection
    checkpoint/step-40.superseded         later than the step that a run was told to start from
    checkpoint/.lock                      held by the run that writes here

Only ``^step-\d+$`` is ever resumed or counted. A complete checkpoint is only ever renamed, so a run
that dies at any moment leaves each one whole under some name.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_STEP = re.compile(r"step-(\d+)")
_TEMPORARY = re.compile(r"(step-\d+|hf-step-\d+)\.(writing|trash)-[0-9a-f]{8}")


def steps_in(folder: Path) -> list[int]:
    """The steps with a checkpoint in ``folder``, ascending, damaged ones included.

    Raises:
        OSError: If ``folder`` exists and cannot be listed.
    """
    if not folder.exists():
        return []
    found = ((step_of(entry.name), entry) for entry in folder.iterdir() if entry.is_dir())
    return sorted(s for s, entry in found if s is not None and step_folder(folder, s) == entry)


def step_of(name: str) -> int | None:
    """The step in the name of a folder; None if the name has none."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def step_folder(folder: Path, step: int) -> Path:
    """Path of the checkpoint of ``step``."""
    return folder / f"step-{step}"


def writing_name(place: Path) -> Path:
    """A new name beside ``place`` for an unfinished checkpoint; a rename completes it."""
    return place.with_name(f"{place.name}.writing-{uuid.uuid4().hex[:8]}")


def commit(written: Path, place: Path) -> None:
    """Give ``written`` its final name ``place``, atomically and for good.

    Raises:
        FileExistsError: If ``place`` exists: it is never overwritten.
    """
    sync_folder(written)
    if os.path.lexists(place):  # rename() would replace an empty folder
        raise FileExistsError(f"{place} exists, and a checkpoint is never overwritten")
    written.rename(place)
    sync_folder(place.parent)


def set_aside(place: Path, reason: str) -> Path:
    """Rename a checkpoint to ``<name>.<reason>``, or ``<name>.<reason>-2`` and so on."""
    aside = next(name for name in _names(place, reason) if not os.path.lexists(name))
    place.rename(aside)
    sync_folder(place.parent)
    return aside


def discard(place: Path) -> None:
    """Delete a folder, renamed first, so that nobody finds half of it under its name."""
    trash = place
    if not _TEMPORARY.fullmatch(place.name):
        trash = place.with_name(f"{place.name}.trash-{uuid.uuid4().hex[:8]}")
        place.rename(trash)
    _remove(trash)


def sweep(folder: Path) -> None:
    """Delete unfinished and half-deleted folders of dead runs; the lock must be held."""
    if folder.exists():
        for entry in folder.iterdir():
            if _TEMPORARY.fullmatch(entry.name):
                _remove(entry)


def _remove(place: Path) -> None:
    """Delete a folder, or only the link if it is one."""
    if place.is_symlink():
        place.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(place: Path, reason: str) -> Iterator[Path]:
    yield place.with_name(f"{place.name}.{reason}")
    number = 2
    while True:
        yield place.with_name(f"{place.name}.{reason}-{number}")
        number += 1
