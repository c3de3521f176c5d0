"""What each choice of Shampoo is worth: the ablations of its paper, on ResNet-20.

    python -m benchmarks.ablation --task digits --results ablation.json

Each variant differs in one thing from the first, which is SGD-grafted Shampoo with block 256 and
period 10 (Shi et al. 2023, section 5.1 and appendix); all have its learning rate, since the graft
sets the length of a step, but where there is no graft, whose rates are tried. Runs accumulate as
those of ``benchmarks.time_to_target`` do. What follows ``--`` are settings for all runs.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runs import (
    TASKS,
    Results,
    Settings,
    last_accuracy,
    last_loss,
    seconds_per_step,
    spread,
)
from benchmarks.workloads import machine

BASE: Settings = {
    "optimizer.name": "Shampoo",
    "optimizer.weight_decay": 0.1,
    "optimizer.shampoo.block_size": 256,
    "optimizer.shampoo.eps_relative": 1e-6,
}


def changed(**options: object) -> Settings:
    """The base with other options of Shampoo."""
    return {**BASE, **{f"optimizer.shampoo.{key}": value for key, value in options.items()}}


VARIANTS: dict[str, Settings] = {
    "grafted to Adam": BASE,
    "grafted to SGD": changed(grafting="sgd", momentum=0.9, nesterov=True),
    "grafted to AdaGrad": changed(grafting="adagrad"),
    "grafted to RMSProp": changed(grafting="rmsprop"),
    "no graft": changed(grafting="none"),
    "period 1": changed(precondition_frequency=1),
    "period 50": changed(precondition_frequency=50),
    "refreshed together": changed(refresh="together"),
    "block 64": changed(block_size=64),
    "block 1024": changed(block_size=1024),
    "merged as in the paper": changed(merge="paper"),
    "not merged": changed(merge="none"),
    "left side only": changed(exponent="[0.5,0]"),
    "right side only": changed(exponent="[0,0.5]"),
    "cut at shards": changed(block_alignment="shard"),
    "cheaper": changed(root_dtype="bfloat16", factor_frequency=2, root_method="qr"),
}
OWN_SCALE = ("grafted to SGD", "grafted to AdaGrad", "no graft")
"""Whose steps have a length of their own: three more rates are tried, a factor 10 apart."""


def main(args: Sequence[str]) -> None:
    """Take the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--results", type=Path, default=Path("ablation.json"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("settings", nargs="*", help="for all runs, after --")
    options = parser.parse_args(args)
    results = Results(options.results, options.task, options.settings, options.threads)
    rates = dict.fromkeys(options.variants, options.lr)
    for name in set(OWN_SCALE) & set(options.variants):
        for scale in (1, 10, 100):
            results.run(name, VARIANTS[name], float(f"{options.lr * scale:.3g}"), 0)
        tried = [run for run in results.of(name) if run["seed"] == 0]
        rates[name] = min(tried, key=last_loss)["lr"]
    for seed in range(1, options.seeds + 1):
        for name in options.variants:
            results.run(name, VARIANTS[name], rates[name], seed)
    print(machine())
    print(f"{'variant':24} {'lr':>8} {'last loss':>17} {'accuracy':>17} {'s/step':>8}")
    for name in options.variants:
        runs = [run for run in results.of(name) if run["seed"] and run["lr"] == rates[name]]
        print(f"{name:24} {rates[name]:8.3g} {spread(map(last_loss, runs), 4):>17} "
              f"{spread(map(last_accuracy, runs), 4):>17} "
              f"{statistics.median(map(seconds_per_step, runs)):8.4f}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
