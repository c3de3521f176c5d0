"""Plots of runs side by side: ``python -m titan_shampoo.plot RUN [RUN ...] [--output FILE.png]``.

A run is the folder in ``job.dump_folder``. Training and validation loss are drawn against steps and
against seconds, restarts included, from each run's ``metrics.jsonl``.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_shampoo.extras import MissingExtraError, require
from titan_shampoo.own_files import replacing

__all__ = ["METRICS_FILE", "PLOT_FILE", "Record", "draw", "limits", "main", "read_records"]

Record = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"

_CURVES = (("loss", "training loss"), ("validation_loss", "validation loss"))
_AXES = ("step", "seconds")


def read_records(file: Path) -> list[Record]:
    """All complete records of a run, oldest first; empty if there is no such file."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut short by the end of the process, or not a record
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def draw(runs: Mapping[str, Sequence[Record]], output: Path, *, title: str = "") -> None:
    """Draw a row for each loss, against steps on the left and against seconds on the right.

    Args:
        runs: Records by their name in the legend.
        output: A PNG file, replaced if present.
        title: Title of the figure.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    require("a plot", "matplotlib")
    # Imported here: it takes a second, and readers of records do not need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    recorded = {key for records in runs.values() for record in records for key in record}
    curves = [curve for curve in _CURVES if curve[0] in recorded]
    figure = Figure(figsize=(12, 4 * max(len(curves), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(max(len(curves), 1), len(_AXES), squeeze=False)
    for row, (key, label) in zip(panels, curves, strict=False):
        for axes, x in zip(row, _AXES, strict=True):
            for name, records in runs.items():
                points = list(_points(records, x, key))
                style = "-" if key == "loss" else "o-"
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
            axes.set(xlabel=x, ylabel=label, ylim=limits(runs.values(), key))
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
    with replacing(output) as file:
        figure.savefig(file, dpi=120, format=output.suffix.removeprefix(".") or "png")


def main(args: Sequence[str]) -> None:
    """Draw the runs on the command line.

    Raises:
        SystemExit: With 2 if a run has no records, naming it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m titan_shampoo.plot",
        description="Draw runs side by side: training and validation loss, against steps and "
        "against the seconds spent, restarts included.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="the job.dump_folder of a run"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison.png"),
        metavar="FILE",
        help="the picture, in PNG; default: comparison.png in the current folder",
    )
    chosen = parser.parse_args(args)
    runs = {}
    for folder, name in zip(chosen.runs, _names(chosen.runs), strict=True):
        runs[name] = read_records(folder / METRICS_FILE)
        if not runs[name]:
            parser.error(f"{folder / METRICS_FILE}: no records of a run")
    try:
        draw(runs, chosen.output)
    except OSError as error:
        parser.error(f"--output {chosen.output}: {error}")
    except MissingExtraError as missing:
        parser.exit(2, f"{missing}\n")
    sys.stdout.write(f"{chosen.output}\n")


def limits(runs: Iterable[Sequence[Record]], key: str) -> tuple[float, float] | None:
    """Range of values after the first tenth of each run, whose steep fall would hide the rest."""
    kept: list[float] = []
    for records in runs:
        points = list(_points(records, "step", key))
        kept += [y for step, y in points if step > points[-1][0] / 10 and math.isfinite(y)]
    if not kept or min(kept) == max(kept):
        return None
    margin = 0.05 * (max(kept) - min(kept))
    return min(kept) - margin, max(kept) + margin


def _points(records: Sequence[Record], x: str, y: str) -> Iterator[tuple[float, float]]:
    return ((record[x], record[y]) for record in records if x in record and y in record)


def _names(folders: Sequence[Path]) -> list[str]:
    """Last part of each path, or the whole path if several end in the same part."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


if __name__ == "__main__":
    main(sys.argv[1:])
