"""The reference page of all settings, ``docs/reference.md``, made of what is checked and parsed.

python -m titan_shampoo.config --reference > docs/reference.md
"""

from collections.abc import Iterator

from titan_shampoo.config.limits import LIMITS
from titan_shampoo.config.schema import REQUIRED, Key, Table, job_schema
from titan_shampoo.config.unread import is_read
from titan_shampoo.config.values import describe, show

_HEAD = """\
# Settings

Every key of a TOML file, with its type and range, its default and its meaning. Any of them may
also be given on the command line, as `--table.key VALUE` (`--table.flag` and `--table.no-flag` for
what is true or false), but for those in lists of tables. This page is made by

    python -m titan_shampoo.config --reference > docs/reference.md

from the source of the tables; keys of torchtitan that nothing here reads are left out, and refused.
"""


def reference_page() -> str:
    """The page in Markdown."""
    return "\n".join([_HEAD, *_sections(job_schema(), "", "[{}]")]) + "\n"


def _sections(table: Table, name: str, brackets: str) -> Iterator[str]:
    read = {key: setting for key, setting in table.keys.items() if is_read(f"{name}.{key}")}
    rows = [_row(name, key, setting) for key, setting in read.items()]
    if rows:
        yield f"## `{brackets.format(name)}`\n"
        yield "| key | values | default | meaning |\n|---|---|---|---|"
        yield from rows
        yield ""
    prefix = f"{name}." if name else ""
    for inner, content in table.tables.items():
        yield from _sections(content, prefix + inner, "[{}]")
    for inner, content in table.lists.items():
        yield from _sections(content, prefix + inner, "[[{}]]")


def _row(table: str, name: str, key: Key) -> str:
    limit = LIMITS.get(f"{table}.{name}")
    values = describe(key.type) + (f", {limit.words}" if limit else "")
    if key.default is REQUIRED:
        default = "required"
    else:
        default = "not set" if key.default is None else f"`{show(key.default)}`"
    cells = (f"`{name}`", values, default, key.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
