"""Retention of checkpoints: the newest good ones are kept, and the last one is never deleted.

A checkpoint counts after every byte of it was verified: by this process, which wrote or loaded it,
or once here. Runs in a thread of rank 0, after the next checkpoint is complete.
"""

import logging
from pathlib import Path

from checkpoint.errors import CheckpointError, MissingFileError, UnreadableError
from checkpoint.folders import discard, set_aside, step_folder, steps_in
from checkpoint.verify import read_manifest, verify

_logger = logging.getLogger(__name__)


class Retention:
    """Keeps the newest good checkpoints of a folder.

    Args:
        folder: Folder of the checkpoints.
        keep: Number to keep; 0 for all.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._verified: set[int] = set()
        self._unknown: set[int] = set()

    def trust(self, step: int) -> None:
        """Mark the checkpoint of this step as verified: this process wrote it or read it all."""
        self._verified.add(step)

    def apply(self) -> None:
        """Delete checkpoints older than the newest good ones; rename damaged ones."""
        if self._keep == 0:
            return
        good = 0
        for step in reversed(steps_in(self._folder)):
            place = step_folder(self._folder, step)
            if good == self._keep:
                discard(place)
                continue
            try:
                self._verify(step, place)
            except (UnreadableError, MissingFileError) as error:
                # Damage is declared by all ranks together (``checkpoint.finding``).
                if step not in self._unknown:
                    _logger.warning("not counted as kept: %s", error)
                self._unknown.add(step)
            except CheckpointError as error:
                kept = set_aside(place, "bad")
                _logger.warning("not counted as kept: %s; now %s", error, kept.name)
            else:
                good += 1

    def _verify(self, step: int, place: Path) -> None:
        if step in self._verified:
            read_manifest(place)
        else:
            verify(place)
            self._verified.add(step)
