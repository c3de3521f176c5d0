"""Conversion of checkpoints to and from the formats of other programs, in one process."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint.errors import CheckpointError, in_one_line
from checkpoint.folders import commit, discard, writing_name
from checkpoint.hugging_face import export_weights, weight_files
from checkpoint.manifest import MODEL_PREFIX, Manifest
from checkpoint.native import alone, read_native, write_native
from checkpoint.open_files import OpenFiles
from checkpoint.reader import model_weights, whole_tensors
from checkpoint.record import describe_run
from checkpoint.writer import Writer

Progress = Callable[[int], object]
"""Callback with the number of bytes done since the last call."""


def export(
    folder: Path, manifest: Manifest, out: Path, *, to: str, dtype: str | None, progress: Progress
) -> None:
    """Write a checkpoint for another program.

    Args:
        folder: The checkpoint, verified.
        manifest: Its manifest.
        out: A folder that does not exist yet.
        to: "hf": weights as safetensors; "dcp": everything in torch's own format.
        dtype: Dtype for weights; None keeps theirs.
        progress: Callback for the progress.

    Raises:
        CheckpointError: If it fails; nothing is left behind then.
    """
    convert_to = None if dtype is None else getattr(torch, dtype)
    if to == "hf":
        settings = manifest.record.get("settings", {})
        adapter = _adapter(settings.get("model.name"), settings.get("model.flavor"))
        weights = _reporting(model_weights(folder, manifest), progress)
        export_weights(weights, out, adapter, convert_to)
        return
    if os.path.lexists(out):
        raise CheckpointError(f"{out}: exists; name another folder")
    # Weights under torchtitan's bare names, everything else under the names used here.
    tensors = {
        key.removeprefix(MODEL_PREFIX): _converted(whole, key, convert_to)
        for key, whole in _reporting(whole_tensors(folder, manifest, manifest.tensors), progress)
    }
    writing = writing_name(out)
    try:
        writing.mkdir(parents=True)
        write_native(writing, tensors)
        commit(writing, out)
    except OSError as error:
        raise in_one_line(out, "not exported", error) from error
    finally:
        if writing.exists():
            discard(writing)


def convert(
    source: Path, out: Path, *, flavor: str | None, progress: Progress = lambda _: None
) -> None:
    """Make a checkpoint of another program's weights, to begin a run from.

    Args:
        source: A folder of safetensors files, or of torch's own format.
        out: A folder that does not exist yet.
        flavor: Flavour of the Llama-style transformer, for its names and order of weights; None
            keeps names.
        progress: Callback for the progress.

    Raises:
        CheckpointError: If it fails; nothing is left behind then.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    if (source / ".metadata").is_file():
        stored = iter(_model_of_native(read_native(source)).items())
    else:
        stored = _stored(source)
    weights = dict(_reporting(stored, progress))
    adapter = _adapter("llama3", flavor) if flavor else None
    if adapter is not None:
        weights = _translated(weights, adapter, source)
    writer = Writer(out, describe_run(0, "converted", "model") | {"source": str(source)})
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in weights.items()}
    try:
        with alone():
            dcp.save(tensors, storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        writer.discard()
        raise in_one_line(out, "not written", error) from error


def _reporting(
    tensors: Iterator[tuple[str, Tensor]], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tensors:
        yield key, tensor
        progress(tensor.nbytes)


def _converted(tensor: Tensor, key: str, dtype: torch.dtype | None) -> Tensor:
    is_weight = key.startswith(MODEL_PREFIX) and tensor.is_floating_point()
    return tensor.to(dtype) if dtype is not None and is_weight else tensor


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = weight_files(folder)
    with OpenFiles(folder) as opened:
        for key, name in files.items():
            with opened.file(name) as file:
                found = file.get_tensor(key)
            yield key, found


def _model_of_native(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among the tensors of one of torchtitan's training runs."""
    others = re.compile(r"(optimizer|optim|lr_scheduler|dataloader|train_state|rng)\.")
    kept = {key: tensor for key, tensor in tensors.items() if not others.match(key)}
    if kept and all(key.startswith(MODEL_PREFIX) for key in kept):
        return {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in kept.items()}
    return kept


def _translated(weights: Mapping[str, Tensor], adapter: Any, source: Path) -> dict[str, Tensor]:  # noqa: ANN401
    """Weights under the model's names, converted one by one, since some have no equivalent."""
    native: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        try:
            native |= adapter.from_hf({key: tensor})
        except KeyError:
            raise CheckpointError(f"{source}: {key}: not a weight of a Llama") from None
    return native


def _adapter(name: str | None, flavor: str | None) -> Any:  # noqa: ANN401 (torchtitan's)
    from titan_shampoo.titan import weights_adapter  # noqa: PLC0415 (imports torchtitan)

    return weights_adapter(name, flavor)
