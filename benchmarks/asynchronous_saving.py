"""What saving in the background costs the steps that go on.

``python -m benchmarks.asynchronous_saving``

Ranks train a transformer (``--flavor``) with Shampoo under FSDP2, on random tokens. Windows
of so many steps take turns: in one, its first step is followed by an asynchronous save of the whole
run; in the next there is none. The table has the median over pairs of windows.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from checkpoint import CheckpointManager
from parallel import transformer
from tests.support.checkpoint_runs import Counter, Progress
from tests.support.ranks import run_on_ranks
from titan_shampoo import titan
from titan_shampoo.config import check_world, read_config
from titan_shampoo.titan import ParallelDims
from titan_shampoo.titan.config import make_job_config
from titan_shampoo.titan.optimizers import OptimizersContainer
from titan_shampoo.titan.recipes import TRANSFORMERS

SETTINGS = {
    "optimizer.name": "Shampoo", "optimizer.lr": "1e-4",
    "training.mixed_precision_param": "float32", "activation_checkpoint.mode": "none",
    "checkpoint.enable": "true", "checkpoint.async_mode": "async", "checkpoint.interval": "1",
    "checkpoint.keep_latest_k": "2",
}  # fmt: skip


LENGTH = 512
"""Tokens of a sequence, at most."""


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each window on this rank, and the size of a checkpoint."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    chosen = SETTINGS | {"model.flavor": options.flavor}
    args = [f"--{key}={value}" for key, value in chosen.items()]
    settings = read_config([*args, f"--job.dump_folder={folder}"])
    check_world(settings, dist.get_world_size())
    job_config = make_job_config(settings)
    world = dist.get_world_size()
    dims = ParallelDims(dp_replicate=1, dp_shard=world, cp=1, tp=1, pp=1, ep=1, etp=1,
                        world_size=world)  # fmt: skip
    recipe = titan.transformer(transformer.parallelize, transformer.pipeline)
    model_args = recipe.model_args[options.flavor]
    model_args.update_from_config(job_config)
    with torch.device("meta"):
        model: Any = recipe.model_cls(model_args)
    model = recipe.parallelize_fn(model, dims, job_config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    optimizers = OptimizersContainer([model], job_config.optimizer, dims)
    progress = Progress("step")
    manager = CheckpointManager(
        dataloader=Counter("samples"), model_parts=[model], optimizers=optimizers,
        lr_schedulers=Counter("last_epoch"), states={"train_state": progress},
        checkpoint_config=job_config.checkpoint, base_folder=str(folder), job_config=job_config,
    )  # fmt: skip
    length = min(options.tokens, LENGTH)
    batch = torch.randint(model_args.vocab_size, (options.tokens // length, length + 1))

    def step() -> None:
        progress.value += 1
        logits: Tensor = model(batch[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizers.step()
        optimizers.zero_grad()

    for _ in range(options.warmup):
        step()
    windows: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(options.pairs):
        for saves in (True, False) if pair % 2 else (False, True):
            dist.barrier()
            start = time.perf_counter()
            for number in range(options.steps):
                step()
                if saves and number == 0:
                    manager.save(progress.value)
            dist.barrier()
            windows[saves].append(time.perf_counter() - start)
            manager._finish_background(progress.value)  # outside of what is timed, if it is late
    newest = max((folder / "checkpoint").glob("step-*"), key=lambda place: place.stat().st_mtime)
    size = sum(file.stat().st_size for file in newest.iterdir())
    manager.close()
    return {"with": windows[True], "without": windows[False], "bytes": size}


def main(args: Sequence[str]) -> None:
    """Print the table and, as the last line, its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flavor", choices=TRANSFORMERS, default="27M")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="per rank and step")
    parser.add_argument(
        "--warmup", type=int, default=12, help="steps before; 12 are once around the refresh period"
    )
    parser.add_argument("--steps", type=int, default=20, help="per window, which has one save")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        first, *_ = run_on_ranks(options.ranks, measure, Path(temporary), options, timeout=3600)
    ratios = [one / other for one, other in zip(first["with"], first["without"], strict=True)]
    table = {
        "ranks": options.ranks,
        "tokens per rank": options.tokens,
        "checkpoint, bytes": first["bytes"],
        "a step, s": statistics.median(first["without"]) / options.steps,
        "a step of those with a save, s": statistics.median(first["with"]) / options.steps,
        "with over without": statistics.median(ratios),
    }
    print(f"{'transformer':32} {options.flavor}")
    for name, value in table.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value:,}")
    print("ratio of each pair:", " ".join(f"{ratio:.3f}" for ratio in ratios))
    print(json.dumps({"transformer": options.flavor} | table))


if __name__ == "__main__":
    main(sys.argv[1:])
