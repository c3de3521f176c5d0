"""How long it takes to plan a checkpoint of a large model.

``python -m benchmarks.checkpoint_planning --config configs/llama3_8b.toml --ranks 8``

No data and no ranks: the model and the optimizers are made on the meta device, as ``--plan`` does.
The table has what a save adds to writing bytes: on every rank its own plan, on rank 0 the plan of
all and the manifest.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from checkpoint.record import describe_run
from checkpoint.writer import Writer, Written, files_of_rank, make_manifest
from parallel.recipes import recipe_of
from titan_shampoo.config import check_world, read_config
from titan_shampoo.titan.config import make_job_config
from titan_shampoo.titan.own_process import in_own_process
from titan_shampoo.titan.planning import shapes_of_rank


def local_plan(job_config: Any, recipe: Any, rank: int, world_size: int) -> tuple[SavePlan, float]:  # noqa: ANN401
    """What one rank would write, and the seconds that it took to find out."""
    with shapes_of_rank(job_config, recipe, rank, world_size) as shapes:
        start = time.perf_counter()
        planner = DefaultSavePlanner()
        planner.set_up_planner(shapes.tensors(), is_coordinator=rank == 0)
        plan = Writer(Path("nowhere"), {}).prepare_local_plan(planner.create_local_plan())
        return SavePlan(plan.items), time.perf_counter() - start


def measure(config: Path, world_size: int) -> dict[str, Any]:
    """Seconds of each part, and sizes."""
    settings = read_config(["--job.config_file", str(config)])
    check_world(settings, world_size)
    job_config = make_job_config(settings)
    recipe = recipe_of(job_config.model.name)
    local = [
        in_own_process(local_plan, job_config, recipe, rank, world_size)
        for rank in range(world_size)
    ]
    start = time.perf_counter()
    planner = DefaultSavePlanner(flatten_state_dict=False)
    plans, metadata = planner.create_global_plan([plan for plan, _ in local])
    planned = time.perf_counter()
    files = [list(files_of_rank(rank, plan.items)) for rank, plan in enumerate(plans)]
    named = time.perf_counter()
    written = [
        Written({}, [(part, name) for name, parts in one for part in parts]) for one in files
    ]
    record = describe_run(0, str(config), job_config.model.name)
    manifest = make_manifest(record, metadata, written)
    content = manifest.to_bytes()
    done = time.perf_counter()
    return {
        "ranks": world_size,
        "keys": len(manifest.tensors),
        "boxes": sum(len(entry.boxes) for entry in manifest.tensors.values()),
        "manifest, bytes": len(content),
        "a rank's plan, s": max(seconds for _, seconds in local),
        "plan of all, s": planned - start,
        "files of a rank, s": (named - planned) / world_size,
        "manifest, s": done - named,
    }


def main(args: Sequence[str]) -> None:
    """Print the table and, as the last line, its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/llama3_8b.toml"))
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args(args)
    table = measure(options.config, options.ranks)
    for name, value in table.items():
        print(f"{name:20} {value:.3g}" if isinstance(value, float) else f"{name:20} {value:,}")
    print(json.dumps(table))


if __name__ == "__main__":
    main(sys.argv[1:])
