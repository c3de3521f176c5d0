"""Type and range of every value in the record of a manifest, and agreement between values.

Hashes prove that a manifest was not changed by accident, not that its values make sense, and
anybody can compute them again. All readers of checkpoints go through :func:`problem`, so that no
other module has to check a value. ``checkpoint.manifest`` checks files and tensors.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from checkpoint.manifest import (
    GENERATORS_PREFIX,
    MODEL_PREFIX,
    Manifest,
)

LARGEST = 1 << 60
"""Largest counter: beyond any run, and far below the end of 64-bit integers."""

_SHOWN = 60

_PER_BLOCK = re.compile(
    r"optim\.(?P<name>.+)\.(failures|refreshes|(left|right)\.(?P<extent>\d+))(\.[0-9a-f]{8})?"
)
"""Keys of state with a row per block, or per block of an extent."""

Rule = Callable[[str, Any], str | None]
"""Takes the dotted name of a value and the value; returns the problem, or None."""

Record = Mapping[str, Any]


def problem(manifest: Manifest) -> str | None:
    """The first value of a manifest with a wrong type or range, or that contradicts another.

    Returns:
        One line that begins with the value's dotted name; None if there is no such value.
    """
    return _RECORD("", manifest.record) or next(_contradictions(manifest), None)


# ---- rules


def _wrong(name: str, value: object, wanted: str) -> str:
    text = json.dumps(value, default=repr)
    shown = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return f"{name}: got {shown}, wanted {wanted}"


def _whole(least: int = 0) -> Rule:
    def rule(name: str, value: Any) -> str | None:  # noqa: ANN401 (whatever JSON has)
        if type(value) is int and least <= value <= LARGEST:
            return None
        return _wrong(name, value, f"a whole number from {least} to 2^60")

    return rule


def _is(kind: type, wanted: str) -> Rule:
    """A value of exactly one type."""
    return lambda name, value: None if type(value) is kind else _wrong(name, value, wanted)


def _or_null(rule: Rule) -> Rule:
    return lambda name, value: None if value is None else rule(name, value)


def _text(name: str, value: Any) -> str | None:  # noqa: ANN401
    if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 4096:
        return None
    return _wrong(name, value, "a line of text")


def _time(name: str, value: Any) -> str | None:  # noqa: ANN401
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return _wrong(name, value, "a time such as 2026-11-21T12:49:21+00:00")
    return None


def _one_of(*choices: str) -> Rule:
    wanted = " or ".join(f'"{choice}"' for choice in choices)
    return lambda name, value: None if value in [*choices] else _wrong(name, value, wanted)


def _plain(name: str, value: Any) -> str | None:  # noqa: ANN401
    """Any value of JSON that every reader can show: no infinity, no lone surrogate."""
    if isinstance(value, dict):
        return _each(_plain)(name, value)
    if isinstance(value, list):
        return _items(_plain)(name, value)
    if isinstance(value, float) and not math.isfinite(value):
        return _wrong(name, value, "a finite number")
    return _broken_text(name, value) if isinstance(value, str) else None


def _broken_text(name: str, value: str) -> str | None:
    try:
        value.encode()
    except UnicodeEncodeError:
        return _wrong(name, value, "text")
    return None


def _items(rule: Rule) -> Rule:
    """A list whose items obey a rule."""

    def rule_of_list(name: str, value: Any) -> str | None:  # noqa: ANN401
        if not isinstance(value, list):
            return _wrong(name, value, "a list")
        found = (rule(f"{name}[{index}]", item) for index, item in enumerate(value))
        return next(filter(None, found), None)

    return rule_of_list


def _each(rule: Rule) -> Rule:
    """A table with any keys, whose values obey a rule."""
    return _table({}, others=rule)


def _table(
    needed: Mapping[str, Rule],
    optional: Mapping[str, Rule] | None = None,
    *,
    others: Rule = _plain,
) -> Rule:
    """A table with a rule for each key, and one for all other keys."""
    known = {**needed, **(optional or {})}

    def rule_of_table(name: str, value: Any) -> str | None:  # noqa: ANN401
        if not isinstance(value, dict):
            return _wrong(name, value, "a table")
        prefix = f"{name}." if name else ""
        for key in needed:
            if key not in value:
                return f"{prefix}{key}: missing"
        for key, one in value.items():
            found = _text(f"a key of {name or 'the manifest'}", key)
            found = found or known.get(key, others)(prefix + key, one)
            if found:
                return found
        return None

    return rule_of_table


# ---- record of a manifest


_COUNT, _POSITIVE = _whole(0), _whole(1)
_INDEX = _items(_COUNT)

# By component; own recipes can have other ones.
_VALUES = _table(
    {
        "train_state": _table({"step": _COUNT, "num_labels_seen": _COUNT}),
        "lr_scheduler": _table({"last_epoch": _COUNT}),
        "dataloader": _table({"samples": _COUNT}, {"lanes": _POSITIVE}),
    },
    others=_each(_plain),
)

_GEOMETRY = _each(
    _table(
        {"shape": _INDEX, "method": _text},
        {
            "grid": _table({"merged_shape": _INDEX, "edges": _items(_INDEX), "batch_dims": _COUNT}),
            "options": _each(_plain),
            "meaning": _each(_plain),
        },
    )
)

# Settings that a checkpoint's readers use; all others are only compared and shown.
_SETTINGS = _table(
    {},
    {
        "debug.seed": _or_null(_is(int, "a whole number")),
        "model.name": _text,
        "model.flavor": _is(str, "text"),
        "model.hf_assets_path": _or_null(_is(str, "text")),
        "parallelism.context_parallel_degree": _POSITIVE,
        "parallelism.pipeline_parallel_degree": _POSITIVE,
        "parallelism.tensor_parallel_degree": _POSITIVE,
        "training.dataset": _or_null(_is(str, "text")),
        "training.global_batch_size": _whole(-1),
        "training.local_batch_size": _POSITIVE,
        "training.seq_len": _POSITIVE,
        "training.steps": _COUNT,
        "training.stream_lanes": _POSITIVE,
        "training.streaming": _is(bool, "true or false"),
        "validation.dataset": _or_null(_is(str, "text")),
    },
)

_RECORD = _table(
    {
        "kind": _one_of("full", "model"),
        "step": _COUNT,
        "run": _text,
        "created": _time,
        "software": _each(_text),
        "world": _table(
            {"ranks": _POSITIVE, "device": _text, "threads": _POSITIVE, "restarts": _COUNT},
            {"mesh": _each(_POSITIVE)},
        ),
    },
    {
        "values": _VALUES,
        "begun": _VALUES,
        "geometry": _GEOMETRY,
        "settings": _SETTINGS,
        "num_samples": _or_null(_COUNT),
        "source": _text,
    },
)


# ---- agreement of values


def _contradictions(manifest: Manifest) -> Iterator[str]:
    record = manifest.record
    yield from _of_world(record["world"], manifest)
    if record["kind"] == "model":
        for key in (*manifest.tensors, *(key for key in ("values", "geometry") if key in record)):
            if not key.startswith(MODEL_PREFIX):
                yield f'kind: got "model", but there is {key}, which is no weight'
        return
    for key in ("values", "geometry", "settings"):
        if key not in record:
            yield f"{key}: missing"
            return
    yield from _of_progress(record)
    yield from _of_geometry(manifest)


def _of_world(world: Record, manifest: Manifest) -> Iterator[str]:
    ranks = world["ranks"]
    if ranks % math.prod(world.get("mesh", {}).values()):
        yield f"world.mesh: got {json.dumps(world['mesh'])}, wanted a part of {ranks} ranks"
    for name in manifest.files:
        found = re.match(r"rank-(\d+)", name)
        if found and int(found[1]) >= ranks:
            yield f"world.ranks: got {ranks}, but there is {name}"
    for key, entry in manifest.tensors.items():
        if key.startswith(GENERATORS_PREFIX) and entry.shape[:1] != (ranks,):
            yield f"world.ranks: got {ranks}, but {key} has shape {list(entry.shape)}"


def _of_progress(record: Record) -> Iterator[str]:
    values, settings, step = record["values"], record["settings"], record["step"]
    if values["train_state"]["step"] != step:
        yield f"values.train_state.step: got {values['train_state']['step']}, wanted step {step}"
    if step > settings.get("training.steps", LARGEST):
        yield f"step: got {step}, wanted {settings['training.steps']} at most (training.steps)"
    lanes = values["dataloader"].get("lanes")
    if lanes is not None and lanes != settings.get("training.stream_lanes", lanes):
        wanted = settings["training.stream_lanes"]
        yield f"values.dataloader.lanes: got {lanes}, wanted {wanted} (training.stream_lanes)"
    if "begun" in record:  # older checkpoints lack it
        yield from _of_counters(record)


def _of_counters(record: Record) -> Iterator[str]:
    """Check that every counter has grown by the number of steps since the run began or resumed."""
    values, begun = record["values"], record["begun"]
    first = begun["train_state"]["step"]
    steps = record["step"] - first
    samples, labels, rates = (
        values[component][key] - begun[component][key]
        for component, key in (
            ("dataloader", "samples"), ("train_state", "num_labels_seen"),
            ("lr_scheduler", "last_epoch"),
        )
    )  # fmt: skip
    if steps < 0:
        yield f"begun.train_state.step: got {first}, wanted {record['step']} at most"
    if rates != steps:
        yield f"values.lr_scheduler.last_epoch: got {rates} since step {first}, wanted {steps}"
    batch = _batch_size(record)
    if not _is_multiple(samples, steps) or (batch and samples != steps * batch):
        wanted = f"{steps} x {batch}" if batch else f"a multiple of {steps}"
        yield f"values.dataloader.samples: got {samples} since step {first}, wanted {wanted}"
    if not _is_multiple(labels, samples):
        yield (
            f"values.train_state.num_labels_seen: got {labels} since step {first}, wanted a "
            f"multiple of {samples} samples"
        )


def _is_multiple(number: int, of: int) -> bool:
    return number >= 0 and (number % of == 0 if of else number == 0)


def _batch_size(record: Record) -> int | None:
    """Samples of all ranks in a step; None if the settings do not say."""
    settings = record["settings"]
    everywhere = settings.get("training.global_batch_size", -1)
    if everywhere > 0:
        return int(everywhere)
    if "training.local_batch_size" not in settings:
        return None
    sharing = math.prod(
        settings.get(f"parallelism.{axis}_parallel_degree", 1)
        for axis in ("tensor", "pipeline", "context")
    )
    return int(settings["training.local_batch_size"] * record["world"]["ranks"] // sharing)


def _of_geometry(manifest: Manifest) -> Iterator[str]:
    for name, one in manifest.record["geometry"].items():
        weight = manifest.tensors.get(MODEL_PREFIX + name)
        if weight is not None and list(weight.shape) != one["shape"]:
            yield f"geometry.{name}.shape: got {one['shape']}, wanted {list(weight.shape)}"
        if "grid" in one:
            yield from _of_grid(f"geometry.{name}", one)
    yield from _of_blocks(manifest)


def _of_grid(name: str, one: Record) -> Iterator[str]:
    merged, edges = one["grid"]["merged_shape"], one["grid"]["edges"]
    if math.prod(merged) != math.prod(one["shape"]):
        yield f"{name}.grid.merged_shape: got {merged}, of shape {one['shape']}"
    if len(edges) != len(merged) or any(
        along[:1] != [0] or along[-1] != extent or any(b <= a for a, b in pairwise(along))
        for along, extent in zip(edges, merged, strict=False)
    ):
        yield f"{name}.grid.edges: wanted ascending numbers from 0 to each of {merged}"
    if one["grid"]["batch_dims"] >= max(len(merged), 1):
        yield f"{name}.grid.batch_dims: got {one['grid']['batch_dims']} of {len(merged)} dims"


def _of_blocks(manifest: Manifest) -> Iterator[str]:
    """State by block, whose size must match the number of blocks in the grid."""
    geometry = manifest.record["geometry"]
    cuts = {name: _cut(one["grid"]["edges"]) for name, one in geometry.items() if "grid" in one}
    for key, entry in manifest.tensors.items():
        found = _PER_BLOCK.fullmatch(key)
        if found is None or found["name"] not in cuts:
            continue
        blocks, extents = cuts[found["name"]]
        number = entry.shape[0] if entry.shape else 0
        extent = found["extent"]
        if (int(extent), number) not in extents if extent else number != blocks:
            yield f"geometry.{found['name']}.grid.edges: not the blocks of {key}: {number} there"


def _cut(edges: list[list[int]]) -> tuple[int, set[tuple[int, int]]]:
    """Number of blocks, and pairs of an extent and the number of blocks with it along a dim."""
    counts = [len(along) - 1 for along in edges]
    blocks = math.prod(counts)
    extents: set[tuple[int, int]] = set()
    for along, count in zip(edges, counts, strict=True):
        found = Counter(b - a for a, b in pairwise(along))
        extents |= {(extent, number * blocks // count) for extent, number in found.items()}
    return blocks, extents
