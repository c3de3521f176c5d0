"""Comparison of the order of a run's data with the order in which a checkpoint's were read.

Data are a function of the seed and the number of samples consumed. With another seed, data set or
length of windows the order is another one: a position in it repeats some samples and misses others.
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
    "validation.dataset": lambda of: bool(of["validation.dataset"]),  # else some are held out
}
"""Settings that give the data their order, each with its value as the order sees it."""


def order_differences(
    record: Mapping[str, Any], settings: Settings, num_samples: int | None
) -> str:
    """Name what gives the data another order than they had in a checkpoint; empty if nothing does.

    Args:
        record: Of the checkpoint.
        settings: Of this run, by dotted name.
        num_samples: Size of this run's data set, if it is known.
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
