"""Small runs of the real trainer on gloo ranks, several layouts in one process group."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch.distributed as dist

from checkpoint import CheckpointManager
from parallel.recipes import recipe_of
from titan_shampoo import titan
from titan_shampoo.config import check_world, read_config
from titan_shampoo.titan.config import make_job_config
from titan_shampoo.titan.records import RunRecords

Settings = dict[str, Any]

GLOBAL_BATCH = 8
# World size, data-parallel ranks, settings.
LAYOUTS: dict[str, tuple[int, int, Settings]] = {
    "fsdp2": (2, 2, {}),
    "ddp2": (
        2,
        2,
        {
            "parallelism__data_parallel_replicate_degree": 2,
            "parallelism__data_parallel_shard_degree": 1,
        },
    ),
    "tp2": (2, 1, {"parallelism__tensor_parallel_degree": 2}),
    "pp2": (
        2,
        1,
        {
            "parallelism__pipeline_parallel_degree": 2,
            "parallelism__pipeline_parallel_microbatch_size": 4,
        },
    ),
    "ddp2_accumulated": (
        2,
        2,
        {
            "parallelism__data_parallel_replicate_degree": 2,
            "parallelism__data_parallel_shard_degree": 1,
            "training__local_batch_size": GLOBAL_BATCH // 4,
            "training__global_batch_size": GLOBAL_BATCH,
        },
    ),
    "hsdp2x2": (4, 4, {"parallelism__data_parallel_replicate_degree": 2}),
    "fsdp2_tp2": (4, 2, {"parallelism__tensor_parallel_degree": 2}),
}


def write_text(folder: Path) -> Path:
    """A text of 64 kB, of words, so that there is something to learn."""
    words = random.Random(0)
    vocabulary = ["".join(words.choices("etaoinshrdlu", k=words.randint(2, 7))) for _ in range(300)]
    lines = (" ".join(words.choices(vocabulary, k=10)) for _ in range(1200))
    file = folder / "words.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def text_run(folder: Path, dump: str, **overrides: Any) -> list[str]:
    """The command line of a run on that text; overrides by dotted name with ``__`` for the dot."""
    settings = {
        "job.dump_folder": folder / dump,
        "model.flavor": "byte_debug",
        "optimizer.name": "AdamW",
        "optimizer.lr": 1e-3,
        "lr_scheduler.warmup_steps": 2,
        "training.dataset": folder / "words.txt",
        "training.seq_len": 32,
        "training.local_batch_size": 4,
        "training.steps": 2,
        "training.mixed_precision_param": "float32",
        "validation.seq_len": 32,
        "metrics.log_freq": 1,
        "activation_checkpoint.mode": "none",
    }
    settings |= {name.replace("__", "."): value for name, value in overrides.items()}
    return command_line(settings)


def image_run(folder: Path, dump: str, **overrides: Any) -> list[str]:
    """The command line of a run of a small ResNet on the digits."""
    settings = {
        "job.dump_folder": folder / dump,
        "model.name": "resnet",
        "model.flavor": "resnet18_small",
        "optimizer.name": "AdamW",
        "training.dataset": "digits",
        "training.local_batch_size": 4,
        "training.steps": 1,
        "training.mixed_precision_param": "float32",
        "metrics.log_freq": 1,
        "activation_checkpoint.mode": "none",
    }
    settings |= {name.replace("__", "."): value for name, value in overrides.items()}
    return command_line(settings)


def command_line(settings: Settings) -> list[str]:
    arguments = []
    for name, value in settings.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        arguments += [f"--{name}", text]
    return arguments


def train_all(runs: list[list[str]]) -> None:
    """Train each command line in this process group, one after the other."""
    for args in runs:
        with trainer_of(args) as trainer:
            trainer.train()


@contextmanager
def trainer_of(args: list[str]) -> Iterator[Any]:
    """The trainer that ``train.py`` makes of a command line, in this process group."""
    settings = read_config(args)
    check_world(settings, dist.get_world_size())
    job_config = make_job_config(settings)
    datasets.config.HF_DATASETS_CACHE = Path(job_config.job.dump_folder).parent / "cache"
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    trainer = titan.Trainer(job_config, recipe_of(job_config.model.name), CheckpointManager)
    try:
        yield trainer
    finally:
        trainer.close()


def records(folder: Path, dump: str, key: str) -> dict[int, float]:
    """The values of one metric of a run, by step."""
    found = RunRecords(folder / dump).read()
    return {record["step"]: record[key] for record in found if key in record}
