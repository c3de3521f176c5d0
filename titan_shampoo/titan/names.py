"""Checks of settings that name something; made before anything is built."""

from importlib.util import find_spec

from torch._dynamo import list_backends
from torchtitan.config import JobConfig
from torchtitan.protocols.model_converter import _registry_model_converter_cls

from titan_shampoo.config.errors import ConfigError, nearest


def check_names(job_config: JobConfig) -> None:
    """Refuse unknown names of converters, compilers and packages.

    Raises:
        ConfigError: With the key and the known names.
    """
    for name in job_config.model.converters:
        _check("model.converters", name, sorted(_registry_model_converter_cls))
    if job_config.compile.enable:
        _check("compile.backend", job_config.compile.backend, list_backends(exclude_tags=()))
    # torchtitan would only log it, and train without.
    if job_config.metrics.enable_wandb and find_spec("wandb") is None:
        raise ConfigError(
            "metrics.enable_wandb = true: the package wandb is not installed; pip install wandb, "
            "or set metrics.enable_tensorboard = true instead"
        )


def _check(key: str, name: str, known: list[str]) -> None:
    if name not in known:
        problem = f"unknown; there are {', '.join(known)}{nearest(name, known)}"
        raise ConfigError(f'{key} = "{name}": {problem}')
