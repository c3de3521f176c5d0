"""Autoencoders of digits: how far each optimizer gets in equal steps, and who is first at a loss.

    python -m benchmarks.autoencoder tune small        # every method the same number of trials
    python -m benchmarks.autoencoder compare small     # what was best, on paired seeds
    python -m benchmarks.autoencoder tune large --trials 12 --tuning-seeds 1
    python -m benchmarks.autoencoder race large        # steps and seconds until SGD's final loss

Runs are kept in one JSON file as they end: a command that is repeated goes on where it was stopped.
"""

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.reconstruction import METHODS, TASKS, Training
from benchmarks.workloads import machine
from titan_shampoo.host_memory import keep_freed_memory

FIRST_TUNING_SEED = 1000
"""Seeds that settings are chosen by; those that are compared count from 0."""
RACERS = ("SGD", "Eva", "EvaF", "KFAC", "Shampoo")

Row = dict[str, Any]


class Runs:
    """All runs that have been made, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["runs"]

    def final(self, task: str, method: str, settings: dict[str, float], seed: int) -> Row:
        """A whole run: its loss after each epoch; made now if it has not been before."""
        key = {"task": task, "method": method, "settings": settings, "seed": seed}
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        training = Training(TASKS[task], method, settings, seed)
        losses = [training.loss()]
        for _ in range(TASKS[task].epochs):
            if math.isfinite(losses[-1]):
                training.advance(TASKS[task].num_steps // TASKS[task].epochs)
            losses.append(training.loss())
        row = key | {"losses": losses, "seconds": training.seconds}
        self.add(row)
        return row

    def add(self, row: Row) -> None:
        """Keep a run."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps({"machine": machine(), "runs": self.rows}), encoding="utf-8")
        draft.replace(self.path)

    def best(self, task: str, method: str, trials: int, seeds: int) -> dict[str, float]:
        """The settings of the trial with the lowest mean loss; runs what is missing."""
        tried = []
        ranges = TASKS[task].ranges.get(method, {})
        for number, settings in enumerate(METHODS[method].trials(trials, ranges)):
            chosen = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
            ends = [self.final(task, method, settings, seed)["losses"][-1] for seed in chosen]
            tried.append((statistics.fmean(ends), number, settings))
        return min(tried)[2]


def tune(runs: Runs, options: argparse.Namespace) -> None:
    """Print what is best of each method's trials."""
    for method in options.methods:
        settings = runs.best(options.task, method, options.trials, options.tuning_seeds)
        print(f"{method:8} {settings}", flush=True)


def compare(runs: Runs, options: argparse.Namespace) -> None:
    """Equal steps on seeds that nothing was chosen by; differences are paired with SGD's."""
    curves = {}
    for method in options.methods:
        settings = runs.best(options.task, method, options.trials, options.tuning_seeds)
        seeds = range(options.seeds)
        found = [runs.final(options.task, method, settings, seed) for seed in seeds]
        curves[method] = settings, [row["losses"] for row in found]
    base = [losses[-1] for losses in curves["SGD"][1]]
    print(f"{'method':8} {'settings':30} {'train MSE':>9} {'- SGD':>9} {'std err':>9} diverged")
    for method, (settings, losses) in curves.items():
        ends = [one[-1] for one in losses]
        print(f"{method:8} {_shown(settings):30} {_comparison(ends, base)}")
    if options.plot is not None:
        draw({name: losses for name, (_, losses) in curves.items()}, options.plot)


def _comparison(ends: Sequence[float], base: Sequence[float]) -> str:
    """Mean loss, mean difference from that of SGD and its standard error, runs that diverged."""
    finite = [pair for pair in zip(ends, base, strict=True) if all(map(math.isfinite, pair))]
    survivors = [end for end in ends if math.isfinite(end)]
    if len(finite) < 2:
        return f"{'-':>9} {'-':>9} {'-':>9} {len(ends) - len(survivors):8}"
    gaps = [end - other for end, other in finite]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    numbers = (statistics.fmean(survivors), statistics.fmean(gaps), error)
    return " ".join(f"{x:9.5f}" for x in numbers) + f" {len(ends) - len(survivors):8}"


def _shown(settings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def race(runs: Runs, options: argparse.Namespace) -> None:
    """Steps and seconds until SGD's final loss of the same seed, all methods taking turns."""
    task = TASKS[options.task]
    chosen = {
        method: runs.best(options.task, method, options.trials, options.tuning_seeds)
        for method in options.methods
    }
    rows: dict[str, list[tuple[float, float]]] = {method: [] for method in chosen}
    for seed in range(options.seeds):
        goal = runs.final(options.task, "SGD", chosen["SGD"], seed)["losses"][-1]
        running = {name: Training(task, name, found, seed) for name, found in chosen.items()}
        while running:
            for name, training in list(running.items()):
                training.advance(options.check_every)
                if training.loss() <= goal * (1 + 1e-6):
                    rows[name].append((training.steps, training.seconds))
                elif training.steps < task.num_steps:
                    continue
                else:
                    rows[name].append((math.inf, training.seconds))
                del running[name]
    print(f"{'method':8} {'settings':30} {'steps':>7} {'seconds':>8}  (medians; - not reached)")
    for method, ends in rows.items():
        steps = statistics.median(end[0] for end in ends)
        seconds = statistics.median(end[1] for end in ends)
        reached = f"{steps:7.0f} {seconds:8.2f}" if math.isfinite(steps) else f"{'-':>7} {'-':>8}"
        print(f"{method:8} {_shown(chosen[method]):30} {reached}")
        row = {"race": options.task, "method": method, "settings": chosen[method], "ends": ends}
        runs.add(row | {"machine": machine()})


def draw(curves: dict[str, list[list[float]]], output: Path) -> None:
    """Loss of each method after each epoch, the median over seeds: one that diverged is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes a second
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, losses in curves.items():
        medians = [statistics.median(epoch) for epoch in zip(*losses, strict=True)]
        axes.plot(range(1, len(medians)), medians[1:], label=name, linewidth=1.5)
    axes.set(xlabel="epoch", ylabel="training error per pixel", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


COMMANDS = {"tune": tune, "compare": compare, "race": race}


def main(args: Sequence[str]) -> None:
    """Run a command, print a table, keep the runs."""
    options = _parser().parse_args(args)
    logging.getLogger("titan_shampoo").setLevel(logging.ERROR)  # trials may diverge
    keep_freed_memory()
    torch.set_num_threads(1)  # for layers of this size more only wait for each other
    options.methods = _with_sgd(
        options.methods or (RACERS if options.command == "race" else METHODS)
    )
    print(machine())
    COMMANDS[options.command](Runs(options.json), options)


def _with_sgd(methods: Iterable[str]) -> list[str]:
    return ["SGD", *(method for method in methods if method != "SGD")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--trials", type=int, default=16, help="of each method")
    parser.add_argument("--tuning-seeds", type=int, default=3, help="runs of each trial")
    parser.add_argument("--seeds", type=int, default=8, help="paired runs that are compared")
    parser.add_argument("--check-every", type=int, default=7, help="steps between losses in a race")
    parser.add_argument(
        "--json", type=Path, default=Path("outputs/autoencoder.json"), help="where runs are kept"
    )
    parser.add_argument("--plot", type=Path, help="a PNG file for compare")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
