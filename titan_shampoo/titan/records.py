"""The metrics of a run as a file: one JSON object per line, and the loss plot drawn from it.

``{"step": 20, "seconds": 61.2, "loss": 3.1, "grad_norm": 1.2, ...}`` per interval and
``{"step": 20, "seconds": 62.0, "validation_loss": 3.2}`` per validation. The file survives
restarts: a resumed run drops the records after its first step and appends; its seconds continue
from the last record that is kept. One run at a time writes there, and never through a link.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titan_shampoo.config.errors import ConfigError
from titan_shampoo.folder_lock import FolderLock
from titan_shampoo.own_files import open_own, replacing
from titan_shampoo.plot import METRICS_FILE, PLOT_FILE, Record, draw, read_records

_logger = logging.getLogger(__name__)

_LOCK = ".metrics.lock"


class RunRecords:
    """Appends to ``metrics.jsonl`` in a folder; a write error does not end the run.

    Args:
        folder: The run's dump folder; created when the run begins.
        enabled: False writes nothing.
    """

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        """Set the paths of the files."""
        self.file = folder / METRICS_FILE
        self.plot = folder / PLOT_FILE
        self.enabled = enabled
        self._lock: FolderLock | None = None
        self._seconds_before = 0.0
        self._start = time.perf_counter()
        self._is_failing = False

    def resume(self, step: int) -> None:
        """Drop all records after ``step``, and an unfinished last line.

        Raises:
            ConfigError: If another run writes here, or the file cannot be written to.
        """
        if self.enabled:
            self._take_folder()
        kept = [record for record in self.read() if record["step"] <= step] if step else []
        self._seconds_before = max((record.get("seconds", 0.0) for record in kept), default=0.0)
        self._start = time.perf_counter()
        if not self.enabled or not self.file.exists():
            return
        try:
            with replacing(self.file) as file:
                file.writelines(_line(record) for record in kept)
        except OSError as error:
            raise _not_written(self.file, error) from error

    def _take_folder(self) -> None:
        """Lock the folder, and check its files before they are read."""
        if self._lock is None:
            self._lock = FolderLock(self.file.parent, name=_LOCK)
        if os.path.lexists(self.file):
            try:
                os.close(open_own(self.file, os.O_WRONLY))
            except OSError as error:
                raise _not_written(self.file, error) from error

    def append(self, record: Record) -> None:
        """Write one record immediately, with the seconds spent so far."""
        if not self.enabled:
            return
        seconds = round(self._seconds_before + time.perf_counter() - self._start, 3)
        with self.complaining():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(open_own(self.file, os.O_WRONLY | os.O_APPEND), "ab") as file:
                file.write(_line({"step": record["step"], "seconds": seconds} | record))

    def read(self) -> list[Record]:
        """Return all complete records, oldest first."""
        return read_records(self.file)

    def draw_loss(self, title: str) -> None:
        """Draw training and validation loss over steps and seconds to ``loss.png``."""
        if self.enabled:
            with self.complaining():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                draw({"this run": self.read()}, self.plot, title=title)

    def close(self) -> None:
        """Release the folder for other runs; the second call does nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @contextmanager
    def complaining(self) -> Iterator[None]:
        """Warn once, not for every record, that files cannot be written, and go on without them."""
        try:
            yield
        except OSError as error:
            if not self._is_failing:
                place = os.fsdecode(error.filename or self.file)
                problem = "%s: metrics cannot be written: %s; training goes on without"
                _logger.warning(problem, place, error.strerror or error)
            self._is_failing = True


def _not_written(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be written: {error.strerror}; or set job.dump_folder")


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"
