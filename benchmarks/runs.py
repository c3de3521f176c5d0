"""Training runs that accumulate in a file: short ones of train.py, on one rank with all cores."""

import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import machine
from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import trainer_of
from titan_shampoo.host_memory import keep_freed_memory
from titan_shampoo.plot import read_records

Settings = Mapping[str, Any]
"""Values by dotted key."""

Run = dict[str, Any]

TASKS = {file.stem: file for file in (Path(__file__).parent / "tasks").glob("*.toml")}


class Results:
    """All runs so far, on disk after each.

    Args:
        file: JSON; made with the first run.
        task: One of ``TASKS``.
        extra: Settings for all runs, as on the command line; runs with others do not count.
        threads: Of torch.
    """

    def __init__(self, file: Path, task: str, extra: Sequence[str], threads: int) -> None:
        self.file, self.task, self.extra, self.threads = file, task, list(extra), threads
        self.runs: list[Run] = json.loads(file.read_text()) if file.exists() else []

    def of(self, name: str) -> list[Run]:
        """The runs of this name."""
        same = {"task": self.task, "name": name, "settings": self.extra}
        return [run for run in self.runs if same.items() <= run.items()]

    def run(self, name: str, settings: Settings, lr: float, seed: int) -> None:
        """Take a run, unless it is there."""
        if any((run["lr"], run["seed"]) == (lr, seed) for run in self.of(name)):
            return
        with tempfile.TemporaryDirectory() as folder:
            run_settings = {
                "job.config_file": TASKS[self.task],
                "job.dump_folder": Path(folder) / "run",
                "optimizer.lr": lr,
                "debug.seed": seed,
                **settings,
            }
            args = [f"--{key}={_text(value)}" for key, value in run_settings.items()]
            try:
                run_on_ranks(1, train, args + self.extra, self.threads, timeout=1800)
            except AssertionError as error:  # a rate at which a method diverges is a result
                if "not finite" not in str(error):
                    raise
            curve = curve_of(Path(folder) / "run")
        done: Run = {"task": self.task, "name": name, "settings": self.extra}
        done |= {"lr": lr, "seed": seed, "machine": machine(), "curve": curve}
        self.runs.append(done)
        new = self.file.with_suffix(".tmp")
        new.write_text(json.dumps(self.runs, indent=0))
        new.replace(self.file)
        what = f"{name:24} lr {lr:<9.3g} seed {seed}"
        print(f"{what}  last loss {last_loss(done):.4f}", flush=True)


def train(args: list[str], threads: int) -> None:
    """Train in this process, which is a rank of its own."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    with trainer_of(args) as trainer:
        trainer.train()


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def curve_of(folder: Path) -> list[dict[str, float]]:
    """``step``, ``seconds`` without validation, and the validation's numbers, of a run."""
    curve, seconds, last = [], 0.0, 0
    for record in read_records(folder / "metrics.jsonl"):
        if "seconds_per_step" in record:
            seconds += record["seconds_per_step"] * (record["step"] - last)
            last = record["step"]
        if "validation_loss" in record:
            kept = ("step", "validation_loss", "validation_accuracy")
            point = {key: record[key] for key in kept if key in record}
            curve.append(point | {"seconds": seconds})
    return curve


def last_loss(run: Run) -> float:
    """The last validation loss; infinity of a run that did not come to its end."""
    losses = [point["validation_loss"] for point in run["curve"]]
    return losses[-1] if losses and math.isfinite(losses[-1]) else math.inf


def last_accuracy(run: Run) -> float:
    """The last validation accuracy; not a number of texts."""
    return float(run["curve"][-1].get("validation_accuracy", math.nan))


def seconds_per_step(run: Run) -> float:
    """The mean of a run."""
    last = run["curve"][-1]
    return float(last["seconds"] / last["step"])


def spread(numbers: Iterable[float], digits: int) -> str:
    """Mean and standard deviation."""
    found = list(numbers)
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.mean(found):.{digits}f} ±{deviation:.{digits}f}"
