"""Checkpoints changed by hand, with sums that fit."""

import copy
import json
from pathlib import Path
from typing import Any

import xxhash

from checkpoint.manifest import MANIFEST, SUMS

GONE = object()


def changed(content: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of a manifest with another value somewhere, or without it."""
    found = copy.deepcopy(content)
    *outer, key = place
    table = found
    for name in outer:
        table = table[name]
    if value is GONE:
        del table[key]
    else:
        table[key] = value
    return found


def forge(place: Path, content: Any) -> None:
    """Write a manifest, with sums that fit; a file's own is put right where its entry is whole."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (place / MANIFEST).write_bytes(data)
    *lines, _ = (place / SUMS).read_text().splitlines()
    files = content.get("files") if isinstance(content, dict) else None
    if isinstance(files, dict) and all(isinstance(f, dict) for f in files.values()):
        lines = [f"{file.get('xxh128')}  {name}" for name, file in sorted(files.items())]
    lines.append(f"{xxhash.xxh3_128_hexdigest(data)}  {MANIFEST}")
    (place / SUMS).write_bytes("".join(f"{line}\n" for line in lines).encode(errors="replace"))


def manifest_of(place: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / MANIFEST).read_bytes())
    return content
