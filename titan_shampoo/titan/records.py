"""The metrics of a run as a file: one JSON object per line, and the loss plot drawn from it.

``{"step": 20, "loss": 3.1, "grad_norm": 1.2, ...}`` per interval and
``{"step": 20, "validation_loss": 3.2}`` per validation. The file survives restarts: a resumed run
drops what lies after the step it resumes from, and appends.
"""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class RunRecords:
    """Appends to ``metrics.jsonl`` in a folder.

    Args:
        folder: The run's dump folder; made when the first record is written.
    """

    def __init__(self, folder: Path) -> None:
        """Name the files."""
        self.file = folder / "metrics.jsonl"
        self.plot = folder / "loss.png"

    def resume(self, step: int) -> None:
        """Drop every record after ``step``, and a line that a dying process left unfinished."""
        kept = [record for record in self.read() if record["step"] <= step]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replacement = self.file.with_suffix(".tmp")
        replacement.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        replacement.replace(self.file)

    def append(self, record: Record) -> None:
        """Write one record, at once."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def read(self) -> list[Record]:
        """Return all complete records, oldest first."""
        if not self.file.exists():
            return []
        records = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and "step" in record:
                records.append(record)
        return records

    def draw_loss(self, title: str) -> None:
        """Draw training and validation loss over the steps to ``loss.png``."""
        # Imported here: takes a second, and no other rank or moment needs it.
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        records = self.read()
        for key, label, style in (
            ("loss", "training", "-"),
            ("validation_loss", "validation", "o-"),
        ):
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(xlabel="step", ylabel="loss", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        figure.savefig(self.plot, dpi=120)


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
