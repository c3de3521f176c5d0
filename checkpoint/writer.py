"""Writer of checkpoints: torch.distributed.checkpoint plans the shares of ranks, this stores them.

Each rank streams its boxes into safetensors files and hashes them on the way. Rank 0 adds the
manifest, and renames the folder when every rank's data are on the disk. Nothing is pickled, and
nothing is overwritten.
"""

import errno
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageMeta, StorageWriter, WriteResult
from torch.futures import Future

from checkpoint.errors import CheckpointError
from checkpoint.folders import commit, discard, writing_name
from checkpoint.manifest import MANIFEST, SUMS, Box, File, Index, Manifest, TensorEntry
from checkpoint.schema import problem

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""torch's dtypes by safetensors' names."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

MAX_FILE_BYTES = 4 << 30
"""Size in bytes from which a rank begins another file, so that readers can share the hashing."""


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a global tensor in a file: the memory of adjacent chunks."""

    key: str
    dtype: str
    shape: Index
    start: Index
    extent: Index
    items: tuple[WriteItem, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """Files and boxes of one rank on the disk."""

    files: dict[str, File]
    boxes: list[tuple[Part, str]]


class Writer(StorageWriter):
    """Writes one checkpoint.

    Args:
        place: Path of the complete checkpoint.
        record: Record of the manifest; read on rank 0 only.
        is_ours: True if this run may write beside ``place``; called on rank 0 only.
    """

    def __init__(
        self, place: Path, record: dict[str, Any], is_ours: Callable[[], bool] = lambda: True
    ) -> None:
        self._place, self._record, self._is_ours = place, record, is_ours
        self._writing: Path | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer writes once."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept every path."""
        return True

    def storage_meta(self) -> StorageMeta | None:
        """Return None: the manifest has it."""
        return None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Do nothing: all information comes with the plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan, if all of it can be stored.

        Raises:
            CheckpointError: If an item is not a tensor of a known dtype.
        """
        for item in plan.items:
            data = item.tensor_data
            if data is None:
                raise CheckpointError(f"{item.index.fqn}: not a tensor")
            if data.properties.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{item.index.fqn}: {data.properties.dtype} cannot be saved")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Choose the folder on rank 0, and send its name to all ranks.

        Raises:
            CheckpointError: If the checkpoint exists, or there is no room for it.
        """
        if os.path.lexists(self._place):
            raise CheckpointError(f"{self._place}: exists, and a checkpoint is never overwritten")
        self._check_folder()
        need = sum(part.bytes for plan in plans for part in _parts(plan.items))
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            if need > shutil.disk_usage(self._place.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._writing = writing_name(self._place)
            self._writing.mkdir()
        except OSError as error:
            raise _no_room(self._place, error, need) from error
        common = (str(self._writing), need)
        return [replace(plan, storage_data=(rank, *common)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Write this rank's boxes.

        Raises:
            CheckpointError: If the disk fails.
        """
        rank, folder, need = plan.storage_data
        written = Written({}, [])
        try:
            for name, parts in files_of_rank(rank, plan.items):
                written.files[name] = _write_file(Path(folder) / name, parts, planner)
                written.boxes.extend((part, name) for part in parts)
        except OSError as error:
            raise _no_room(self._place, error, need) from error
        size = sum(file.bytes for file in written.files.values())
        slim = [(replace(part, items=()), name) for part, name in written.boxes]
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex("rank"), size, Written(written.files, slim))])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and complete the checkpoint, on rank 0.

        Raises:
            CheckpointError: If the disk fails, or boxes are missing.
        """
        assert self._writing is not None, "torch finished a save that it had not begun"
        try:
            manifest = make_manifest(self._record, metadata, [r.storage_data for (r,) in results])
            wrong = problem(manifest)  # as a reader would find it
            if wrong is not None:
                raise CheckpointError(wrong)
        except CheckpointError as error:
            raise CheckpointError(f"{self._place}: not saved: {error}") from error
        try:
            self._complete(manifest)
        except OSError as error:
            need = sum(file.bytes for file in manifest.files.values())
            raise _no_room(self._place, error, need) from error

    def _complete(self, manifest: Manifest) -> None:
        assert self._writing is not None
        content = manifest.to_bytes()
        for name, data in ((MANIFEST, content), (SUMS, manifest.sums(content))):
            with (self._writing / name).open("xb") as file:
                file.write(data)
                _to_disk(file)
        self._check_folder()
        commit(self._writing, self._place)
        self._writing = None

    def _check_folder(self) -> None:
        """Refuse a folder that was deleted, and perhaps created again by another run."""
        if not self._is_ours():
            raise CheckpointError(f"{self._place}: not saved: its folder was deleted meanwhile")

    def discard(self) -> None:
        """Remove the parts of a failed checkpoint; on rank 0, after all ranks."""
        if self._writing is not None:
            discard(self._writing)
            self._writing = None


def make_manifest(
    record: dict[str, Any], metadata: Metadata, written: Iterable[Written]
) -> Manifest:
    """The manifest of the files of all ranks.

    Args:
        record: Its record, without files and tensors.
        metadata: Dtype and shape of every tensor.
        written: Files and boxes of each rank.

    Raises:
        CheckpointError: If boxes are missing or overlap.
    """
    manifest = Manifest(record)
    boxes: dict[str, list[Box]] = {}
    for one in written:
        manifest.files.update(one.files)
        for part, name in one.boxes:
            boxes.setdefault(part.key, []).append(Box(part.start, part.extent, name))
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue  # Writer.prepare_local_plan allows nothing but tensors
        ordered = sorted(boxes.get(key, []), key=lambda box: box.start)
        dtype = DTYPE_NAMES[entry.properties.dtype]
        manifest.tensors[key] = TensorEntry(dtype, tuple(entry.size), tuple(ordered))
        wrong = manifest.tensors[key].problem()
        if wrong:
            raise CheckpointError(f"{key}: {wrong}")
    return manifest


def files_of_rank(rank: int, items: Sequence[WriteItem]) -> Iterator[tuple[str, list[Part]]]:
    """Name and content of each file of a rank."""
    for number, parts in enumerate(_files(_parts(items))):
        yield f"rank-{rank:05d}{f'-{number}' if number else ''}.safetensors", parts


def _parts(items: Sequence[WriteItem]) -> list[Part]:
    """Boxes to write: chunks of a tensor that are adjacent along its first dim are joined."""
    ordered = sorted(
        (_part(item) for item in items),
        # Wide elements first, so that every entry of a file is aligned to its element size.
        key=lambda part: (-TORCH_DTYPES[part.dtype].itemsize, part.key, part.start[1:], part.start),
    )
    parts: list[Part] = []
    for part in ordered:
        if part.bytes == 0:
            continue
        if parts and _adjacent(parts[-1], part):
            last = parts.pop()
            part = replace(
                last,
                extent=(last.extent[0] + part.extent[0], *last.extent[1:]),
                items=last.items + part.items,
                bytes=last.bytes + part.bytes,
            )
        parts.append(part)
    return parts


def _part(item: WriteItem) -> Part:
    data = item.tensor_data
    assert data is not None
    extent = tuple(data.chunk.sizes)
    return Part(
        item.index.fqn,
        DTYPE_NAMES[data.properties.dtype],
        tuple(data.size),
        tuple(data.chunk.offsets),
        extent,
        (item,),
        data.chunk.sizes.numel() * data.properties.dtype.itemsize,
    )


def _adjacent(first: Part, second: Part) -> bool:
    return (
        first.key == second.key
        and bool(first.start)
        and first.start[1:] == second.start[1:]
        and first.extent[1:] == second.extent[1:]
        and first.start[0] + first.extent[0] == second.start[0]
    )


def _files(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """The parts of each file of a rank."""
    file: list[Part] = []
    size = 0
    for part in parts:
        if file and size + part.bytes > MAX_FILE_BYTES:
            yield file
            file, size = [], 0
        file.append(part)
        size += part.bytes
    if file:
        yield file


def _write_file(path: Path, parts: Sequence[Part], planner: SavePlanner) -> File:
    """Write one safetensors file and return its size and hash."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in parts:
        name = Box(part.start, part.extent, path.name).entry(part.key, part.shape)
        header[name] = {
            "dtype": part.dtype,
            "shape": part.extent,
            "data_offsets": [offset, offset + part.bytes],
        }
        offset += part.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with path.open("xb") as file:
        head = struct.pack("<Q", len(text)) + text
        for data in itertools.chain([memoryview(head)], _contents(parts, planner)):
            digest.update(data)
            file.write(data)
        _to_disk(file)
        return File(file.tell(), digest.hexdigest())


def _contents(parts: Iterable[Part], planner: SavePlanner) -> Iterator[memoryview]:
    """The bytes of parts, one chunk at a time, so that a rank's state is never in memory twice."""
    for part in parts:
        for item in part.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            yield _bytes_of(tensor)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    content: Any = flat.view(torch.uint8).numpy()
    return memoryview(content)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _no_room(place: Path, error: OSError, need: int) -> CheckpointError:
    """Error for a failed write, with the free and the needed space."""
    folder = place.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    reason = error.strerror or str(error)
    return CheckpointError(f"{place}: not saved: {reason}; needs {need:,} bytes, free are {free:,}")
