"""Comparison of the data order of a run with that of a checkpoint.

Data are a function of the seed and the number of samples consumed. Another seed, data set or window
length gives another order, in which the saved position repeats some samples and misses others.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Settings = Mapping[str, Any]

_ORDER: Mapping[str, Callable[[Settings], Any]] = {
    "training.dataset": lambda of: of["training.dataset"] or "",
    "training.streaming": lambda of: of["training.streaming"],
    "training.stream_lanes": lambda of: (
        of.get("training.streaming") and of["training.stream_lanes"]
    ),
    "training.seq_len": lambda of: of["training.seq_len"],
    "model.hf_assets_path": lambda of: of["model.hf_assets_path"] or "",
    "debug.seed": lambda of: of["debug.seed"] or 0,
    "validation.dataset": lambda of: bool(of["validation.dataset"]),  # otherwise 5% are held out
}
"""Settings that determine the order of the data, each with the part of its value that does."""


def order_differences(
    record: Mapping[str, Any], settings: Settings, num_samples: int | None
) -> str:
    """Describe the settings that have changed the order of the data; empty if none has.

    Args:
        record: Record of the checkpoint.
        settings: Settings of this run, by dotted name.
        num_samples: Size of this run's data set; None if unknown.
    """
    found = list(_differences(record.get("settings", {}), settings))
    saved = record.get("num_samples")
    if not found and None not in (saved, num_samples) and saved != num_samples:
        found = [f"the data set: {saved} samples in the checkpoint, {num_samples} now"]
    return ", ".join(found)


def _differences(saved: Settings, now: Settings) -> Iterator[str]:
    for key, meaning in _ORDER.items():
        if key in saved and key in now and meaning(saved) != meaning(now):
            yield f"{key}: {saved[key]!r} in the checkpoint, {now[key]!r} now"
