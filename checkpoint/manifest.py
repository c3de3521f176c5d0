"""Content of a checkpoint: ``manifest.json``, and no code that needs torch.

    {"format": "titan-shampoo checkpoint", "version": 3, "step": 30, "run": "3f2a90c1b6d4", ...
     "files": {"rank-00000.safetensors": {"bytes": 1840, "xxh128": "9b1e..."}},
     "tensors": {"model.norm.weight": {"dtype": "F32", "shape": [256],
                                       "boxes": [[[0], [128], "rank-00000.safetensors"], ...]}}}

A box is a rectangle of a global tensor: its start, its extent, and its file. Hashes are XXH3 with
128 bits: they find any damage, at the speed of memory, but are no signature. The hash of the
manifest itself is in ``XXH128SUMS``, in the form that ``xxhsum --check`` reads.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeGuard

import xxhash

from checkpoint.errors import CheckpointError

FORMAT = "titan-shampoo checkpoint"
VERSION = 3
MANIFEST = "manifest.json"
SUMS = "XXH128SUMS"

MODEL_PREFIX, OPTIMIZER_PREFIX, GENERATORS_PREFIX = "model.", "optim.", "rng."
"""Prefixes of the keys of tensors, by kind."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element, by safetensors' names of dtypes."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.safetensors")
_HASH = re.compile(r"[0-9a-f]{32}")

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class File:
    """Size and hash of one data file."""

    bytes: int
    xxh128: str


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a global tensor, and its file."""

    start: Index
    extent: Index
    file: str

    def entry(self, key: str, shape: Index) -> str:
        """Name of the box in its file: the tensor's key, with the ranges unless it is the whole."""
        if self.extent == shape:
            return key
        pairs = zip(self.start, self.extent, strict=True)
        return f"{key}[{','.join(f'{start}:{start + extent}' for start, extent in pairs)}]"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A global tensor and the boxes that cover it, each element once."""

    dtype: str
    shape: Index
    boxes: tuple[Box, ...]

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def problem(self) -> str | None:
        """Problem of the boxes; None if there is none."""
        for box in self.boxes:
            if not len(box.start) == len(box.extent) == len(self.shape) or any(
                start < 0 or extent < 0 or start + extent > size
                for start, extent, size in zip(box.start, box.extent, self.shape, strict=True)
            ):
                return f"a box at {list(box.start)} is outside of shape {list(self.shape)}"
        covered = sum(math.prod(box.extent) for box in self.boxes)
        if covered != math.prod(self.shape):
            return f"its boxes have {covered} elements, shape {list(self.shape)} has others"
        for one, other in _overlapping(self.boxes):
            return f"boxes at {list(one.start)} and {list(other.start)} overlap"
        return None


def _overlapping(boxes: Sequence[Box]) -> Iterator[tuple[Box, Box]]:
    """Pairs of boxes with common elements, found along the dim with most different starts."""
    dims = range(len(boxes[0].start) if boxes else 0)
    along = max(dims, key=lambda dim: len({box.start[dim] for box in boxes}), default=None)
    if along is None:  # one number
        yield from pairwise(boxes)
        return
    begun: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.start[along]):
        begun = [one for one in begun if one.start[along] + one.extent[along] > box.start[along]]
        for one in begun:
            ranges = zip(one.start, one.extent, box.start, box.extent, strict=True)
            if all(max(a, b) < min(a + length, b + size) for a, length, b, size in ranges):
                yield one, box
        begun.append(box)


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a checkpoint except the numbers in its tensors."""

    record: dict[str, Any]
    """``step``, ``run``, ``created``, ``software``, ``world``, ``settings``, ``geometry``,
    ``values``: the run's description of itself, as plain JSON."""
    files: dict[str, File] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last step that the state contains."""
        return int(self.record["step"])

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``.

        Raises:
            CheckpointError: If the record contains more than plain JSON values.
        """
        content = {"format": FORMAT, "version": VERSION, **self.record}
        for key, value in content.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{key}: only JSON values are saved here: {error}") from error
        tables = {
            **content,
            "files": {n: {"bytes": f.bytes, "xxh128": f.xxh128} for n, f in self.files.items()},
            "tensors": {
                key: {
                    "dtype": entry.dtype,
                    "shape": entry.shape,
                    "boxes": [(box.start, box.extent, box.file) for box in entry.boxes],
                }
                for key, entry in sorted(self.tensors.items())
            },
        }
        entries = (f"{json.dumps(key)}: {_in_lines(value)}" for key, value in tables.items())
        return ("{\n" + ",\n".join(entries) + "\n}\n").encode()

    def sums(self, content: bytes) -> bytes:
        """The content of ``XXH128SUMS``, for a manifest with the bytes ``content``."""
        lines = [f"{file.xxh128}  {name}" for name, file in sorted(self.files.items())]
        return "".join(f"{line}\n" for line in lines).encode() + own_sum(content)

    def entries(self) -> Iterator[tuple[str, TensorEntry, Box]]:
        """Every box with its tensor."""
        for key, entry in self.tensors.items():
            for box in entry.boxes:
                yield key, entry, box


def own_sum(content: bytes) -> bytes:
    """The last line of ``XXH128SUMS``: the hash of a manifest with the bytes ``content``."""
    return f"{xxhash.xxh3_128_hexdigest(content)}  {MANIFEST}\n".encode()


def _in_lines(value: object) -> str:
    """JSON with one line per entry of a table, for people and for diff."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    lines = (f"  {json.dumps(str(key))}: {json.dumps(entry)}" for key, entry in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def parse(content: bytes) -> Manifest:
    """The manifest with the bytes ``content``; its record is not checked here.

    Raises:
        CheckpointError: If it is not a manifest, of another version, or contradicts itself.
    """
    try:
        found = json.loads(content.decode(), object_pairs_hook=_without_repetition)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise CheckpointError(f'its format is not "{FORMAT}"')
        version = found.pop("version", None)
        if version != VERSION:
            raise CheckpointError(f"format version {version!r}, this program reads {VERSION}")
        files = {name: _file(name, entry) for name, entry in _popped_table(found, "files").items()}
        tensors = {
            key: _tensor(key, entry, files)
            for key, entry in _popped_table(found, "tensors").items()
        }
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not a manifest: {type(error).__name__}: {error}") from error
    _check_sizes(files, tensors)
    return Manifest(found, files, tensors)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table without repeated keys, on which readers would disagree."""
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise CheckpointError(f"{next(key for key in keys if keys.count(key) > 1)!r}: repeated")
    return table


def _popped_table(found: dict[str, Any], key: str) -> dict[str, Any]:
    table = found.pop(key, None)
    if not isinstance(table, dict):
        raise CheckpointError(f"{key}: missing, or not a table")
    return table


def _file(name: str, entry: Any) -> File:  # noqa: ANN401 (whatever JSON has)
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"files: {name!r} is not the name of a data file")
    if not isinstance(entry, dict):
        raise CheckpointError(f"files.{name}: {entry!r} is not a table")
    digest, size = entry.get("xxh128"), entry.get("bytes")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise CheckpointError(f"files.{name}.xxh128: {digest!r} is not a hash")
    if not _is_count(size):
        raise CheckpointError(f"files.{name}.bytes: {size!r} is not a size")
    return File(size, digest)


def _tensor(key: str, entry: Any, files: dict[str, File]) -> TensorEntry:  # noqa: ANN401
    name = f"tensors.{key}" if key.isprintable() else f"tensors: {key!r}"
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "boxes": list(boxes)} if (
            key.isprintable() and dtype in ITEM_BYTES and all(map(_is_count, shape))
        ):
            tensor = TensorEntry(dtype, tuple(shape), tuple(_box(name, box) for box in boxes))
        case _:
            raise CheckpointError(f"{name}: not a known dtype, a shape and boxes: {_shown(entry)}")
    for box in tensor.boxes:
        if box.file not in files:
            raise CheckpointError(f"{name}: is in {box.file!r}, which is not among the files")
    problem = tensor.problem()
    if problem:
        raise CheckpointError(f"{name}: {problem}")
    return tensor


def _box(name: str, box: Any) -> Box:  # noqa: ANN401
    match box:
        case [list(start), list(extent), str(file)] if all(map(_is_count, [*start, *extent])):
            return Box(tuple(start), tuple(extent), file)
    raise CheckpointError(f"{name}: {_shown(box)} is not a box")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _check_sizes(files: dict[str, File], tensors: dict[str, TensorEntry]) -> None:
    """Refuse tensors larger than their files, before memory is allocated for them."""
    needed = dict.fromkeys(files, 0)
    for entry in tensors.values():
        for box in entry.boxes:
            needed[box.file] += math.prod(box.extent) * ITEM_BYTES[entry.dtype]
    for name, size in needed.items():
        if size > files[name].bytes:
            raise CheckpointError(
                f"files.{name}.bytes: {files[name].bytes}, too few for tensors of {size}"
            )
