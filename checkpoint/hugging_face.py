"""Weights as safetensors under the names of other programs.

Transformers use torchtitan's adapter to Hugging Face's names and order of rotary weights; a
ResNet's names are torchvision's already. One tensor is in memory at a time, so that any layout of
ranks can load any file.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from checkpoint.errors import CheckpointError, in_one_line
from checkpoint.folders import commit, discard, writing_name
from checkpoint.open_files import OpenFiles
from checkpoint.ranks import from_rank_0, gathered

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""Size of a file, as Hugging Face cuts them."""

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""Weights that are left out of a file if they equal another weight."""

Weights = Mapping[str, Tensor]


def load_hugging_face(
    folder: Path,
    model: Mapping[str, Tensor],
    adapter: Any,  # noqa: ANN401 (torchtitan's)
    group: dist.ProcessGroup,
) -> None:
    """Load weights in place, each rank its part.

    Args:
        folder: Folder with ``*.safetensors``, and their index if there are several.
        model: Live tensors by the model's names.
        adapter: torchtitan's state-dict adapter; None if names are the same.
        group: All ranks.

    Raises:
        CheckpointError: On every rank, before anything changes, if a weight is missing or has
            another shape.
    """
    files = from_rank_0(partial(weight_files, folder), group, folder)
    problem = None
    try:
        wanted = _wanted(folder, model, adapter, files)
    except CheckpointError as error:
        problem = str(error)
    for refusal in gathered(problem, group):
        if refusal is not None:
            raise CheckpointError(refusal)
    with OpenFiles(folder) as opened:
        for name, stored in wanted.items():
            with opened.file(files[stored]) as file:
                found = file.get_tensor(stored)
            native = {name: found} if adapter is None else adapter.from_hf({name: found})
            for key, whole in native.items():
                _copy_part(model[key], whole)


def _wanted(
    folder: Path,
    model: Weights,
    adapter: Any,  # noqa: ANN401 (torchtitan's)
    files: Mapping[str, str],
) -> dict[str, str]:
    """Stored name of each weight of this rank, by its name in the other program."""
    shapes = {key: torch.empty(value.shape, device="meta") for key, value in model.items()}
    theirs = shapes if adapter is None else adapter.to_hf(shapes)
    wanted = {}
    with OpenFiles(folder) as opened:
        for name, shape in theirs.items():
            stored = name if name in files else _TIED.get(name, name)
            if stored not in files:
                raise CheckpointError(f"{folder}: {name}: not in the files")
            with opened.file(files[stored]) as file:
                found = file.get_slice(stored).get_shape()
            if list(found) != list(shape.shape):
                raise CheckpointError(
                    f"{folder}: {name}: {found} in the files, {list(shape.shape)} in this run"
                )
            wanted[name] = stored
    return wanted


def weight_files(folder: Path) -> dict[str, str]:
    """The file of each weight.

    Raises:
        CheckpointError: If the folder has no safetensors files.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            return {str(key): Path(name).name for key, name in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise in_one_line(index, "not an index", error) from error
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with OpenFiles(folder) as opened, opened.file(path.name) as file:
            found |= dict.fromkeys(file.keys(), path.name)
    if not found:
        raise CheckpointError(f"{folder}: has no .safetensors files")
    return found


def _copy_part(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of a whole tensor."""
    with torch.no_grad():
        if not isinstance(target, DTensor):
            target.copy_(whole)
            return
        extent, start = compute_local_shape_and_global_offset(
            target.shape, target.device_mesh, target.placements
        )
        ranges = zip(start, extent, strict=True)
        target.to_local().copy_(whole[tuple(slice(a, a + length) for a, length in ranges)])


def export_weights(
    weights: Iterable[tuple[str, Tensor]],
    out: Path,
    adapter: Any,  # noqa: ANN401
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights under the other program's names, all of them or nothing.

    Args:
        weights: Whole tensors by the model's names.
        out: A folder that does not exist yet.
        adapter: torchtitan's state-dict adapter; None if names are the same.
        dtype: Dtype for floating weights; None keeps theirs.

    Raises:
        CheckpointError: If ``out`` exists, or the disk fails.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out}: exists; name another folder")
    writing = writing_name(out)
    try:
        writing.mkdir(parents=True)
        _write_shards(_converted(weights, adapter, dtype), writing)
        for path in writing.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        commit(writing, out)
    except (OSError, SafetensorError) as error:
        raise in_one_line(out, "not exported", error) from error
    finally:
        if writing.exists():
            discard(writing)


def _converted(
    weights: Iterable[tuple[str, Tensor]],
    adapter: Any,  # noqa: ANN401
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        theirs = {name: tensor} if adapter is None else adapter.to_hf({name: tensor})
        for key, value in theirs.items():
            converts = dtype is not None and value.is_floating_point()
            yield key, (value.to(dtype) if converts else value).contiguous()


def _write_shards(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write files of limited size, then rename them with their total number."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for key, value in weights:
        if pending and size + value.nbytes > MAX_SHARD_BYTES:
            flush()
            size = 0
        pending[key] = value
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
