"""Steps and seconds to a validation loss, each method at the best of equally many learning rates.

    python -m benchmarks.time_to_target --task text --results text.json --plot text.png

A run is one of ``train.py``'s, on one rank with all cores, for the same number of steps. Of each
method so many learning rates are tried with seed 0, a factor apart, and the best by its last
validation loss is run with seeds 1, 2, ...: methods take turns, so that whatever else the machine
does hits all of them. Results accumulate in the JSON file; runs that it has are not repeated, so
the command can be interrupted. Seconds leave validation out. The target is the last loss of the
better of AdamW and SGD, averaged over seeds. What follows ``--`` are settings for all runs.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.runs import (
    TASKS,
    Results,
    Run,
    Settings,
    last_accuracy,
    last_loss,
    seconds_per_step,
    spread,
)
from benchmarks.workloads import machine
from titan_shampoo.plot import draw

REFERENCES = ("AdamW", "SGD")


@dataclass(frozen=True)
class Method:
    """A method, the middle of its learning rates on texts and on images, and its settings."""

    name: str
    text_lr: float
    image_lr: float
    both: Settings
    text: Settings = field(default_factory=dict)
    images: Settings = field(default_factory=dict)

    def middle(self, task: str) -> float:
        """Of the learning rates that are tried."""
        return self.text_lr if task == "text" else self.image_lr

    def settings(self, task: str) -> Settings:
        """As on the command line of ``train.py``, but for the learning rate."""
        own = self.text if task == "text" else self.images
        return {"optimizer.name": self.name, **self.both, **own}


def _own(table: str, **options: object) -> Settings:
    return {f"optimizer.{table}.{key}": value for key, value in options.items()}


def _blocks(name: str, table: str, **options: object) -> Method:
    """A method for blocks: AdamW's weight decay, and AdamW for all that is not a matrix."""
    own = _own(table, block_size=256, **options)
    return Method(name, 1.8e-2, 9e-3, {"optimizer.weight_decay": 0.1, **own})


_TEXT_DECAY: Settings = {"optimizer.weight_decay": 1e-4}
"""Of methods for layers: their rates and momentum make AdamW's 0.1 a third of the weights."""


def _layers(name: str, table: str, text_lr: float = 0.1, **on_texts: object) -> Method:
    """A method for layers: AdamW, and on images SGD, for what it does not precondition."""
    return Method(
        name, text_lr, 0.3, {},
        text={**_TEXT_DECAY, **_own(table, fallback_lr=1e-2, **on_texts)},
        images={"optimizer.weight_decay": 5e-4,
                **_own(table, kl_clip=1e-2, fallback="sgd", fallback_lr=0.1)},
    )  # fmt: skip


METHODS = {
    method.name: method
    for method in (
        Method("SGD", 0.3, 0.3, {"optimizer.sgd.momentum": 0.9, "optimizer.sgd.nesterov": True,
                                 "optimizer.weight_decay": 5e-4}),
        Method("AdamW", 6e-3, 9e-3, {"optimizer.weight_decay": 0.1}),
        _blocks("Shampoo", "shampoo", eps_relative=1e-6),
        _blocks("SOAP", "soap"),
        _blocks("KLShampoo", "kl_shampoo"),
        _layers("Eva", "eva"),
        # Damping as in configs/transformer_debug_eva.toml; docs/eva.md has what led to it.
        _layers("EvaF", "eva_f", 0.3, scaling="kl_norm", damping_mode="relative", damping=0.03),
        Method("EvaS", 0.1, 0.3, {}, text={**_TEXT_DECAY, **_own("eva_s", fallback_lr=1e-2)},
               images={"optimizer.weight_decay": 5e-4,
                       **_own("eva_s", fallback="sgd", fallback_lr=0.1)}),
        _layers("FOOF", "foof"),
        _layers("KFAC", "kfac"),
    )
}  # fmt: skip


def best_lr(results: Results, name: str) -> float:
    """The rate of the lowest last loss with seed 0."""
    return float(min((run for run in results.of(name) if run["seed"] == 0), key=last_loss)["lr"])


def finals(results: Results, name: str) -> list[Run]:
    """The runs that count: at the best rate, with other seeds than it was chosen by."""
    if not any(run["seed"] == 0 for run in results.of(name)):
        return []
    lr = best_lr(results, name)
    return [run for run in results.of(name) if run["seed"] and run["lr"] == lr]


def reached(run: Run, target: float) -> tuple[float, float] | None:
    """Step and seconds at which the loss falls to ``target``, between validations by line."""
    before: dict[str, float] | None = None
    for point in run["curve"]:
        if point["validation_loss"] <= target:
            if before is None:
                return point["step"], point["seconds"]
            fall = before["validation_loss"] - point["validation_loss"]
            part = (before["validation_loss"] - target) / fall
            return tuple(before[key] + part * (point[key] - before[key])
                         for key in ("step", "seconds"))  # fmt: skip
        before = point
    return None


def rows(results: Results, methods: Sequence[str]) -> Iterator[str]:
    """The table."""
    means = {
        name: statistics.mean(map(last_loss, finals(results, name)))
        for name in REFERENCES
        if finals(results, name)
    }
    if not means:
        return
    target = min(means.values())
    yield f"target: {target:.4f}, of {min(means, key=lambda name: means[name])}"
    yield (f"{'method':10} {'lr':>8} {'last loss':>17} {'accuracy':>9} {'steps':>13} "
           f"{'seconds':>13} {'s/step':>8}")  # fmt: skip
    for name in methods:
        runs = finals(results, name)
        if not runs:
            continue
        found = [reached(run, target) for run in runs]
        hits = [hit for hit in found if hit is not None]
        steps, seconds = (
            spread([hit[i] for hit in hits], 1) if len(hits) == len(runs)
            else f"{len(hits)} of {len(runs)}"
            for i in (0, 1)
        )  # fmt: skip
        yield (f"{name:10} {best_lr(results, name):8.3g} {spread(map(last_loss, runs), 4):>17} "
               f"{statistics.mean(map(last_accuracy, runs)):9.4f} {steps:>13} {seconds:>13} "
               f"{statistics.median(map(seconds_per_step, runs)):8.4f}")  # fmt: skip


def main(args: Sequence[str]) -> None:
    """Take the runs that are missing, print the table, draw the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="text")
    parser.add_argument("--results", type=Path, default=Path("time_to_target.json"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--trials", type=int, default=3, help="learning rates, odd")
    parser.add_argument("--factor", type=float, default=3.0, help="between learning rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--plot", type=Path, help="a PNG file: the runs that count, seed 1")
    parser.add_argument("settings", nargs="*", help="for all runs, after --")
    options = parser.parse_args(args)
    results = Results(options.results, options.task, options.settings, options.threads)
    for trial in range(options.trials):
        scale = options.factor ** (trial - options.trials // 2)
        for name in options.methods:
            method, rate = METHODS[name], METHODS[name].middle(options.task) * scale
            results.run(name, method.settings(options.task), float(f"{rate:.3g}"), 0)
    for seed in range(1, options.seeds + 1):
        for name in options.methods:
            settings = METHODS[name].settings(options.task)
            results.run(name, settings, best_lr(results, name), seed)
    print(machine())
    print("\n".join(rows(results, options.methods)))
    if options.plot:
        firsts = {name: finals(results, name)[0]["curve"] for name in options.methods}
        draw(firsts, options.plot, title=options.task)


if __name__ == "__main__":
    main(sys.argv[1:])
