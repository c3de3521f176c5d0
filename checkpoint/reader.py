"""Reader of checkpoints: any box of any tensor, for any number of ranks.

The files were verified before (``checkpoint.verify``). The reader trusts them, and checks only what
would otherwise be copied silently to the wrong place or type.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from checkpoint.errors import CheckpointError
from checkpoint.manifest import MODEL_PREFIX, Box, Index, Manifest, TensorEntry
from checkpoint.open_files import OpenFiles
from checkpoint.writer import TORCH_DTYPES


class Reader(StorageReader):
    """Loads from one checkpoint what the planner requests.

    Args:
        folder: The checkpoint.
        manifest: Its manifest, verified.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._boxes = {
            (key, box.start): (box, entry) for key, entry, box in self._manifest.entries()
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader reads one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept every path."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401 (torch's)
        """Return the tensors and boxes of the manifest in the form of torch's planner."""
        entries = {key: _metadata(entry) for key, entry in self._manifest.tensors.items()}
        return Metadata(state_dict_metadata=dict(entries))

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,
        *args: Any,  # noqa: ANN401 (torch's)
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Do nothing: the manifest is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Copy every wanted box into place.

        Raises:
            CheckpointError: If a file cannot be read, or has another type than wanted.
        """
        by_file: dict[str, list[tuple[ReadItem, Box, TensorEntry]]] = defaultdict(list)
        for item in plan.items:
            box, entry = self._boxes[_place(item.storage_index)]
            by_file[box.file].append((item, box, entry))
        for name, wanted in by_file.items():
            with OpenFiles(self._folder) as files, files.file(name) as file:
                for item, box, entry in wanted:
                    source = _read(file, item.storage_index.fqn, box, entry, item)
                    target = planner.resolve_tensor(item).detach()
                    if target.dtype != source.dtype:
                        raise CheckpointError(
                            f"{item.storage_index.fqn}: {source.dtype} in the checkpoint, "
                            f"{target.dtype} in this run"
                        )
                    target.copy_(source)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def whole_tensors(
    folder: Path, manifest: Manifest, keys: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of a checkpoint on the CPU, one at a time.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    with OpenFiles(folder) as files:
        for key in keys:
            entry = manifest.tensors[key]
            whole = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
            for box in entry.boxes:
                ranges = zip(box.start, box.extent, strict=True)
                place = tuple(slice(start, start + extent) for start, extent in ranges)
                with files.file(box.file) as file:
                    whole[place] = _checked(file, key, box, entry)
            yield key, whole


def model_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Whole weights and buffers of a checkpoint by the model's own names."""
    keys = [key for key in manifest.tensors if key.startswith(MODEL_PREFIX)]
    for key, whole in whole_tensors(folder, manifest, keys):
        yield key.removeprefix(MODEL_PREFIX), whole


def _metadata(entry: TensorEntry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=TORCH_DTYPES[entry.dtype]),
        size=torch.Size(entry.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.extent))
            for box in entry.boxes
        ],
    )


def _place(index: MetadataIndex) -> tuple[str, Index]:
    return index.fqn, tuple(index.offset or ())


def _read(file: Any, key: str, box: Box, entry: TensorEntry, item: ReadItem) -> Tensor:  # noqa: ANN401
    """The wanted part of a box."""
    if not entry.shape or tuple(item.lengths) == box.extent:
        return _checked(file, key, box, entry)
    found = file.get_slice(box.entry(key, entry.shape))
    if tuple(found.get_shape()) != box.extent:
        raise SafetensorError(f"{key} has another shape than the manifest says")
    ranges = zip(item.storage_offsets, item.lengths, strict=True)
    part: Tensor = found[tuple(slice(start, start + length) for start, length in ranges)]
    return part


def _checked(file: Any, key: str, box: Box, entry: TensorEntry) -> Tensor:  # noqa: ANN401 (safetensors')
    found: Tensor = file.get_tensor(box.entry(key, entry.shape))
    if tuple(found.shape) != box.extent or found.dtype != TORCH_DTYPES[entry.dtype]:
        raise SafetensorError(f"{key} has another shape or dtype than the manifest says")
    return found
