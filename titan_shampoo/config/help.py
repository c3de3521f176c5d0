"""The text of ``--help``: every key with its type, default and meaning."""

import textwrap
from collections.abc import Iterator

from titan_shampoo.config.schema import REQUIRED, Key, Table, job_schema
from titan_shampoo.config.unread import is_read
from titan_shampoo.config.values import describe, show

_USAGE = """\
usage: torchrun --nproc_per_node=N train.py --job.config_file FILE [--table.key VALUE ...]
       python train.py --plan [--world-size N] [--json] --job.config_file FILE [...]

--plan starts nothing: it prints memory, arithmetic and messages of every rank.

--dry-run builds everything, takes one step, and writes nothing but the cache of tokens.
docs/reference.md has the same keys as a page; `python -m titan_shampoo.plot RUN ...` draws finished
runs side by side.

Every key below may stand in the TOML file, or on the command line as --table.key VALUE
(--table.flag and --table.no-flag for what is true or false). The command line wins.
"""


def help_text() -> str:
    """All tables, and their keys but for those that are refused."""
    return "\n".join([_USAGE, *_table_lines(job_schema(), "", "")])


def _table_lines(table: Table, name: str, brackets: str) -> Iterator[str]:
    read = {key: setting for key, setting in table.keys.items() if is_read(f"{name}.{key}")}
    if read:
        yield f"{brackets.replace('name', name)}"
        for key, setting in read.items():
            yield from _key_lines(key, setting)
        yield ""
    prefix = f"{name}." if name else ""
    for inner, content in table.tables.items():
        yield from _table_lines(content, prefix + inner, "[name]")
    for inner, content in table.lists.items():
        yield from _table_lines(content, prefix + inner, "[[name]]   (in the TOML file only)")


def _key_lines(name: str, key: Key) -> Iterator[str]:
    yield f"  {name}: {describe(key.type)}; {_default(key)}"
    yield from textwrap.wrap(key.help, 96, initial_indent="      ", subsequent_indent="      ")


def _default(key: Key) -> str:
    if key.default is REQUIRED:
        return "required"
    return "not set by default" if key.default is None else f"default {show(key.default)}"
