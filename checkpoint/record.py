"""Description of a run in its checkpoints: time, software, settings, ranks."""

import dataclasses
import os
import platform
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

_PACKAGES = ("titan-shampoo", "torch", "torchtitan", "safetensors", "numpy")


def describe_run(step: int, run: str, kind: str) -> dict[str, Any]:
    """The head of a manifest.

    Args:
        step: The last step done.
        run: Identifier of the run, kept over all resumes.
        kind: "full" if it can be resumed, "model" if it holds weights only.
    """
    accelerator = torch.accelerator.current_accelerator()
    return {
        "kind": kind,
        "step": step,
        "run": run,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": _software(),
        "world": {
            "ranks": dist.get_world_size() if dist.is_initialized() else 1,
            "device": "cpu" if accelerator is None else accelerator.type,
            "threads": torch.get_num_threads(),
            "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        },
    }


def flattened(job_config: Any) -> dict[str, Any]:  # noqa: ANN401 (a dataclass made at run time)
    """Settings by dotted name, as plain JSON values."""
    return dict(_flat("", dataclasses.asdict(job_config)))


def _flat(prefix: str, table: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += _flat(f"{prefix}{key}.", value)
        else:
            found.append((prefix + key, _plain(value)))
    return found


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)  # JSON has no infinity
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


@cache
def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
