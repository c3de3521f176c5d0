"""Which keys a configuration may have: read from the source of the dataclasses that define them.

Importing torchtitan's ``job_config.py`` imports torch, which takes seconds; a mistake should be
refused before. So the file is parsed, not executed, and stays true to the installed torchtitan. Our
own ``tables.py`` is read by the same rules: key, annotation, default, and the text below the key.
"""

import ast
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal

from titan_shampoo.config.errors import ConfigError

REQUIRED = inspect.Parameter.empty

_BUILTINS: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool}


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: its type as an annotation, its default (or ``REQUIRED``) and its help text."""

    type: Any
    default: Any
    help: str


@dataclass(frozen=True, slots=True)
class Table:
    """A TOML table: its settings, the tables inside it, and the lists of tables inside it."""

    keys: Mapping[str, Key]
    tables: Mapping[str, "Table"]
    lists: Mapping[str, "Table"]

    def names(self) -> list[str]:
        """Everything that may be written inside this table."""
        return [*self.keys, *self.tables, *self.lists]

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Key]]:
        """Every setting in and below this table with its dotted name, lists of tables left out."""
        for name, key in self.keys.items():
            yield prefix + name, key
        for name, table in self.tables.items():
            yield from table.walk(f"{prefix}{name}.")


@cache
def job_schema() -> Table:
    """The tables of torchtitan's ``JobConfig``, with ours merged in."""
    ours = Path(__file__).with_name("tables.py")
    return _merge(_read_tables(_torchtitan_source()), _read_tables(ours))


def _torchtitan_source() -> Path:
    spec = importlib.util.find_spec("torchtitan")  # a top-level package is found, not executed
    for location in (spec and spec.submodule_search_locations) or ():
        source = Path(location) / "config" / "job_config.py"
        if source.is_file():
            return source
    remedy = "run `make train`, or pip install -e '.[train]'"
    raise ConfigError(f"torchtitan 0.2 is not installed; {remedy}")


def _merge(base: Table, extension: Table) -> Table:
    """``base`` with the keys of ``extension``, which win, as torchtitan merges dataclasses."""
    common = base.tables.keys() & extension.tables.keys()
    merged = {name: _merge(base.tables[name], extension.tables[name]) for name in common}
    return replace(
        base,
        keys={**base.keys, **extension.keys},
        tables={**base.tables, **extension.tables, **merged},
        lists={**base.lists, **extension.lists},
    )


def _read_tables(source: Path) -> Table:
    """The table that the dataclass ``JobConfig`` of a source file describes."""
    body = ast.parse(source.read_text(encoding="utf-8")).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    aliases = {
        node.targets[0].id: node.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return _Reader(classes, aliases).table("JobConfig")


@dataclass(frozen=True, slots=True)
class _Reader:
    classes: Mapping[str, ast.ClassDef]
    aliases: Mapping[str, ast.expr]

    def table(self, class_name: str) -> Table:
        """The table that a class describes, with what it inherits; its own keys win."""
        node = self.classes[class_name]
        inherited = [self.table(base.id) for base in node.bases if isinstance(base, ast.Name)]
        return reduce(_merge, [*inherited, self._own(node.body)])

    def _own(self, body: list[ast.stmt]) -> Table:
        keys: dict[str, Key] = {}
        tables: dict[str, Table] = {}
        lists: dict[str, Table] = {}
        for node, below in zip(body, [*body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            name = node.target.id
            match node.annotation:
                case ast.Name(id=inner) if inner in self.classes:
                    tables[name] = self.table(inner)
                case ast.Subscript(value=ast.Name(id="list"), slice=ast.Name(id=inner)) if (
                    inner in self.classes
                ):
                    lists[name] = self.table(inner)
                case annotation:
                    keys[name] = Key(self.type(annotation), _default(node.value), _text(below))
        return Table(keys, tables, lists)

    def type(self, node: ast.expr) -> Any:  # noqa: ANN401  (a type expression has no type)
        """The annotation as an object, such as ``int``, ``list[str]`` or ``float | None``."""
        match node:
            case ast.Constant(value=None):
                return None
            case ast.Name(id=name) if name in self.aliases:
                return self.type(self.aliases[name])
            case ast.Name(id=name) if name in _BUILTINS:
                return _BUILTINS[name]
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.type(left) | self.type(right)
            case ast.Subscript(value=ast.Name(id="list"), slice=inner):
                return list[self.type(inner)]  # type: ignore[misc]
            case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
                choices = ast.literal_eval(inner)
                return Literal[choices if isinstance(choices, tuple) else (choices,)]
        raise ConfigError(
            f"torchtitan has a setting of type {ast.unparse(node)}: use torchtitan 0.2"
        )


def _default(node: ast.expr | None) -> Any:  # noqa: ANN401  (whatever the dataclass has)
    """The default value of a field, with a ``default_factory`` evaluated."""
    match node:
        case None:
            return REQUIRED
        case ast.Call(keywords=[ast.keyword(arg="default_factory", value=ast.Lambda(body=body))]):
            return ast.literal_eval(body)
        case ast.Call(keywords=[ast.keyword(arg="default_factory", value=ast.Name(id="list"))]):
            return []
    return ast.literal_eval(node)


def _text(node: ast.stmt | None) -> str:
    """The string literal below a field, as one paragraph."""
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return " ".join(inspect.cleandoc(text).split())
    return ""
