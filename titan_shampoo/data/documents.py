"""Rows of JSON lines and of Arrow tables as documents, with an error for each broken row.

A row is broken if the key "text" is missing or its value is not a valid text: with a lone
surrogate, which no encoding holds, or with NUL, which marks binary data and separates documents of
bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import datasets

from titan_shampoo.data import DataError, UnreadableSampleError

__all__ = [
    "HELD_OUT_ONE_IN",
    "Document",
    "Row",
    "decoded",
    "is_held_out",
    "json_rows",
    "table_rows",
]

HELD_OUT_ONE_IN = 20
"""Share of a corpus that is kept for validation."""
_NUM_NAMED_KEYS = 8
_IN_JSON = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


class Document(TypedDict):
    """One row of a corpus."""

    text: str
    held_out: bool


Row = Document | UnreadableSampleError | None
"""Document, error of a broken row, or None for an empty text."""


def is_held_out(name: str) -> bool:
    """True if the document or image named ``name`` is in the 5% held out for validation.

    Args:
        name: A text, or a path as the file system returns it, which may not be UTF-8.
    """
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def decoded(raw: bytes) -> str | None:
    """``raw`` decoded as UTF-8; None if it is not UTF-8, or has NUL."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def json_rows(file: Path, *, part: int = 0, parts: int = 1) -> Iterator[Row]:
    """Rows ``part``, ``part + parts``, ... of a JSON-lines file, without blank lines.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        with file.open("rb") as lines:
            rows = (item for item in enumerate(lines, 1) if item[1].strip())
            for number, line in islice(rows, part, None, parts):
                yield _json_row(line, f"{file}:{number}")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def table_rows(
    tables: Iterable[Any], place: str, *, part: int = 0, parts: int = 1
) -> Iterator[Row]:
    """Rows ``part``, ``part + parts``, ... of consecutive Arrow tables; only texts are decoded.

    Args:
        tables: Tables from ``datasets``, with its features in their schema.
        place: Source of the tables, for messages.
        part: First row to read.
        parts: Distance of the rows to read.
    """
    num_before = 0
    for table in tables:
        decode = _decoder(table.schema)
        for index in range((part - num_before) % parts, table.num_rows, parts):
            where = f"{place}: row {num_before + index}"
            try:
                row = {"text": decode(table["text"][index].as_py())} if decode else None
            except (ValueError, OverflowError) as error:  # Arrow does not check for UTF-8
                yield UnreadableSampleError(f"{where}: {error}")
            else:
                yield _document(row or dict.fromkeys(table.column_names), where)
        num_before += table.num_rows


def _decoder(schema: Any) -> Callable[[Any], Any] | None:  # noqa: ANN401 (Arrow is untyped)
    """Function from the stored value of a text to the text; None if there is no such column."""
    if "text" not in schema.names:
        return None
    kind = datasets.Features.from_arrow_schema(schema)["text"]
    if isinstance(kind, datasets.Value):
        return lambda text: text
    # Texts among numbers or lists in JSON are stored as JSON.
    features = datasets.Features({"text": kind})
    return lambda text: features.decode_example({"text": text})["text"]


def _json_row(line: bytes, place: str) -> Row:
    """The document of one line, or its error."""
    try:
        row = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one too
        return UnreadableSampleError(f"{place}: not JSON: {error}")
    except RecursionError:
        return UnreadableSampleError(f"{place}: not JSON: nested too deep")
    return _document(row, place)


def _document(row: object, place: str) -> Row:
    """The document of one row, or its error."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        return UnreadableSampleError(f'{place}: has no text under the key "text"{_instead(row)}')
    if "\0" in text:
        return UnreadableSampleError(f"{place}: has NUL at character {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return UnreadableSampleError(f"{place}: has a lone surrogate at character {error.start}")
    return {"text": text, "held_out": is_held_out(text)} if text else None


def _instead(row: object) -> str:
    """Description of a row without text, for its message."""
    if not isinstance(row, dict):
        return ""
    if "text" in row:
        return f", but {_IN_JSON.get(type(row['text']), 'something else')}"
    more = ", ..." if len(row) > _NUM_NAMED_KEYS else ""
    return f"; its keys: {', '.join(map(str, islice(row, _NUM_NAMED_KEYS)))}{more}"
