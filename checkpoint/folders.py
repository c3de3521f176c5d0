r"""Where checkpoints lie, and what makes one complete.

    outputs/checkpoint/step-20                complete: renamed to this place when all was written
    outputs/checkpoint.incomplete/step-30     being written, or left by a run that died
    outputs/checkpoint.incomplete/step-20.old on its way out: superseded or no longer kept

Only ``^step-\d+$`` folders of the first kind are ever resumed or counted.
"""

import os
import re
import shutil
from pathlib import Path

_STEP = re.compile(r"step-(\d+)")
_OLD = ".old"


def complete_steps(folder: Path) -> list[int]:
    """Return the steps that have a complete checkpoint in ``folder``, ascending.

    Raises:
        OSError: If ``folder`` exists and cannot be listed.
    """
    if not folder.exists():
        return []
    found = [(_STEP.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    # torch.distributed.checkpoint writes .metadata last: whoever wrote the folder finished it.
    return sorted(int(name[1]) for name, entry in found if name and (entry / ".metadata").is_file())


def commit(written: Path, place: Path) -> None:
    """Move a checkpoint that is ``written`` to its ``place``, in place of one that may be there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    old = written.with_name(place.name + _OLD)
    replaces = place.exists()
    if replaces:
        place.rename(old)
    written.rename(place)
    _sync(place.parent)
    if replaces:
        shutil.rmtree(old)


def set_aside(place: Path, incomplete: Path) -> Path:
    """Move a checkpoint out of sight, at once, so that deleting it can take its time."""
    incomplete.mkdir(parents=True, exist_ok=True)
    return place.rename(incomplete / (place.name + _OLD))


def sweep(folder: Path, incomplete: Path) -> None:
    """Delete what dead runs left in ``incomplete``, but for what they were about to replace."""
    for old in incomplete.glob("*" + _OLD):
        place = folder / old.name.removesuffix(_OLD)
        # Died between the two renames of commit(): the old one is the only one.
        died_in_commit = (incomplete / place.name).exists() and not place.exists()
        if died_in_commit:
            old.rename(place)
    shutil.rmtree(incomplete, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
