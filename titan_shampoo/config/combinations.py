"""Settings that are each right but contradict one another."""

import os
from pathlib import Path

from titan_shampoo.config.methods import check_methods
from titan_shampoo.config.precedence import EITHER
from titan_shampoo.config.settings import Settings
from titan_shampoo.config.unread import check_read
from titan_shampoo.config.values import show
from titan_shampoo.data.paths import (
    ALL_DIGITS,
    DEFAULT_IMAGE_SIZE,
    DIGITS,
    PYTHON_STDLIB,
    missing_path,
)

# Degrees above 1 for which a model has no plan; only the mixture has experts, and is not cut else.
# A model that is not named here is only sharded and replicated, as the ResNet is.
_CUTS = ("context", "pipeline", "tensor")
_ALL = (*_CUTS, "expert")
_NOT_PLANNED = {"resnet": _ALL, "llama3": ("expert",), "llama4": _CUTS}


def check_combinations(settings: Settings) -> None:
    """Refuse settings that do not go together.

    Raises:
        ConfigError: Naming the first pair found and which of the two to change.
    """
    check_read(settings)
    check_methods(settings)
    _check_names(settings)
    _check_dataloader(settings)
    _check_folders(settings)
    _check_data(settings)
    _check_model(settings)
    _check_kind_of_data(settings)
    _check_images(settings)
    _check_schedule(settings)
    _check_stream(settings)
    if settings["validation.enable"]:
        _check_windows(settings)
        _check_pipeline(settings)


# Keys that name files or folders.
_PATHS = (
    "checkpoint.folder",
    "checkpoint.initial_load_path",
    "comm.save_traces_folder",
    "job.dump_folder",
    "job.save_config_file",
    "metrics.save_tb_folder",
    "model.hf_assets_path",
    "profiling.save_memory_snapshot_folder",
    "profiling.save_traces_folder",
    "training.dataset",
    "validation.dataset",
)
_LONGEST_NAME = 255


def _check_names(settings: Settings) -> None:
    """Refuse what no file system can name; asking it would raise."""
    for key in _PATHS:
        for name in (settings[key] or "").split("/"):
            if len(name.encode()) > _LONGEST_NAME:
                problem = f"expected at most {_LONGEST_NAME} bytes between two slashes"
                raise settings.error(key, f"got {show(name)}, {problem}")


def _check_dataloader(settings: Settings) -> None:
    workers, prefetch = "training.dataloader.num_workers", "training.dataloader.prefetch_factor"
    if settings[prefetch] and not settings[workers]:
        raise settings.error(prefetch, f"needs {workers} greater than 0")


def _check_folders(settings: Settings) -> None:
    for key in ("model.hf_assets_path", "checkpoint.initial_load_path"):
        if settings[key] and not os.path.isdir(settings[key]):  # noqa: PTH112 (never raises)
            raise settings.error(key, f"no such folder: {settings[key]}")


def _check_data(settings: Settings) -> None:
    for key in ("training.dataset", "validation.dataset"):
        problem = missing_path(settings[key]) if settings[key] else None
        if problem is not None:
            raise settings.error(key, f'"{settings[key]}": {problem}')


def _check_kind_of_data(settings: Settings) -> None:
    """Images for a network that sees, text for one that reads, where the name tells which it is."""
    sees = settings["model.name"] == "resnet"
    foreign, remedy = (
        ((PYTHON_STDLIB,), f'a folder of images, or "{DIGITS}"')
        if sees
        else (ALL_DIGITS, f'a text, or "{PYTHON_STDLIB}"')
    )
    for key in ("training.dataset", "validation.dataset"):
        if settings[key] in foreign:
            model, kind = settings["model.name"], "text" if sees else "images"
            problem = f'"{settings[key]}" is {kind}, which model.name = "{model}" does not read'
            raise settings.error(key, f"{problem}; set it to {remedy}")


def _check_model(settings: Settings) -> None:
    model = settings["model.name"]
    for kind in _NOT_PLANNED.get(model, _ALL):
        key = f"parallelism.{kind}_parallel_degree"
        if settings[key] > 1:
            raise settings.error(key, f'got {settings[key]}, but model.name = "{model}" needs 1')


def _check_images(settings: Settings) -> None:
    size = settings["images.size"] or DEFAULT_IMAGE_SIZE
    resize = settings["images.resize"]
    if settings["training.dataset"] not in ALL_DIGITS and resize is not None and resize < size:
        wanted = f"expected at least images.size ({size})"
        raise settings.error("images.resize", f"got {resize}, {wanted}")
    if settings["images.mixup"] and settings["training.local_batch_size"] % 2:
        got = settings["training.local_batch_size"]
        raise settings.error("training.local_batch_size", f"got {got}, images.mixup needs pairs")


_DECAY = ("decay_ratio", "decay_type", "min_lr_factor", "total_steps")


def _check_schedule(settings: Settings) -> None:
    for epochs, steps in EITHER:
        if settings.says(epochs) and settings.says(steps):
            raise settings.error(epochs, f"is instead of {steps}; remove one of the two")
    steps = settings["lr_scheduler.milestones"] or settings["lr_scheduler.milestone_epochs"]
    for key in _DECAY:
        if steps and settings.is_changed(f"lr_scheduler.{key}"):
            problem = "is not read with milestones; remove it or them"
            raise settings.error(f"lr_scheduler.{key}", problem)
    if settings.is_changed("lr_scheduler.factor") and not steps:
        raise settings.error("lr_scheduler.factor", "needs lr_scheduler.milestones")


# What needs to know how much data there is, or a data set with an index.
_NOT_OF_STREAMS = (
    "lr_scheduler.milestone_epochs",
    "lr_scheduler.warmup_epochs",
    "training.dataloader.num_workers",
    "training.dataloader.pin_memory",
    "training.epochs",
)


def _check_stream(settings: Settings) -> None:
    if not settings["training.streaming"]:
        if settings.is_changed("training.stream_lanes"):
            raise settings.error("training.stream_lanes", "needs training.streaming = true")
        return
    for key in _NOT_OF_STREAMS:
        if settings.is_changed(key):
            raise settings.error(key, "is not read with training.streaming = true; remove it")
    source = settings["training.dataset"]
    if settings["model.name"] == "resnet":
        raise settings.error("training.streaming", 'needs model.name = "llama3" or "llama4"')
    if source == PYTHON_STDLIB or Path(source).is_file():
        problem = f'training.dataset = "{source}" is no name or folder of a data set'
        raise settings.error("training.streaming", f"{problem}; remove one of the two")
    if settings["validation.enable"] and settings["validation.steps"] == -1:
        raise settings.error("validation.steps", "needs a number with training.streaming = true")


def _check_windows(settings: Settings) -> None:
    """The model has positions for the windows of training, and no more."""
    key, got, longest = "validation.seq_len", *_lengths(settings)
    if got > longest:
        raise settings.error(key, f"got {got}, expected at most training.seq_len ({longest})")


def _check_pipeline(settings: Settings) -> None:
    """Stages of older torch keep the buffers of the first batch: all others have its shape."""
    if settings["parallelism.pipeline_parallel_degree"] == 1:
        return
    batches = [settings[f"{table}.local_batch_size"] for table in ("validation", "training")]
    for key, (got, wanted) in {"seq_len": _lengths(settings), "local_batch_size": batches}.items():
        if got != wanted:
            problem = f"got {got}, expected training.{key} ({wanted}), as a pipeline needs"
            raise settings.error(f"validation.{key}", problem)


def _lengths(settings: Settings) -> tuple[int, int]:
    """Sequence lengths of validation and of training."""
    training = settings["training.seq_len"]
    return settings["validation.seq_len"] or training, training
