"""The configuration of a run, checked in a fraction of a second, before torch is imported.

Every key of torchtitan's tables and of ours is known by name, type and range; a mistake is one line
that says where it is, which key, what was found, what is wanted, and the nearest valid name.
"""

import os
import sys
from collections.abc import Sequence

from titan_shampoo.config.combinations import check_combinations
from titan_shampoo.config.command_line import read_command_line
from titan_shampoo.config.errors import ConfigError, nearest
from titan_shampoo.config.folder import check_dump_folder
from titan_shampoo.config.help import help_text
from titan_shampoo.config.launch import check_launch, started_ranks
from titan_shampoo.config.planning import PlanRequest, read_plan_request
from titan_shampoo.config.precedence import merged
from titan_shampoo.config.settings import Settings
from titan_shampoo.config.toml_file import read_toml
from titan_shampoo.config.world import check_world
from titan_shampoo.extras import require

__all__ = [
    "ConfigError",
    "PlanRequest",
    "Settings",
    "check_dump_folder",
    "check_launch",
    "check_world",
    "nearest",
    "read_config",
    "read_plan_request",
    "started_ranks",
]


def read_config(args: Sequence[str]) -> Settings:
    """The checked settings of the file ``--job.config_file`` and of the command line, which wins.

    Args:
        args: The command line without the program's name.

    Raises:
        ConfigError: If anything is unknown, of the wrong type, out of range or contradictory.
        MissingExtraError: If the packages of the extra ``train`` that it needs are not installed.
        SystemExit: With 0 after ``--help``, which the first rank prints.
    """
    require("a configuration", "tomli", "torchtitan")
    if "--help" in args or "-h" in args:
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.write(help_text() + "\n")
        raise SystemExit(0)
    overrides = read_command_line(args)
    file = overrides["job.config_file"].value if "job.config_file" in overrides else None
    settings = merged(read_toml(file) if file else {}, overrides, file)
    check_combinations(settings)
    return settings
