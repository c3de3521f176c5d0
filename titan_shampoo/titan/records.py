"""The metrics of a run as a file: one JSON object per line, and the loss plot drawn from it.

``{"step": 20, "seconds": 61.2, "loss": 3.1, "grad_norm": 1.2, ...}`` per interval and
``{"step": 20, "seconds": 62.0, "validation_loss": 3.2}`` per validation. The file survives
restarts: a resumed run drops what lies after the step it resumes from, and appends; its seconds go
on from the last record that is kept.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titan_shampoo.plot import METRICS_FILE, PLOT_FILE, Record, draw, read_records

_logger = logging.getLogger(__name__)


class RunRecords:
    """Appends to ``metrics.jsonl`` in a folder; a file that cannot be written ends no run.

    Args:
        folder: The run's dump folder; made when the first record is written.
        enabled: False writes nothing.
    """

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        """Name the files."""
        self.file = folder / METRICS_FILE
        self.plot = folder / PLOT_FILE
        self._enabled = enabled
        self._seconds_before = 0.0
        self._start = time.perf_counter()
        self._is_failing = False

    def resume(self, step: int) -> None:
        """Drop every record after ``step``, and a line that a dying process left unfinished."""
        kept = [record for record in self.read() if record["step"] <= step] if step else []
        self._seconds_before = max((record.get("seconds", 0.0) for record in kept), default=0.0)
        self._start = time.perf_counter()
        if not self._enabled or not self.file.exists():
            return
        replacement = self.file.with_suffix(".tmp")
        with self.complaining():
            replacement.write_text("".join(_line(record) for record in kept), encoding="utf-8")
            replacement.replace(self.file)

    def append(self, record: Record) -> None:
        """Write one record, at once, with the seconds spent until now."""
        if not self._enabled:
            return
        seconds = round(self._seconds_before + time.perf_counter() - self._start, 3)
        with self.complaining():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_line({"step": record["step"], "seconds": seconds} | record))

    def read(self) -> list[Record]:
        """Return all complete records, oldest first."""
        return read_records(self.file)

    def draw_loss(self, title: str) -> None:
        """Draw training and validation loss over steps and seconds to ``loss.png``."""
        if self._enabled:
            with self.complaining():
                self.file.parent.mkdir(parents=True, exist_ok=True)
                draw({"this run": self.read()}, self.plot, title=title)

    @contextmanager
    def complaining(self) -> Iterator[None]:
        """Say once, and not for every record, that files cannot be written; they are left out."""
        try:
            yield
        except OSError as error:
            if not self._is_failing:
                place = os.fsdecode(error.filename or self.file)
                problem = "%s: metrics cannot be written: %s; training goes on without"
                _logger.warning(problem, place, error.strerror or error)
            self._is_failing = True


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
