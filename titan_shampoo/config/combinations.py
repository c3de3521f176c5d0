"""Settings that are each right but contradict one another, or that nobody would read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_shampoo.config.settings import Settings

# What torchtitan offers and this trainer does not read: silence would be a lie.
_NOT_READ = {
    "experimental.custom_args_module": "the tables of this project are always there; remove it",
    "fault_tolerance.enable": "not supported by this trainer; remove it",
    "job.custom_config_module": "the tables of this project are always there; remove it",
    "memory_estimation.enable": "not supported by this trainer; remove it",
    "model.tokenizer_path": "not read; set model.hf_assets_path to the tokenizer's folder",
    "optimizer.early_step_in_backward": "no optimizer here steps in the backward pass; remove it",
    "training.dataloader.persistent_workers": "not read; remove it",
    "training.dataset_path": "not read; set training.dataset to the path itself",
    "validation.dataloader.persistent_workers": "not read; remove it",
    "validation.dataloader.pin_memory": "not read; remove it",
    "validation.dataloader.prefetch_factor": "not read; remove it",
    "validation.dataset_path": "not read; set validation.dataset to the path itself",
}

_READ_BY = {
    "lr": {"Shampoo", "AdamW", "SGD"},
    "weight_decay": {"Shampoo", "AdamW", "SGD"},
    "beta1": {"Shampoo", "AdamW"},
    "beta2": {"Shampoo", "AdamW"},
    "eps": {"Shampoo", "AdamW"},
    "implementation": {"AdamW", "SGD"},
}

_NEEDS_GRAFTING = {
    "grafting_eps": {"adagrad", "rmsprop", "adam"},
    "grafting_beta2": {"rmsprop", "adam"},
}

# The ResNet has no sequence to cut and no plan for its weights beyond data parallelism.
_TRANSFORMER_ONLY = (
    "parallelism.context_parallel_degree",
    "parallelism.expert_parallel_degree",
    "parallelism.pipeline_parallel_degree",
    "parallelism.tensor_parallel_degree",
)


def check_combinations(settings: Settings) -> None:
    """Refuse settings that do not go together.

    Raises:
        ConfigError: Naming the first pair found and which of the two to change.
    """
    _check_read_at_all(settings)
    _check_read_by_a_method(settings)
    _check_patterns(settings)
    _check_shampoo(settings)
    _check_momentum(settings, "optimizer.shampoo")
    _check_momentum(settings, "optimizer.sgd")
    _check_sgd(settings)
    _check_dataloader(settings)
    _check_folders(settings)
    _check_model(settings)


def _check_read_at_all(settings: Settings) -> None:
    for key, problem in _NOT_READ.items():
        if settings[key]:
            raise settings.error(key, problem)


def _check_read_by_a_method(settings: Settings) -> None:
    """A shared key is refused if neither the method nor that of a group reads it."""
    methods = {settings["optimizer.name"], *_group_methods(settings)}
    for key, readers in _READ_BY.items():
        name = f"optimizer.{key}"
        if settings.is_set(name) and not methods & readers:
            method = settings["optimizer.name"]
            raise settings.error(name, f"is not read by {method}; remove it{_own_key(method, key)}")


def _group_methods(settings: Settings) -> Iterator[str]:
    for group in settings["optimizer.groups"]:
        yield group.get("optimizer") or settings["optimizer.name"]


def _own_key(method: str, key: str) -> str:
    return " or set optimizer.sgd.momentum" if (method, key) == ("SGD", "beta1") else ""


def _check_patterns(settings: Settings) -> None:
    for index, group in enumerate(settings["optimizer.groups"]):
        try:
            re.compile(group["pattern"])
        except re.error as error:
            name = f"optimizer.groups[{index}].pattern"
            raise settings.error(name, f"not a regular expression: {error}") from None


def _check_shampoo(settings: Settings) -> None:
    def own(key: str) -> Any:  # noqa: ANN401  (each key has its own type)
        return settings[f"optimizer.shampoo.{key}"]

    if own("eps") is not None and own("eps_relative") is not None:
        problem = "is instead of optimizer.shampoo.eps; remove one of the two"
        raise settings.error("optimizer.shampoo.eps_relative", problem)
    grafting = own("grafting") or "adam"
    for key, readers in _NEEDS_GRAFTING.items():
        if own(key) is not None and grafting not in readers:
            problem = f'is not read by optimizer.shampoo.grafting = "{grafting}"; remove it'
            raise settings.error(f"optimizer.shampoo.{key}", problem)
    _check_grafting_moments(settings, grafting)


def _check_grafting_moments(settings: Settings, grafting: str) -> None:
    """A factor that sums (decay 1) is fine, a second moment of Adam that sums is not."""
    betas, own = settings["optimizer.shampoo.betas"], "optimizer.shampoo.grafting_beta2"
    inherited = betas[1] if betas else settings["optimizer.beta2"]
    if grafting in _NEEDS_GRAFTING["grafting_beta2"] and (settings[own] or inherited) == 1:
        key = own if settings[own] else "optimizer.shampoo.betas"
        problem = f'grafting = "{grafting}" needs a second moment below 1; set {own} = 0.99'
        raise settings.error(key, problem)


def _check_momentum(settings: Settings, table: str) -> None:
    if settings[f"{table}.momentum"]:
        return
    for key in ("nesterov", "dampening"):
        if settings[f"{table}.{key}"]:
            raise settings.error(f"{table}.{key}", f"needs {table}.momentum greater than 0")


def _check_sgd(settings: Settings) -> None:
    if settings["optimizer.sgd.nesterov"] and settings["optimizer.sgd.dampening"]:
        raise settings.error("optimizer.sgd.nesterov", "needs optimizer.sgd.dampening = 0")


def _check_dataloader(settings: Settings) -> None:
    workers, prefetch = "training.dataloader.num_workers", "training.dataloader.prefetch_factor"
    if settings[prefetch] and not settings[workers]:
        raise settings.error(prefetch, f"needs {workers} greater than 0")


def _check_folders(settings: Settings) -> None:
    for key in ("model.hf_assets_path", "checkpoint.initial_load_path"):
        if settings[key] and not Path(settings[key]).is_dir():
            raise settings.error(key, f"no such folder: {settings[key]}")


def _check_model(settings: Settings) -> None:
    for key in _TRANSFORMER_ONLY:
        if settings["model.name"] == "resnet" and settings[key] > 1:
            raise settings.error(key, f'got {settings[key]}, but model.name = "resnet" needs 1')
