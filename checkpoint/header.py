"""Headers of safetensors files, checked before any library reads the file.

    8 bytes: length of the header      JSON: {"<name>": {"dtype", "shape", "data_offsets"}, ...}

A file with the right hash may still be no safetensors file: a pickle, an archive, or one whose
header names other tensors than the manifest. The library would find that only during the load.
"""

import json
import math
from pathlib import Path
from typing import Any

from checkpoint.manifest import ITEM_BYTES, Index, Manifest

LONGEST = 100_000_000
"""Largest header in bytes; safetensors refuses longer ones."""

Entries = dict[str, tuple[str, Index]]
"""Dtype and shape by name in a file."""


def entries_by_file(manifest: Manifest) -> dict[str, Entries]:
    """The content of each file of a checkpoint."""
    found: dict[str, Entries] = {name: {} for name in manifest.files}
    for key, entry, box in manifest.entries():
        found[box.file][box.entry(key, entry.shape)] = (entry.dtype, box.extent)
    return found


def header_problem(path: Path, entries: Entries) -> str | None:
    """Compare the header of a file with ``entries``; a line if they differ, None if they agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST):
            return "not a safetensors file: it has no header"
        text = file.read(length)
    try:
        if text[:1] != b"{":
            raise ValueError("it is not a table")
        header = json.loads(text.decode(), object_pairs_hook=_table)
        return _difference(header, entries, size - 8 - length)
    except (ValueError, RecursionError) as error:
        return f"not a safetensors file: its header cannot be read: {error}"


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _difference(header: dict[str, Any], entries: Entries, size: int) -> str | None:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return "its header's __metadata__ is not text"
    differing = sorted(header.keys() ^ entries.keys())
    if differing:
        where = "header" if differing[0] in header else "manifest"
        return f"{differing[0]!r} is in its {where} only"
    places = []
    for name, (dtype, shape) in entries.items():
        wanted = math.prod(shape) * ITEM_BYTES[dtype]
        place = _place(header[name], dtype, shape)
        if place is None or place[1] - place[0] != wanted:
            return f"{name!r} is not {dtype} {list(shape)} in its header"
        places.append(place)
    end = 0
    for start, stop in sorted(places):
        if start != end:
            return f"its header leaves a gap, or an overlap, at byte {end}"
        end = stop
    return None if end == size else f"{size} bytes of data, its header has {end}"


def _place(entry: object, dtype: str, shape: Index) -> tuple[int, int] | None:
    match entry:
        case {"dtype": str(named), "shape": [*extents], "data_offsets": [start, stop]} if (
            named == dtype
            and tuple(extents) == shape
            and {*map(type, [*extents, start, stop])} == {int}
        ):
            return start, stop
    return None
