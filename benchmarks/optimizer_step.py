"""Time of one optimizer step: ours, AdamW, the floor, and other libraries, interleaved in one run.

    python -m benchmarks.optimizer_step --workload resnet50 --block 256 --period 10

The floor is what cannot be left out: the same matrix products and the same refreshes alone, on
memory that is there already, plus one foreach step of AdamW for everything element-wise. Ratios are
of medians; "worst" is over the steps after the first period.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import PEERS, from_folder, peers
from benchmarks.workloads import WORKLOADS, NamedParameters, machine
from tests.support.internals import plan_of, stacks_of
from titan_shampoo import SOAP, Shampoo
from titan_shampoo.fallback import falls_back
from titan_shampoo.functional.roots import inverse_root
from titan_shampoo.functional.symmetric import slab_views, slabs, unpack

Step = Callable[[], Any]


class Floor:
    """The products and refreshes of a Shampoo step, and nothing else but AdamW.

    Args:
        optimizer: Whose blocks and schedule are followed.
        params: All parameters, for AdamW.
    """

    def __init__(self, optimizer: Shampoo, params: NamedParameters, period: int) -> None:
        self.period = period
        self.adamw = torch.optim.AdamW([p for _, p in params], lr=1e-9, foreach=True)
        names = ("left", "right", "left_root", "right_root", "exp_avg")
        # Live, but for sums and output: eigenvalues take less time where there is nothing yet.
        self.stacks = [
            (
                *(state[name] for name in names),
                *(torch.zeros_like(state[name]) for name in ("left", "right", "exp_avg")),
            )
            for state in stacks_of(optimizer)
        ]
        self.turns = [
            torch.tensor([b.slot for b in stack.blocks]) for stack in plan_of(optimizer).stacks
        ]
        self.time = 0

    @torch.no_grad()
    def step(self) -> None:
        """One step's worth of unavoidable work."""
        turn = self.time % self.period
        self.time += 1
        for stack, turns in zip(self.stacks, self.turns, strict=True):
            left, right, left_root, right_root, grad, left_sum, right_sum, out = stack
            for factor, rows in ((left_sum, grad), (right_sum, grad.mT)):
                extent = rows.shape[1]
                views = zip(slab_views(factor, extent), slabs(extent), strict=True)
                for view, (start, stop) in views:
                    view.lerp_(rows[:, start:] @ rows[:, start:stop].mT, 0.01)
            due = (turns == turn).nonzero().flatten()
            if len(due):
                for factor, root in ((left, left_root), (right, right_root)):
                    inverse_root(unpack(factor[due], root.shape[-1]), 0.25, eps=1e-12)
            torch.bmm(left_root, torch.bmm(grad, right_root, out=out))
        self.adamw.step()


def times_of(steps: dict[str, Step], count: int) -> dict[str, list[float]]:
    """Seconds of each step, the contestants taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def state_bytes(optimizer: object) -> int:
    """Bytes of all tensors in ``optimizer.state``; 0 for the floor, which has none."""
    states = getattr(optimizer, "state", {})
    tensors = [t for state in states.values() for t in _tensors(state)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "paper": (Shampoo, {"merge": "paper"}),
    "bfloat16": (Shampoo, {"merge": "paper", "root_dtype": torch.bfloat16}),
    "cheap": (
        Shampoo,
        {
            "merge": "paper",
            "root_dtype": torch.bfloat16,
            "factor_frequency": 2,
            "root_method": "qr",
        },
    ),
    "SOAP": (SOAP, {}),
}
"""Contestants of ours beside Shampoo with its defaults; methods for layers need a forward pass, and
are timed by ``benchmarks.training_step``."""


def contestants(
    workload: str,
    block: int,
    period: int,
    *,
    ours: Sequence[str],
    with_peers: bool,
    folders: Mapping[str, Path],
) -> dict[str, Any]:
    """Optimizers with parameters of their own, equal for all."""
    make = WORKLOADS[workload]
    common: dict[str, Any] = {"lr": 1e-9, "block_size": block, "precondition_frequency": period}
    common["start_step"] = 1
    shampoo = Shampoo(make(), **common)
    params = make()
    found: dict[str, Any] = {"Shampoo": shampoo}
    for name in ours:
        method, options = OURS[name]
        found[name] = method(make(), **common | options)
    found |= {
        "AdamW": torch.optim.AdamW([p for _, p in params], lr=1e-9, foreach=True),
        "floor": Floor(shampoo, params, period),
    }
    if with_peers:
        matrices = {name: _matrices(make()) for name in PEERS}
        found |= peers(matrices, block, period)
    for name, folder in folders.items():
        found[name] = from_folder(folder, _matrices(make()), block, period)
    return found


def _matrices(params: NamedParameters) -> list[torch.nn.Parameter]:
    options = {"fallback": "adamw", "batch_dims": 0}
    return [param for name, param in params if not falls_back(name, param, options)]


def measure(
    workload: str,
    block: int,
    period: int,
    count: int,
    *,
    ours: Sequence[str],
    with_peers: bool,
    folders: Mapping[str, Path],
) -> list[dict[str, Any]]:
    """A row for each contestant."""
    found = contestants(workload, block, period, ours=ours, with_peers=with_peers, folders=folders)
    for _ in range(period + 1):  # every block has its roots, every buffer its memory
        for contestant in found.values():
            contestant.step()
    seconds = times_of({name: contestant.step for name, contestant in found.items()}, count)
    return [
        {"workload": workload, "block": block, "period": period, "optimizer": name}
        | _figures(times, seconds)
        | {"state_bytes": state_bytes(found[name])}
        for name, times in seconds.items()
    ]


def _figures(times: list[float], seconds: dict[str, list[float]]) -> dict[str, float]:
    mean, median = statistics.fmean(times), statistics.median(times)
    return {
        "mean_s": mean,
        "median_s": median,
        "worst/median": max(times) / median,
        "/floor": mean / statistics.fmean(seconds["floor"]),
        "/AdamW": mean / statistics.fmean(seconds["AdamW"]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    keys = list(rows[0])
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(keys, *cells, strict=True)]
    lines = [[c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in [keys, *cells]]
    return "\n".join("  ".join(line) for line in lines)


def main(args: list[str]) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--workload", choices=WORKLOADS, nargs="+", default=["resnet50", "transformer-27M"]
    )
    parser.add_argument("--block", type=int, nargs="+", default=[256])
    parser.add_argument("--period", type=int, nargs="+", default=[10])
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each contestant")
    parser.add_argument(
        "--ours", choices=OURS, nargs="*", default=["SOAP"], help="ours beside Shampoo"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="other libraries too")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="Shampoo of the published PyTorch implementation, from its sources in a folder",
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)
    folders = {name: Path(path) for name, _, path in (peer.partition("=") for peer in options.peer)}
    print(machine())
    rows = []
    for workload in options.workload:
        for block in options.block:
            for period in options.period:
                found = measure(workload, block, period, options.steps,
                                ours=options.ours, with_peers=options.peers,
                                folders=folders)  # fmt: skip
                print(table(found), flush=True)
                rows += found
    if options.json:
        report = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        options.json.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
