"""What a checkpoint costs beside torch's own format: ``python -m benchmarks.checkpoint_cost``.

Ranks hold float32 state of a given size as DTensors and save it in both formats in turn, so that
whatever else the machine does hits both; the table has the fastest of each, and the median of CPU
seconds, which other programs disturb least. Then every byte is verified. ``--folder`` chooses the
disk.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from checkpoint.finding import verify_together
from checkpoint.manifest import Manifest
from checkpoint.record import describe_run
from checkpoint.saving import write
from tests.support.ranks import run_on_ranks


def measure(folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Seconds to save in both formats and to verify, and sizes, on this rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = megabytes * 250_000 // 1024 // 32
    state = {
        f"model.layers.{n}.weight": distribute_tensor(
            torch.randn(rows, 1024), mesh, [Shard(0)], src_data_rank=None
        )
        for n in range(32)
    }
    group = dist.group.WORLD
    assert group is not None
    times: defaultdict[str, list[float]] = defaultdict(list)
    sizes = {}
    for step in range(repeats):
        for name in ("ours", "native") if step % 2 else ("native", "ours"):
            place = folder / name / f"step-{step}"
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            if name == "ours":
                write(place, state, describe_run(step, "benchmark", "model"), group)
            else:
                dcp.save(state, checkpoint_id=place)
            times[f"{name} cpu"].append(time.process_time() - cpu)
            dist.barrier()
            times[name].append(time.perf_counter() - start)
            if name == "ours":
                start, cpu = time.perf_counter(), time.process_time()
                found = verify_together(place, group)
                times["verify cpu"].append(time.process_time() - cpu)
                times["verify"].append(time.perf_counter() - start)
                sizes = _sizes(place, found.manifest)
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(place)
    return {"seconds": dict(times), **sizes}


def _sizes(place: Path, manifest: Manifest) -> dict[str, int]:
    ideal = sum(4 * math.prod(entry.shape) for entry in manifest.tensors.values())
    return {"bytes": sum(path.stat().st_size for path in place.iterdir()), "ideal": ideal}


def main(args: Sequence[str]) -> None:
    """Print the table and, as the last line, its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        first, *_ = run_on_ranks(
            options.ranks, measure, Path(temporary), options.megabytes, options.repeats, timeout=600
        )
    best = {name: min(seconds) for name, seconds in first["seconds"].items()}
    cpu = {name: statistics.median(seconds) for name, seconds in first["seconds"].items()}
    share = first["ideal"] / options.ranks / 1e9
    size = first["ideal"]
    table = {
        "ranks": options.ranks,
        "bytes": first["bytes"],
        "bytes over ideal": first["bytes"] / size,
        "native save, GB/s": size / best["native"] / 1e9,
        "save, GB/s": size / best["ours"] / 1e9,
        "save over native, time": best["ours"] / best["native"],
        "verify, GB/s per rank": share / best["verify"],
        "native save, CPU s per GB": cpu["native cpu"] / share,
        "save, CPU s per GB": cpu["ours cpu"] / share,
        "verify, CPU s per GB": cpu["verify cpu"] / share,
    }
    for name, value in table.items():
        print(f"{name:26} {value:.4g}" if isinstance(value, float) else f"{name:26} {value}")
    print(json.dumps(table))


if __name__ == "__main__":
    main(sys.argv[1:])
