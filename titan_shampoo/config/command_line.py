"""The settings of the command line: ``--table.key value``, ``--table.key=value``, ``--table.flag``.

The forms are those of torchtitan's own parser: dashes and underscores are the same, a true-or-false
setting is a flag, and ``--table.no-flag`` unsets it.
"""

from collections.abc import Sequence

from titan_shampoo.config.checks import checked_value, unknown_key
from titan_shampoo.config.errors import ConfigError
from titan_shampoo.config.schema import Key, Table, job_schema
from titan_shampoo.config.settings import Setting
from titan_shampoo.config.values import from_text

PLACE = "command line"

_FLAGS = (bool, bool | None)

_SHORT = {"dry_run": "job.dry_run"}
"""Settings that may be written without their table."""

_CONFIG_FILE = ("config", "config_file")
"""What other programs call ``--job.config_file``."""


def read_command_line(args: Sequence[str]) -> dict[str, Setting]:
    """The settings by dotted name; a later one beats an earlier one.

    Raises:
        ConfigError: If an argument is no setting, is unknown, or has no value or a wrong one.
    """
    settings: dict[str, Setting] = {}
    remaining = list(args)
    while remaining:
        argument = remaining.pop(0)
        option, equals, text = argument.partition("=")
        if not option.startswith("--"):
            raise ConfigError(f"{PLACE}: {argument}: {_instead_of(argument)}")
        name, key, negated = _find(option.removeprefix("--").replace("-", "_"))
        if key.type in _FLAGS and not equals:
            text = _flag(remaining, negated)
        elif negated:
            raise ConfigError(f"{PLACE}: {option}: takes no value")
        elif not equals:
            text = _next_value(name, remaining)
        value = checked_value(name, key, from_text(text, key.type), PLACE)
        settings[name] = Setting(value, PLACE)
    return settings


def _instead_of(argument: str) -> str:
    """How to write what was given without the name of a setting."""
    if argument.endswith(".toml"):
        return f"write --job.config_file {argument}"
    return "settings are written --table.key value"


def _find(name: str) -> tuple[str, Key, bool]:
    """The setting of that name, and whether it was written with ``no_``."""
    name = _SHORT.get(name, name)
    if name in _CONFIG_FILE:
        raise ConfigError(f"{PLACE}: {name}: write --job.config_file")
    table, prefix = job_schema(), ""
    *outer, last = name.split(".")
    for part in outer:
        if part not in table.tables:
            raise unknown_key(part, table, prefix, PLACE)
        table, prefix = table.tables[part], f"{prefix}{part}."
    if last in table.keys:
        return name, table.keys[last], False
    positive = last.removeprefix("no_")
    if positive != last and positive in table.keys and table.keys[positive].type in _FLAGS:
        return prefix + positive, table.keys[positive], True
    if last in table.names():
        raise ConfigError(f"{PLACE}: {name}: is {_kind(last, table)}; set it in the TOML file")
    raise unknown_key(last, table, prefix, PLACE)


def _kind(name: str, table: Table) -> str:
    return "a list of tables" if name in table.lists else "a table"


def _flag(remaining: list[str], negated: bool) -> str:
    if not negated and remaining and remaining[0].lower() in ("true", "false", "none"):
        return remaining.pop(0)
    return "false" if negated else "true"


def _next_value(name: str, remaining: list[str]) -> str:
    if not remaining or remaining[0].startswith("--"):
        raise ConfigError(f"{PLACE}: {name}: its value is missing")
    return remaining.pop(0)
