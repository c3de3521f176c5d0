"""What a checkpoint consists of: the content of ``manifest.json``, and nothing that needs torch.

    {"format": "titan-shampoo checkpoint", "version": 3, "step": 30, "run": "3f2a90c1b6d4", ...
     "files": {"rank-00000.safetensors": {"bytes": 1840, "xxh128": "9b1e..."}},
     "tensors": {"model.norm.weight": {"dtype": "F32", "shape": [256],
                                       "boxes": [[[0], [128], "rank-00000.safetensors"], ...]}}}

A box is a rectangle of a global tensor: where it starts, its extent, and the file that holds it.
Hashes are XXH3's of 128 bits: they find any damage, at the speed of memory; they are no signature.
That of the manifest itself stands in ``XXH128SUMS``, in the form that ``xxhsum --check`` reads.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import xxhash

from checkpoint.errors import CheckpointError

FORMAT = "titan-shampoo checkpoint"
VERSION = 3
MANIFEST = "manifest.json"
SUMS = "XXH128SUMS"

MODEL_PREFIX, OPTIMIZER_PREFIX, GENERATORS_PREFIX = "model.", "optim.", "rng."
"""How keys of tensors begin, by what they are."""

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
    """A rectangle of a global tensor, and the file in which it lies."""

    start: Index
    extent: Index
    file: str

    def entry(self, key: str, shape: Index) -> str:
        """The box's name in its file: the tensor's key, with the ranges unless it is all of it."""
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
        """What is wrong with the boxes, or None."""
        for box in self.boxes:
            if not len(box.start) == len(box.extent) == len(self.shape) or any(
                start < 0 or extent < 0 or start + extent > size
                for start, extent, size in zip(box.start, box.extent, self.shape, strict=True)
            ):
                return f"a box at {list(box.start)} lies outside of shape {list(self.shape)}"
        covered = sum(math.prod(box.extent) for box in self.boxes)
        if covered != math.prod(self.shape) or len({box.start for box in self.boxes}) != len(
            self.boxes
        ):
            return f"its boxes have {covered} elements, shape {list(self.shape)} has others"
        return None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a checkpoint but the numbers in its tensors."""

    record: dict[str, Any]
    """``step``, ``run``, ``created``, ``software``, ``world``, ``settings``, ``geometry``,
    ``values``: whatever the run says about itself, as plain JSON."""
    files: dict[str, File] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last step that the state contains."""
        return int(self.record.get("step", 0))

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
        """The content of ``XXH128SUMS``, for a manifest whose bytes are ``content``."""
        lines = [f"{file.xxh128}  {name}" for name, file in sorted(self.files.items())]
        return "".join(f"{line}\n" for line in lines).encode() + own_sum(content)

    def entries(self) -> Iterator[tuple[str, TensorEntry, Box]]:
        """Every box with its tensor."""
        for key, entry in self.tensors.items():
            for box in entry.boxes:
                yield key, entry, box


def own_sum(content: bytes) -> bytes:
    """The last line of ``XXH128SUMS``: the hash of a manifest whose bytes are ``content``."""
    return f"{xxhash.xxh3_128_hexdigest(content)}  {MANIFEST}\n".encode()


def _in_lines(value: object) -> str:
    """JSON with one line per entry of a table, so that people can read it and diff it."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    lines = (f"  {json.dumps(str(key))}: {json.dumps(entry)}" for key, entry in value.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def parse(content: bytes) -> Manifest:
    """The manifest whose bytes are ``content``.

    Raises:
        CheckpointError: If it is not one, of another version, or contradicts itself.
    """
    try:
        found = json.loads(content)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise CheckpointError(f'its format is not "{FORMAT}"')
        version = found.pop("version", None)
        if version != VERSION:
            raise CheckpointError(f"format version {version}, this program reads {VERSION}")
        files = {name: _file(name, entry) for name, entry in found.pop("files").items()}
        tensors = {key: _tensor(key, entry, files) for key, entry in found.pop("tensors").items()}
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"not a manifest: {type(error).__name__}: {error}") from error
    return Manifest(found, files, tensors)


def _file(name: str, entry: dict[str, Any]) -> File:
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is no name of a data file")
    if not _HASH.fullmatch(entry["xxh128"]):
        raise CheckpointError(f"{name}: {entry['xxh128']!r} is no hash")
    return File(_count(entry["bytes"]), entry["xxh128"])


def _tensor(key: str, entry: dict[str, Any], files: dict[str, File]) -> TensorEntry:
    if entry["dtype"] not in ITEM_BYTES:
        raise CheckpointError(f"{key}: unknown dtype {entry['dtype']!r}")
    boxes = tuple(
        Box(_index(start), _index(extent), file) for start, extent, file in entry["boxes"]
    )
    for box in boxes:
        if box.file not in files:
            raise CheckpointError(f"{key}: lies in {box.file!r}, which is not among the files")
    tensor = TensorEntry(entry["dtype"], _index(entry["shape"]), boxes)
    problem = tensor.problem()
    if problem:
        raise CheckpointError(f"{key}: {problem}")
    return tensor


def _index(values: list[Any]) -> Index:
    return tuple(_count(value) for value in values)


def _count(value: Any) -> int:  # noqa: ANN401 (whatever JSON has)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{value!r} is no count")
    return value
