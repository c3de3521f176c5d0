"""Whole training steps of both recipes: what each optimizer costs beside another, and what of it.

    python -m benchmarks.training_step transformer --tokens 4096 --methods Eva EvaF --bases SGD
    python -m benchmarks.training_step resnet50 --images 16 --methods EvaF Shampoo --ranks 2

Contestants take turns on one model, tapped for those that need it; ratios are medians over the
pairs of one round. "backward" is all before the optimizer's step: its excess over a base's is what
the tap costs. Parts of a step are timed in rounds of their own, as clocks cost time.
"""

import argparse
import functools
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.training_models import Job, parallel, resnet50, transformer
from benchmarks.workloads import machine
from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, Shampoo, library_optimizer
from titan_shampoo.blocks.engine import Engine
from titan_shampoo.distributed.exchange import Exchange
from titan_shampoo.functional.shampoo import ShampooRule
from titan_shampoo.functional.soap import SOAPRule
from titan_shampoo.host_memory import keep_freed_memory
from titan_shampoo.layers.factors import Factors
from titan_shampoo.layers.moments import Moments
from titan_shampoo.layers.optimizer import LayerOptimizer
from titan_shampoo.layers.rank_one import RankOneStep
from titan_shampoo.library_optimizer import LibraryOptimizer
from titan_shampoo.step_status import StatusReader

TINY = 1e-9
"""Learning rate: the arithmetic of training, and weights that stay where they are."""

PERIOD = 10
"""Steps between refreshes of one block, as by default."""

METHODS: dict[str, Any] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), TINY, momentum=0.9, foreach=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), TINY, foreach=True),
    "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), TINY, fused=True),
    "Eva": lambda model: Eva(model.named_parameters(), TINY, model=model, fallback="sgd"),
    "EvaF": lambda model: EvaF(model.named_parameters(), TINY, model=model, fallback="sgd"),
    "EvaS": lambda model: EvaS(model.named_parameters(), TINY, fallback="sgd"),
    "FOOF": lambda model: FOOF(model.named_parameters(), TINY, model=model, max_factor_dim=1024),
    "KFAC": lambda model: KFAC(model.named_parameters(), TINY, model=model, max_factor_dim=1024),
    "Shampoo": lambda model: Shampoo(model.named_parameters(), TINY),
    "SOAP": lambda model: SOAP(model.named_parameters(), TINY),
}

# The package has a function of this name.
tap = importlib.import_module("titan_shampoo.statistics.tap")

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "finite check": (
        (LibraryOptimizer, "_norms"),
        (library_optimizer, "agreed_status"),
        (StatusReader, "read"),
    ),
    "tap": ((tap, "input_sum"), (tap, "output_sum")),
    "statistics": ((RankOneStep, "observe"), (Moments, "of_owned_blocks"), (Factors, "average_")),
    "factors": ((ShampooRule, "accumulate_"), (SOAPRule, "accumulate_")),
    "roots": ((Engine, "_refresh"), (Factors, "refresh_")),
    "directions": (
        (RankOneStep, "_factors"),
        (RankOneStep, "_scalars"),
        (ShampooRule, "direction"),
        (SOAPRule, "direction"),
        (Factors, "direction"),
    ),
    "move": ((RankOneStep, "_apply"), (Engine, "_apply")),
    "others": ((LayerOptimizer, "_step_others"),),
    "exchange": tuple((Exchange, name) for name in ("gather", "fill_stacks", "scatter", "finish")),
}
"""Functions by what they are for; none calls another of these."""

Row = dict[str, Any]


class Contestant:
    """An optimizer with its own taps of a model that all share, and the seconds of its steps.

    Models of their own would lie elsewhere in memory, which alone is worth ten percent of a step.
    """

    def __init__(self, job: Job, model: nn.Module, method: str) -> None:
        self.job = job
        self.model = model
        self.optimizer = METHODS[method](model)
        self._taps = _taken_out(model)
        self.backward: list[float] = []
        self.update: list[float] = []

    def settle(self) -> None:
        """Take a step that does not count, and updates until every block has been refreshed."""
        with self._tapped():
            self.optimizer.zero_grad()
            self.job.loss(self.model).backward()
            for _ in range(PERIOD + 1):
                self.optimizer.step()

    def step(self) -> None:
        """One training step."""
        with self._tapped():
            start = time.perf_counter()
            self.optimizer.zero_grad()
            self.job.loss(self.model).backward()
            middle = time.perf_counter()
            self.optimizer.step()
            self.backward.append(middle - start)
            self.update.append(time.perf_counter() - middle)

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        for module, attributes in self._taps:
            module.__dict__.update(attributes)
        try:
            yield
        finally:
            _taken_out(self.model)

    def parts(self, count: int) -> dict[str, float]:
        """Seconds in each of ``PARTS``, of one of ``count`` further steps."""
        with clocks() as spent:
            for _ in range(count):
                self.step()
        return {part: seconds / count for part, seconds in spent.items()}

    @property
    def seconds(self) -> list[float]:
        """Of whole steps."""
        return [one + other for one, other in zip(self.backward, self.update, strict=True)]


def _taken_out(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Untap ``model``; returns what was attached to each module."""
    names = ("forward", tap.LEAVES)
    return [
        (module, {name: module.__dict__.pop(name) for name in names})
        for module in model.modules()
        if tap.LEAVES in module.__dict__
    ]


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Add up the seconds in each of ``PARTS`` while this is open."""
    spent: dict[str, float] = defaultdict(float)
    originals = []
    for part, functions in PARTS.items():
        for owner, name in functions:
            original = getattr(owner, name)
            originals.append((owner, name, original))
            setattr(owner, name, _clocked(original, part, spent))
    try:
        yield spent
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _clocked(
    function: Callable[..., Any], part: str, spent: dict[str, float]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def clocked(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (those of function)
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - start

    return clocked


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each method, the bases first."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    names = list(dict.fromkeys([*options.bases, *options.methods]))
    job = _job(options)
    model = parallel(job.model, options.layout)
    contestants = {name: Contestant(job, model, name) for name in names}
    for contestant in contestants.values():
        contestant.settle()
    for _ in range(options.rounds):
        for contestant in contestants.values():
            contestant.step()
    bases = {name: contestants[name] for name in options.bases}
    rows = [_row(name, one, bases) for name, one in contestants.items()]
    for row, contestant in zip(rows, contestants.values(), strict=True):
        row["parts"] = contestant.parts(options.part_rounds)
    return rows


def _row(name: str, one: Contestant, bases: Mapping[str, Contestant]) -> Row:
    def over(mine: list[float], others: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(mine, others, strict=True))

    row: Row = {"method": name, "size": one.job.size, "step_s": statistics.median(one.seconds)}
    row |= {f"/{other}": over(one.seconds, base.seconds) for other, base in bases.items()}
    row |= {"backward_s": statistics.median(one.backward)}
    row |= {
        f"backward /{other}": over(one.backward, base.backward) for other, base in bases.items()
    }
    row |= {"update_s": statistics.median(one.update)}
    return row | {"worst/median": max(one.seconds) / statistics.median(one.seconds)}


def _job(options: argparse.Namespace) -> Job:
    torch.manual_seed(0)
    if options.model == "resnet50":
        return resnet50(options.images, options.pixels)
    return transformer(options.flavor, options.tokens, options.sequence)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, and below them the parts that were found."""
    keys = [key for key in rows[0] if key != "parts"]
    cells = [[_cell(row[key]) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(keys, *cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in [keys, *cells]
    ]
    for row in rows:
        parts = "  ".join(f"{part} {seconds:.4f}" for part, seconds in row["parts"].items())
        lines += [f"{row['method']}: {parts}"] if parts else []
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _on_rank(rank: int, options: argparse.Namespace, store: str) -> None:
    method = f"file://{store}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=options.ranks)
    rows = measure(options)
    if rank == 0:
        _report(rows, options)
    dist.barrier()
    dist.destroy_process_group()


def _report(rows: list[Row], options: argparse.Namespace) -> None:
    where = f"{machine()}, {options.ranks} ranks"
    print(f"{where}\n{table(rows)}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) for key, value in vars(options).items()}
        report = {"machine": where, "options": settings, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def main(args: Sequence[str]) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("transformer", "resnet50"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["Eva"])
    parser.add_argument("--bases", nargs="+", choices=METHODS, default=["SGD"])
    parser.add_argument("--flavor", default="27M", help="of the transformer")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, on each rank")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--images", type=int, default=16, help="of a step, on each rank")
    parser.add_argument("--pixels", type=int, default=224, help="along the edge of an image")
    parser.add_argument("--ranks", type=int, default=1, help="processes, over gloo")
    parser.add_argument(
        "--layout", choices=("fsdp", "ddp"), default="fsdp", help="of several ranks"
    )
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of steps")
    parser.add_argument("--part-rounds", type=int, default=3, help="steps that parts are timed in")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(args)
    if options.ranks == 1:
        _report(measure(options), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_rank, (options, f"{folder}/store"), nprocs=options.ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
