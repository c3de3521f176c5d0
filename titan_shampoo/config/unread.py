"""Settings that nobody would read: accepting them in silence would be a lie.

torchtitan offers them, but its trainer as it is used here, or the recipe, never looks at them.
Its own defaults may be written down.
"""

from collections.abc import Mapping

from titan_shampoo.config.settings import Settings
from titan_shampoo.data.paths import ALL_DIGITS

# Keys, and tables for all of their keys.
NOT_READ: Mapping[str, str] = {
    "checkpoint.create_seed_checkpoint": "not needed: initial weights do not depend on the mesh",
    "checkpoint.enable_ft_dataloader_checkpoints": "not supported by this trainer; remove it",
    "checkpoint.initial_load_in_hf_quantized": "no model here reads quantized weights; remove it",
    "experimental.custom_args_module": "not read: the tables of this project are always there",
    "fault_tolerance": "not supported by this trainer; remove it",
    "job.custom_config_module": "not read: the tables of this project are always there",
    "job.print_config": "not printed; set job.save_config_file to a file name instead",
    "memory_estimation": "not supported by this trainer; remove it",
    "model.print_after_conversion": "not printed; remove it",
    "model.tokenizer_path": "not read; set model.hf_assets_path to the tokenizer's folder",
    "optimizer.early_step_in_backward": "no optimizer here steps in the backward pass; remove it",
    "parallelism.context_parallel_rotate_method": "not read by torchtitan 0.2.2; remove it",
    "parallelism.expert_parallel_comm_backend": "not supported by this trainer; remove it",
    "training.dataloader.persistent_workers": "not read; remove it",
    "training.dataset_path": "not read; set training.dataset to the path itself",
    "validation.dataloader.persistent_workers": "not read; remove it",
    "validation.dataloader.pin_memory": "not read; remove it",
    "validation.dataloader.prefetch_factor": "not read; remove it",
    "validation.dataset_path": "not read; set validation.dataset to the path itself",
}

_NOT_READ_BY_MODEL: Mapping[str, tuple[str, ...]] = {
    "resnet": (
        "debug.moe_force_load_balance",
        "model.hf_assets_path",
        "training.document_separators",
        "training.seq_len",
        "validation.seq_len",
    ),
    "llama3": ("debug.moe_force_load_balance", "images"),
    "llama4": ("images",),
}

# The digits are normalised squares already, and their mirror images are no digits.
_NOT_READ_BY_DIGITS = tuple(
    f"images.{key}" for key in ("resize", "min_area", "flip", "mean", "std")
)

# Read only where the second key is true.
_NEEDS = (
    ("checkpoint.export_dtype", "checkpoint.last_save_model_only"),
    ("checkpoint.last_save_in_hf", "checkpoint.last_save_model_only"),
    ("checkpoint.initial_load_in_hf", "checkpoint.initial_load_model_only"),
)


def is_read(name: str) -> bool:
    """Whether anything looks at the setting of that dotted name."""
    return name not in NOT_READ and name.rpartition(".")[0] not in NOT_READ


def check_read(settings: Settings) -> None:
    """Refuse settings without effect.

    Raises:
        ConfigError: Naming the first one found and what to do instead.
    """
    model, source = settings["model.name"], settings["training.dataset"]
    for name in settings.explicit:
        problem = NOT_READ.get(name) or NOT_READ.get(name.rpartition(".")[0])
        if {name, name.partition(".")[0]} & set(_NOT_READ_BY_MODEL.get(model, ())):
            problem = f'not read by model.name = "{model}"; remove it'
        if name in _NOT_READ_BY_DIGITS and source in ALL_DIGITS:
            problem = f'not read with training.dataset = "{source}"; remove it'
        if problem and settings.is_changed(name):
            raise settings.error(name, problem)
    for name, needed in _NEEDS:
        if settings.is_changed(name) and not settings[needed]:
            raise settings.error(name, f"needs {needed} = true")
