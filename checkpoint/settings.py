"""Checks of ``[checkpoint]``, and comparison of the settings of two attempts.

Hyper-parameters may change between attempts: the TOML file wins, and each change is logged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.errors import CheckpointError

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


def check_settings(config: Any, components: Sequence[str]) -> None:  # noqa: ANN401 (merged dataclass)
    """Refuse settings that the hardware or the run does not support.

    Args:
        config: The ``[checkpoint]`` table.
        components: Names of the components of the run's state.

    Raises:
        CheckpointError: With the setting to change.
    """
    if config.async_mode == "async_with_pinned_mem" and not _has_accelerator():
        raise CheckpointError(
            'checkpoint.async_mode = "async_with_pinned_mem" needs a GPU; set it to "async"'
        )
    if config.initial_load_in_hf_quantized:
        raise CheckpointError(
            "checkpoint.initial_load_in_hf_quantized: no model here can be read from quantized "
            "files; remove it"
        )
    unknown = sorted(set(config.exclude_from_loading) - set(components))
    if unknown:
        raise CheckpointError(
            f"checkpoint.exclude_from_loading: {', '.join(unknown)}: no such component; there "
            f"are: {', '.join(components)}"
        )


def _has_accelerator() -> bool:
    import torch  # noqa: PLC0415 (python -m checkpoint diff needs the rest of this module only)

    return torch.accelerator.is_available()
