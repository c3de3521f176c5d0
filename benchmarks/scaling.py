"""How the work of a step is divided: measured on a few ranks, planned for thousands.

    python -m benchmarks.scaling --workload transformer-27M --block 256

Measured: ranks of FSDP2 (or replicas, ``--layout ddp``) take turns to be 1, 2 and 4; a rank's CPU
seconds are what counts, since there may be fewer cores than ranks. Planned: the optimizer is made
on the meta device over torch's fake process group, which sends nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from benchmarks.workloads import WORKLOADS, NamedParameters, machine
from tests.support.ranks import run_on_ranks
from titan_shampoo import SOAP, KLShampoo, Shampoo
from titan_shampoo.titan.own_process import in_own_process

METHODS: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo}
Row = dict[str, float]


def placed(params: NamedParameters, layout: str, *, on_meta: bool) -> NamedParameters:
    """The parameters and their gradients over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements: Any = [Replicate()] if layout == "ddp" else [Shard(0)]

    def place(tensor: torch.Tensor) -> DTensor:
        if on_meta:
            tensor = tensor.to("meta")
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    found = []
    for name, param in params:
        one = nn.Parameter(place(param.detach()))
        one.grad = None if on_meta or param.grad is None else place(param.grad)
        found.append((name, one))
    return found


def make(params: NamedParameters, options: argparse.Namespace) -> Any:  # noqa: ANN401 (any method)
    """The optimizer that is measured."""
    period = {"precondition_frequency": options.period, "start_step": 1}
    return METHODS[options.method](params, lr=1e-9, block_size=options.block, **period)


def measured(options: argparse.Namespace) -> Row:
    """Seconds of a step on this rank, and what its plan says."""
    optimizer = make(placed(WORKLOADS[options.workload](), options.layout, on_meta=False), options)
    for _ in range(options.period):
        optimizer.step()
    cpu, elapsed = [], []
    for _ in range(options.periods * options.period):
        dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        optimizer.step()
        cpu.append(time.process_time() - start_cpu)
        elapsed.append(time.perf_counter() - start)
    times = {"CPU s per step": statistics.mean(cpu), "s per step": statistics.mean(elapsed)}
    return figures(optimizer) | times


def planned(world_size: int, options: argparse.Namespace) -> Row:
    """What the plan for so many ranks says."""
    dist.init_process_group("fake", rank=0, world_size=world_size)
    params = placed(WORKLOADS[options.workload](), options.layout, on_meta=True)
    return figures(make(params, options))


def figures(optimizer: Any) -> Row:  # noqa: ANN401 (any method)
    """The busiest rank's share of the work, and how even the shares are."""
    summary = optimizer.plan_summary()
    return {
        "GFLOP per step": float(summary.mean_flops.max()) / 1e9,
        "largest / mean": summary.imbalance,
        "state, MB": float(sum(summary.state.values()).max()) / 1e6,
        "sent, MB": float(summary.sent.max()) / 1e6,
        "collectives": summary.collectives,
        "blocks of the busiest": float(summary.blocks.max()),
    }


def print_table(rows: dict[int, Row]) -> None:
    """A column per number of ranks."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"{'ranks':22}", *(f"{world:>9}" for world in rows))
    for name in names:
        values: Iterable[str] = (f"{row[name]:>9.4g}" if name in row else " " * 9
                                 for row in rows.values())  # fmt: skip
        print(f"{name:22}", *values)


def main(args: Sequence[str]) -> None:
    """Print both tables and, as the last line, their JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="transformer-27M")
    parser.add_argument("--method", choices=METHODS, default="Shampoo")
    parser.add_argument("--layout", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--period", type=int, default=10)
    parser.add_argument("--periods", type=int, default=2, help="that are measured")
    parser.add_argument("--measured", type=int, nargs="*", default=[1, 2, 4], metavar="RANKS")
    parser.add_argument("--planned", type=int, nargs="*", metavar="RANKS",
                        default=[8, 32, 128, 512, 2048, 4096])  # fmt: skip
    options = parser.parse_args(args)
    print(machine())
    measured_rows = {}
    for world in options.measured:
        ranks = run_on_ranks(world, measured, options, timeout=1200)
        measured_rows[world] = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    planned_rows = {world: in_own_process(planned, world, options) for world in options.planned}
    print(f"measured, the busiest rank; {options.workload}, {options.method}, {options.layout}")
    print_table(measured_rows)
    print("planned")
    print_table(planned_rows)
    print(json.dumps({"machine": machine(), "measured": measured_rows, "planned": planned_rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
