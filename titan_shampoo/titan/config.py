"""torchtitan's ``JobConfig`` with this project's tables, filled from checked settings.

``titan_shampoo.config`` refuses every mistake before torch is imported; nothing is parsed here.
"""

from collections.abc import Sequence
from functools import reduce

from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as TorchtitanJobConfig

from titan_shampoo.config import ConfigError, Settings, check_world, read_config, tables

__all__ = [
    "ConfigError",
    "JobConfig",
    "check_world",
    "load_job_config",
    "make_job_config",
    "read_config",
]

# Same as torchtitan's parser for `job.custom_config_module`, which would also read the command
# line again.
JobConfig: type[TorchtitanJobConfig] = ConfigManager._merge_configs(
    TorchtitanJobConfig, tables.JobConfig
)


def load_job_config(args: Sequence[str]) -> TorchtitanJobConfig:
    """The job configuration for a command line without the program's name.

    Raises:
        ConfigError: If a setting is unknown, of the wrong type, out of range or contradictory.
    """
    return make_job_config(read_config(args))


def make_job_config(settings: Settings) -> TorchtitanJobConfig:
    """The settings as torchtitan's nested dataclasses, with ``optimizer.groups`` as ``Group``s."""
    job_config = JobConfig()
    for name, setting in settings.explicit.items():
        if "[" in name:  # a key in a list of tables, not a setting
            continue
        *outer, key = name.split(".")
        setattr(reduce(getattr, outer, job_config), key, setting.value)
    job_config.optimizer.groups = [tables.Group(**group) for group in settings["optimizer.groups"]]
    return job_config
