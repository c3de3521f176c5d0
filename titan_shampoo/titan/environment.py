"""Checks that the machines of a run fit together; an error is raised on every rank.

They run once, as soon as the ranks are connected. Later, such a mistake would show as a hang, or as
an error of some rank far from its cause.
"""

import os
import platform
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.config import JobConfig
from torchtitan.tools.utils import device_module, device_type

from titan_shampoo.config.errors import ConfigError

Facts = Mapping[str, str]

_MAY_DIFFER = "host"


def check_device() -> None:
    """Refuse a rank without a device on this machine.

    Raises:
        ConfigError: With the number of devices.
    """
    local_rank, available = int(os.environ["LOCAL_RANK"]), device_module.device_count()
    if device_type != "cpu" and local_rank >= available:
        raise ConfigError(
            f"{socket.gethostname()}: there is no {device_type} device {local_rank}, only "
            f"{available}; set --nproc_per_node={available}, or see CUDA_VISIBLE_DEVICES"
        )


def check_context_parallel(degree: int) -> None:
    """Refuse context parallelism on CPUs, whose attention torch cannot divide.

    Args:
        degree: ``parallelism.context_parallel_degree``.

    Raises:
        ConfigError: If this machine has no accelerator and ``degree`` is above 1.
    """
    if device_type == "cpu" and degree > 1:
        raise ConfigError(
            f"parallelism.context_parallel_degree: got {degree}, expected 1 on CPUs, whose "
            "attention torch cannot divide; set it to 1"
        )


@contextmanager
def rendezvous_explained(timeout_seconds: float) -> Iterator[None]:
    """Explain a failed rendezvous inside this block by the address and the settings to check.

    Args:
        timeout_seconds: Time for which the ranks wait.

    Raises:
        ConfigError: In place of torch's error.
    """
    try:
        yield
    except (dist.DistError, OSError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"rank {os.environ['RANK']} did not meet all {os.environ['WORLD_SIZE']} ranks at "
            f"{place} within {timeout_seconds:g} s ({reason}); every node needs the same "
            "--rdzv-endpoint and --nnodes, and must reach that address"
        ) from error


def check_environment(job_config: JobConfig) -> None:
    """Refuse ranks with different software or settings, or without a common folder.

    Args:
        job_config: Configuration of this rank.

    Raises:
        ConfigError: The same on all ranks.
    """
    facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(facts, _own_facts(job_config))
    problem = disagreement(facts)
    if problem is not None:
        raise ConfigError(problem)
    writes = not job_config.job.dry_run and job_config.checkpoint.enable
    if writes and len({fact[_MAY_DIFFER] for fact in facts}) > 1:
        check_shared(Path(job_config.job.dump_folder))


def disagreement(facts: Sequence[Facts]) -> str | None:
    """Sentence about the first fact that differs between ranks; None if there is none.

    Args:
        facts: One mapping per rank.
    """
    for name in dict.fromkeys(key for own in facts for key in own):
        ranks: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            ranks.setdefault(own.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1 and name != _MAY_DIFFER:
            found = ", ".join(
                f"{value} on {_shown(members)} ({facts[members[0]].get(_MAY_DIFFER, '?')})"
                for value, members in ranks.items()
            )
            return f"the ranks differ in {name}: {found}; make it the same on all nodes"
    return None


def check_shared(folder: Path) -> None:
    """Refuse a folder that is not the same on all nodes.

    Args:
        folder: Created if missing.

    Raises:
        ConfigError: On all ranks; names a host that does not see the files of rank 0.
    """
    name: list[Any] = [secrets.token_hex(8)]
    dist.broadcast_object_list(name)
    probe = folder / f".seen-by-all-{name[0]}"
    problem = _try_to_touch(probe) if dist.get_rank() == 0 else None
    dist.barrier()
    seen = probe.exists()
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (problem, socket.gethostname(), seen))
    if dist.get_rank() == 0:
        probe.unlink(missing_ok=True)
    if answers[0][0] is not None:
        raise ConfigError(f"job.dump_folder: {folder}: {answers[0][0]}")
    blind = [host for _, host, sees in answers if not sees]
    if blind:
        raise ConfigError(
            f"job.dump_folder: {folder}: files of rank 0 on {answers[0][1]} are not seen on "
            f"{blind[0]}; set it to a folder that all nodes share, or checkpoint.enable = false"
        )


def _try_to_touch(path: Path) -> str | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None


def _own_facts(job_config: JobConfig) -> Facts:
    packages = ("torchtitan", "numpy", "titan-shampoo")
    facts = {
        "host": socket.gethostname(),
        "WORLD_SIZE": os.environ.get("WORLD_SIZE", str(dist.get_world_size())),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in packages},
        "device": device_type,
    }
    settings = asdict(job_config)
    for table, keys in settings.items():
        for key, value in keys.items():
            if (table, key) != ("job", "config_file"):  # nodes may mount it elsewhere
                facts[f"the setting {table}.{key}"] = repr(value)
    return facts


def _shown(ranks: Sequence[int]) -> str:
    first = ", ".join(map(str, ranks[:4]))
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {first}{more}"
