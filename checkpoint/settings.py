"""Hyper-parameters may change between two attempts: the TOML file wins, and each change is said."""

from collections.abc import Mapping
from typing import Any

_NOT_HYPERPARAMETERS = (
    "checkpoint.initial_load_path",
    "checkpoint.load_step",
    "job.config_file",
    "job.description",
    "job.dump_folder",
)
_SHOWN = 60


def settings_differences(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    places: tuple[str, str] = ("in the checkpoint", "now"),
) -> list[str]:
    """One line per setting that has changed since a checkpoint was saved."""
    return [
        f"{key}: {_shown(saved, key)} {places[0]}, {_shown(now, key)} {places[1]}"
        for key in sorted(saved.keys() | now.keys())
        if key not in _NOT_HYPERPARAMETERS and saved.get(key) != now.get(key)
    ]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    text = repr(settings[key]) if key in settings else "not known"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
