"""Whether one setting is known, of the right type and in range; if not, what would be right."""

from typing import Any

from titan_shampoo.config.errors import BREAKING, ConfigError, nearest
from titan_shampoo.config.limits import LIMITS, largest
from titan_shampoo.config.schema import Key, Table, job_schema
from titan_shampoo.config.values import WrongTypeError, accept, choices, describe, show

_LONGEST_TEXT = 4095
"""Characters of the longest path that Linux takes."""


def checked_value(name: str, key: Key, value: Any, place: str) -> Any:  # noqa: ANN401
    """``value`` for the setting ``name``, converted to its type.

    Args:
        name: Dotted name as a person knows it, ``optimizer.groups[0].lr`` for one of a list.
        key: The setting.
        value: What was found.
        place: Where: ``file:line``, or "command line".

    Raises:
        ConfigError: If the type is wrong or the value out of range.
    """
    try:
        accepted = accept(value, key.type)
    except WrongTypeError:
        hint = nearest(value, choices(key.type)) if isinstance(value, str) else ""
        raise _unexpected(name, value, place, describe(key.type) + hint) from None
    for item in accepted if isinstance(accepted, list) else [accepted]:
        if problem := _too_much(item, largest(name)):
            raise _unexpected(name, value, place, problem)
    limit = LIMITS.get(_without_index(name))
    if limit and accepted is not None and not limit.holds(accepted):
        raise _unexpected(name, value, place, limit.words)
    return accepted


def unknown_key(name: str, table: Table, prefix: str, place: str) -> ConfigError:
    """The error for ``name``, unknown inside ``table``, whose dotted name is ``prefix``."""
    hint = nearest(name, table.names()) or _same_name_elsewhere(name)
    hint = hint or f"; valid here: {', '.join(table.names())}"
    kind = "key" if prefix else "table"
    return ConfigError(f"{place}: {prefix}{name}: unknown {kind}{hint}")


def wrong_kind(name: str, value: Any, place: str, expected: str) -> ConfigError:  # noqa: ANN401
    """The error for a value where a table is wanted, or a table where a list of them is."""
    return _unexpected(name, value, place, expected)


def _unexpected(name: str, value: Any, place: str, expected: str) -> ConfigError:  # noqa: ANN401
    return ConfigError(f"{place}: {name}: got {show(value)}, expected {expected}")


def _too_much(item: Any, most: int) -> str:  # noqa: ANN401
    """What is wanted in place of a number or a text that nothing can hold; empty if it is fine."""
    if type(item) is int and abs(item) > most:
        return f"at most {most}" if item > 0 else f"at least {-most}"
    if isinstance(item, str) and BREAKING.search(item):
        return "text in one line, without control characters, in UTF-8"
    if isinstance(item, str) and len(item) > _LONGEST_TEXT:
        return f"at most {_LONGEST_TEXT} characters"
    return ""


def _same_name_elsewhere(name: str) -> str:
    found = [f'"{key}"' for key, _ in job_schema().walk() if key.rpartition(".")[2] == name]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _without_index(name: str) -> str:
    """``optimizer.groups[3].lr`` -> ``optimizer.groups.lr``."""
    head, bracket, tail = name.partition("[")
    return head + tail.partition("]")[2] if bracket else name
