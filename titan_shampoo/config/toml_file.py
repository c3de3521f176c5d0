"""The settings of a TOML file, each with the line on which it stands.

The TOML parser gives values without lines, so the text is scanned once more for table headers and
for keys at the start of a line. A key that this scan does not see (inside an inline table) is
reported at the line of its table.
"""

import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_shampoo.config.checks import checked_value, unknown_key, wrong_kind
from titan_shampoo.config.errors import ConfigError
from titan_shampoo.config.schema import REQUIRED, Table, job_schema
from titan_shampoo.config.settings import Setting

_HEADER = re.compile(r"\s*(\[\[?)([^\[\]]+)\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*([\w"'][\w"'.\- ]*?)\s*=""")
_DIGITS = re.compile(r"[0-9_]{4300}")
_BRACKETS = re.compile(r"(?:[\[{][^\[{\]}\n]*){100}|(?:[^.\n]*\.){100}")

_LARGEST = 2**20
"""Bytes of a configuration."""

_SCANNED = 400
"""Characters of a line in which its key is looked for: blanks without end take time without end."""


def read_toml(path: str) -> dict[str, Setting]:
    """The settings of the file by dotted name.

    Raises:
        ConfigError: If the file cannot be read or parsed, or has an unknown key or a wrong value.
    """
    import tomli  # noqa: PLC0415  (of the extra: without it the package imports, too)

    text = _read_text(path)
    try:
        data = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid TOML: {error.msg}") from None
    except RecursionError:
        line = _line_of(_BRACKETS, text)
        raise ConfigError(f"{path}:{line}: not valid TOML: nested too deeply") from None
    except ValueError:  # of int()
        line = _line_of(_DIGITS, text)
        problem = "an integer of thousands of digits"
        raise ConfigError(f"{path}:{line}: not valid TOML: {problem}") from None
    checker = _Checker(_Places(path, _lines(text, data)))
    settings = dict(checker.settings(data, job_schema(), ""))
    if itself := settings.get("job.config_file"):
        problem = "is this file; name it on the command line only"
        raise ConfigError(f"{itself.place}: job.config_file: {problem}")
    return settings


def _read_text(path: str) -> str:
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe or a device may never end
            reason = "a folder, pipe, socket or device, expected a file"
            raise ConfigError(f"command line: job.config_file: cannot read {path}: {reason}")
        with Path(path).open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            reason = f"larger than {_LARGEST} bytes, which no configuration is"
            raise ConfigError(f"command line: job.config_file: cannot read {path}: {reason}")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"command line: job.config_file: no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = str(error.strerror) if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"command line: job.config_file: cannot read {path}: {reason}") from None


def _line_of(pattern: re.Pattern[str], text: str) -> int:
    """The first line in which the pattern is found, 1 if there is none."""
    found = pattern.search(text)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def _lines(text: str, data: Mapping[str, Any]) -> dict[str, int]:
    """Dotted name -> line, for headers and keys; ``optimizer.groups[1].lr`` in a list of tables."""
    lines: dict[str, int] = {}
    seen: Counter[str] = Counter()
    prefix = ""
    for number, line in enumerate(text.splitlines(), start=1):
        start = line[:_SCANNED]
        if header := _HEADER.match(start):
            name = _plain(header[2])
            if name.partition(".")[0] not in data:  # the last line of a nested array looks like one
                continue
            if header[1] == "[[":
                seen[name] += 1
                name = f"{name}[{seen[name] - 1}]"
            lines.setdefault(name, number)
            prefix = f"{name}."
        elif key := _KEY.match(start):
            lines.setdefault(prefix + _plain(key[1]), number)
    return lines


def _plain(name: str) -> str:
    """A dotted TOML name without blanks and quotes."""
    return re.sub(r"""[\s"']""", "", name)


@dataclass(frozen=True, slots=True)
class _Places:
    path: str
    lines: Mapping[str, int]

    def __getitem__(self, name: str) -> str:
        """``file:line`` of the key, or else of the innermost table around it."""
        while name and name not in self.lines:
            name = name[: max(name.rfind("."), name.rfind("["), 0)]
        return f"{self.path}:{self.lines[name]}" if name else self.path


@dataclass(frozen=True, slots=True)
class _Checker:
    places: _Places

    def settings(
        self, data: Mapping[str, Any], table: Table, prefix: str
    ) -> Iterator[tuple[str, Setting]]:
        """Every setting in the parsed table ``data``, checked, with its dotted name."""
        for key, value in data.items():
            name = prefix + key
            place = self.places[name]
            if key in table.keys:
                yield name, Setting(checked_value(name, table.keys[key], value, place), place)
            elif key in table.tables:
                if not isinstance(value, dict):
                    raise wrong_kind(name, value, place, f"a table, written [{name}]")
                yield from self.settings(value, table.tables[key], f"{name}.")
            elif key in table.lists:
                yield from self._list(value, table.lists[key], name)
            else:
                raise unknown_key(key, table, prefix, place)

    def _list(self, value: Any, table: Table, name: str) -> Iterator[tuple[str, Setting]]:  # noqa: ANN401
        """Every setting in a list of tables, then the whole list as one setting."""
        if not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            expected = f"a list of tables, each written [[{name}]]"
            raise wrong_kind(name, value, self.places[name], expected)
        items = []
        for index, data in enumerate(value):
            prefix = f"{name}[{index}]."
            settings = dict(self.settings(data, table, prefix))
            for key, schema in table.keys.items():
                if schema.default is REQUIRED and prefix + key not in settings:
                    raise ConfigError(f"{self.places[prefix[:-1]]}: {prefix}{key}: is missing")
            yield from settings.items()
            items.append({key.removeprefix(prefix): s.value for key, s in settings.items()})
        yield name, Setting(items, self.places[f"{name}[0]"])
