"""torch.distributed.checkpoint's own format, read and written without running code from it.

Its ``.metadata`` is a pickle, and so is every stored item other than a tensor: both can hold code.
Only the classes that describe tensors are unpickled here, and only tensors are read.
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from checkpoint.errors import CheckpointError, in_one_line
from checkpoint.ranks import gathered

_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "_MEM_FORMAT_ENCODING",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")),
}


class _Unpickler(pickle.Unpickler):
    """Unpickles descriptions of tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 (pickle's)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not describe a tensor")
        return super().find_class(module, name)


class NativeReader(dcp.FileSystemReader):
    """torch's reader, with a ``.metadata`` that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401 (torch's)
        """Return the description of the checkpoint's tensors.

        Raises:
            CheckpointError: If it contains anything else.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
        except Exception as error:
            raise CheckpointError(
                f"{path}: not read: {type(error).__name__}: {error}; it may hold code"
            ) from error
        if not isinstance(found, Metadata):
            raise CheckpointError(f"{path}: holds {type(found).__name__}, wanted Metadata")
        for entry in (found.storage_data or {}).values():
            if Path(entry.relative_path).name != entry.relative_path:
                raise CheckpointError(f"{path}: {entry.relative_path} is outside of the folder")
        found.storage_meta = found.storage_meta or dcp.metadata.StorageMeta()
        return found


def load_native(folder: Path, model: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Load weights in place, on all ranks together.

    Args:
        folder: Checkpoint in torch's own format, by torchtitan or another program.
        model: Live tensors by the model's names; all must be stored, as such or after ``model.``.
        group: All ranks.

    Raises:
        CheckpointError: On every rank, if a weight is missing or has another shape or dtype.
    """
    reader = NativeReader(folder)
    wanted: dict[str, Tensor] = {}
    problem = None
    try:
        wanted = _wanted(folder, tensors_of(reader), model)
    except CheckpointError as error:
        problem = str(error)
    for refusal in gathered(problem, group):
        if refusal is not None:
            raise CheckpointError(refusal)
    try:
        dcp.load(wanted, storage_reader=reader, process_group=group)
    except CheckpointException as error:
        raise in_one_line(folder, "cannot be loaded", error) from error


def _wanted(
    folder: Path, stored: Mapping[str, TensorStorageMetadata], model: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All weights by their stored keys."""
    prefix = "" if any(name in stored for name in model) else "model."
    wanted = {prefix + name: tensor for name, tensor in model.items()}
    for key, tensor in wanted.items():
        found = stored.get(key)
        if found is None:
            raise CheckpointError(f"{folder}: {key}: not in the checkpoint")
        if found.size != tensor.shape or found.properties.dtype != tensor.dtype:
            raise CheckpointError(
                f"{folder}: {key}: {list(found.size)} {found.properties.dtype} in the checkpoint, "
                f"{list(tensor.shape)} {tensor.dtype} in this run"
            )
    return wanted


def tensors_of(reader: NativeReader) -> Mapping[str, TensorStorageMetadata]:
    """Descriptions of the stored tensors, without other items."""
    entries = reader.read_metadata().state_dict_metadata
    return {k: entry for k, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


@contextmanager
def alone() -> Iterator[None]:
    """Let torch work without process groups, and without its warning about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def read_native(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of torch's own format, whole, in one process."""
    reader = NativeReader(folder)
    whole = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in tensors_of(reader).items()
    }
    try:
        with alone():
            dcp.load(whole, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise in_one_line(folder, "cannot be read", error) from error
    return whole


def write_native(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in torch's own format, in one process."""
    try:
        with alone():
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    except CheckpointException as error:
        raise in_one_line(folder, "cannot be written", error) from error
