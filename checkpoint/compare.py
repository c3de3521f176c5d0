"""Comparison of a checkpoint with a run: parameters, methods, block grids.

It reads the manifest only, before a tensor changes.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from checkpoint.manifest import OPTIMIZER_PREFIX, Manifest
from checkpoint.reblock import can_reblock, is_cut_at_shards
from checkpoint.state import PREFIXES, Geometry
from checkpoint.writer import DTYPE_NAMES

# Options that add or remove state, by the name of the state.
_OPTIONS = {
    "num_measured": "factor_frequency",
    "momentum": "momentum",
    "momentum_buffer": "momentum",
    "exp_avg": "betas (beta1 > 0), or fallback",
    "exp_avg_sq": "grafting, or fallback",
    "average": "optimizer.average_decay",
    "curvature_mean": "damping_mode",
    **dict.fromkeys(("left_basis", "right_basis"), "root_method, or factored_damping"),
    **dict.fromkeys(("left_inverse", "right_inverse"), "factored_damping"),
    **dict.fromkeys(("left_values", "right_values"), "factored_damping"),
    **dict.fromkeys(("left", "right"), "bias and max_factor_dim"),
}
_STATE_NAME = re.compile(r"\.(\w+)(\.\d+(x\d+)?)?(\.[0-9a-f]{8})?$")


def geometry_problems(mine: Geometry, theirs: Geometry) -> Iterator[str]:
    """One line per parameter whose optimizer state has another meaning in a checkpoint."""
    for name, own in mine.items():
        other = theirs.get(name)
        if other is None:
            yield f"{name}: not a trained parameter in the checkpoint"
        elif own["method"] != other["method"]:
            yield (
                f'{name}: state of "{other["method"]}" in the checkpoint, "{own["method"]}" in '
                "this run; set optimizer.name or optimizer.groups"
            )
        elif own["shape"] != other["shape"]:
            yield f"{name}: shape {other['shape']} in the checkpoint, {own['shape']} in this run"
        else:
            yield from _grid_problems(name, own, other)


def _grid_problems(name: str, own: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    mine, theirs = own.get("grid"), other.get("grid")
    if mine != theirs:
        yield (
            f"{name}: blocks cut at {_edges(theirs)} in the checkpoint, {_edges(mine)} in this "
            f"run; {_advice(own, other)}"
        )
    for key, value in own.get("meaning", {}).items():
        saved = other.get("meaning", {}).get(key)
        if saved != value:
            yield f"{name}: {key} = {saved} in the checkpoint, {value} in this run"


def _edges(grid: dict[str, Any] | None) -> str:
    if grid is None:
        return "nothing"
    cuts = []
    for along in grid["edges"]:
        edges = [*map(str, along)]
        cuts.append(", ".join(edges if len(edges) < 7 else [*edges[:3], "...", edges[-1]]))
    return " x ".join(f"({cut})" for cut in cuts)


def _advice(own: dict[str, Any], other: dict[str, Any]) -> str:
    """Advice for blocks with other edges."""
    options = _options(own, other)
    without_state = 'set checkpoint.exclude_from_loading = ["optimizer"]'
    if is_cut_at_shards(other):
        cut = 'block_alignment = "shard" cuts them where shards end:'
        first = f"set {options}, and" if options else cut
        return (
            f"{first} resume on ranks that shard as those that saved it, or {without_state}; "
            'checkpoint.reblock is for block_alignment = "global"'
        )
    if can_reblock(own, other):
        return f'set {f"{options}, or " if options else ""}checkpoint.reblock = "approximate"'
    return f"set {options}" if options else without_state


def _options(own: dict[str, Any], other: dict[str, Any]) -> str:
    """The options of the checkpoint that differ here."""
    mine, theirs = own.get("options", {}), other.get("options", {})
    return ", ".join(
        f"{key} = {json.dumps(theirs[key])}" for key in theirs if theirs[key] != mine.get(key)
    )


def tensor_problems(wanted: Mapping[str, Tensor], manifest: Manifest) -> Iterator[str]:
    """One line per wanted tensor that a checkpoint lacks, or has in another shape or dtype."""
    for key, tensor in wanted.items():
        entry = manifest.tensors.get(key)
        if entry is None:
            yield f"{key}: not in the checkpoint{option_of(key)}"
        elif entry.shape != tuple(tensor.shape):
            yield f"{key}: {list(entry.shape)} in the checkpoint, {list(tensor.shape)} in this run"
        elif entry.dtype != DTYPE_NAMES.get(tensor.dtype):
            yield f"{key}: {entry.dtype} in the checkpoint, {tensor.dtype} in this run"


def option_of(key: str) -> str:
    """Clause that names the option which decides whether a tensor exists; may be empty."""
    found = _STATE_NAME.search(key) if key.startswith(OPTIMIZER_PREFIX) else None
    option = _OPTIONS.get(found[1]) if found else None
    return f"; set {option} as in the run that saved it" if option else ""


def unwanted(wanted: Mapping[str, Tensor], manifest: Manifest) -> set[str]:
    """Keys of a checkpoint whose kind this rank loads, but not these keys."""
    prefixes = tuple(p for p in PREFIXES.values() if any(key.startswith(p) for key in wanted))
    return {key for key in manifest.tensors if key.startswith(prefixes)} - wanted.keys()
