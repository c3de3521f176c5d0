"""The page docs/api.md, from docstrings: ``python docs/make_api.py > docs/api.md``.

An option that a docstring leaves out is described by the class that it refers to.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import titan_shampoo
from titan_shampoo import statistics

REFERRED = {
    "Shampoo": (),
    "SOAP": ("Shampoo",),
    "KLShampoo": ("Shampoo",),
    "Eva": (),
    "EvaF": ("Eva",),
    "EvaS": ("Eva",),
    "FOOF": ("Eva", "Shampoo"),
    "KFAC": ("FOOF", "Eva", "Shampoo"),
}
"""The classes in the order of the page, and whose descriptions of options are filled in."""

MEMBERS = [
    "step",
    "zero_grad",
    "add_param_group",
    "state_dict",
    "load_state_dict",
    "local_state_dict",
    "sharded_state",
    "plan_summary",
    "conditions",
    "layer_metrics",
    "skipped_steps",
    "failed_refreshes",
]
"""Methods and attributes for users of an optimizer, beside those of torch's ``Optimizer``."""

BEGIN = """
Every public class and function, from the docstrings (`python docs/make_api.py`). What the methods
compute is in [algorithms](algorithms.md) and [eva](eva.md), what a run's settings are called in
[reference](reference.md). Options are passed by keyword; a parameter group may have its own value
of each that does not concern the whole step.
"""


def plain(text: str) -> str:
    """A piece of a docstring as Markdown on one line."""
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`")


def sections(documented: object) -> dict[str, str]:
    """The parts of a Google docstring: what stands before the first heading is ``""``."""
    heading = r"^(Args|Returns|Raises|Yields|Attributes|Example|Examples):$"
    parts = re.split(heading, inspect.getdoc(documented) or "", flags=re.MULTILINE)
    return {"": parts[0].strip()} | dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section: str) -> dict[str, str]:
    """Name -> meaning, of a section whose entries are indented by four."""
    found = re.split(r"^    (\w[\w, ]*)(?: \([^)]*\))?: ", section, flags=re.MULTILINE)
    pairs = zip(found[1::2], found[2::2], strict=True)
    return {name: plain(text) for names, text in pairs for name in names.split(", ")}


def options(cls: type, referred: tuple[str, ...]) -> Iterator[str]:
    """A row for each parameter of the constructor."""
    meanings: dict[str, str] = {}
    for documented in (cls, *(getattr(titan_shampoo, name) for name in referred)):
        meanings = entries(sections(documented).get("Args", "")) | meanings
    for name, parameter in inspect.signature(cls).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else f"`{parameter.default!r}`"
        yield f"| `{name}` | {default} | {cell(meanings[name])} |"


def cell(text: str) -> str:
    """The text as a cell of a table, whose edges are bars."""
    return text.replace("|", "&#124;")


def paragraphs(text: str) -> str:
    """Markdown of the text before the first heading of a docstring, in lines of 120 characters."""
    parts = (textwrap.wrap(plain(part), 120, break_long_words=False) for part in text.split("\n\n"))
    return "\n\n".join("\n".join(part) for part in parts)


def methods() -> Iterator[str]:
    """A row for each member: its name, who has it, and its first sentences."""
    classes = {name: getattr(titan_shampoo, name) for name in REFERRED}
    for member in MEMBERS:
        having = [name for name, cls in classes.items() if is_ours(cls, member)]
        found = inspect.getattr_static(classes[having[0]], member)
        text = plain(sections(found)[""].split("\n\n")[0])
        who = "all" if len(having) == len(classes) else ", ".join(f"`{name}`" for name in having)
        shown = member if isinstance(found, property) else f"{member}()"
        yield f"| `{shown}` | {who} | {cell(text)} |"


def is_ours(cls: type, member: str) -> bool:
    """True if the member is defined in this library."""
    return any(
        member in vars(base) for base in cls.__mro__ if base.__module__.startswith("titan_shampoo")
    )


def page() -> str:
    """The whole page."""
    lines = ["# API\n", paragraphs(BEGIN.strip()) + "\n"]
    for name, referred in REFERRED.items():
        cls = getattr(titan_shampoo, name)
        lines += [f"## {name}\n", f"`titan_shampoo.{name}`\n", paragraphs(sections(cls)[""]) + "\n"]
        lines += ["| option | default | meaning |", "|---|---|---|"]
        lines += [*options(cls, referred), ""]
        for error, reason in entries(sections(cls).get("Raises", "")).items():
            lines += [paragraphs(f"Raises `{error}`: {reason}") + "\n"]
    lines += ["## Methods and attributes of an optimizer\n"]
    lines += ["| name | of | what it is |", "|---|---|---|", *methods(), ""]
    lines += ["## titan_shampoo.statistics\n", paragraphs(sections(statistics)[""]) + "\n"]
    lines += ["| name | what it is |", "|---|---|"]
    for name in statistics.__all__:
        found = getattr(statistics, name)
        if callable(found):
            given = ", ".join(inspect.signature(found).parameters)
            text = plain(sections(found)[""].split("\n\n")[0])
            lines += [f"| `{name}({given})` | {cell(text)} |"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
