"""Reports for people on a checkpoint, or on the difference of two."""

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkpoint.manifest import GENERATORS_PREFIX, MODEL_PREFIX, Manifest
from checkpoint.settings import settings_differences

Report = dict[str, Any]

_KINDS = {MODEL_PREFIX: "weights", GENERATORS_PREFIX: "random generators"}


def described(folder: Path, manifest: Manifest) -> Report:
    """Content, time, run, sizes by kind of state, and block grids."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for key, entry in manifest.tensors.items():
        kind = kind_of(key)
        sizes[kind] += entry.bytes
        counts[kind] += 1
    record = manifest.record
    return {
        "path": str(folder),
        **{key: record.get(key) for key in ("kind", "step", "run", "created", "software", "world")},
        "values": record.get("values", {}),
        "files": {name: file.bytes for name, file in sorted(manifest.files.items())},
        "kinds": {
            kind: {"tensors": counts[kind], "bytes": size} for kind, size in sizes.most_common()
        },
        "grids": _grids(record.get("geometry", {})),
    }


def kind_of(key: str) -> str:
    """``optim.layers.0.wq.weight.left_root.256`` -> ``left_root``."""
    for prefix, kind in _KINDS.items():
        if key.startswith(prefix):
            return kind
    name, _, last = key.rpartition(".")
    return name.rpartition(".")[2] if last.isdecimal() else last


def _grids(geometry: dict[str, Any]) -> list[Report]:
    """Groups of parameters with equal treatment."""
    alike: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, one in geometry.items():
        grid = one.get("grid")
        shape = " x ".join(map(str, grid["merged_shape"] if grid else one["shape"])) or "scalar"
        sizes = [max(b - a for a, b in pairwise(edges)) for edges in grid["edges"]] if grid else []
        blocks = " x ".join(map(str, sizes)) if grid else "whole"
        alike[one["method"], shape, blocks].append(name)
    return [
        {"method": method, "shape": shape, "blocks": blocks, "parameters": names}
        for (method, shape, blocks), names in sorted(alike.items())
    ]


def lines_of_description(report: Report) -> list[str]:
    """The report as text."""
    world, software = report["world"] or {}, report["software"] or {}
    total = sum(report["files"].values())
    lines = [
        f"{report['path']}",
        f"  step {report['step']} of run {report['run']}, {report['kind']}, {report['created']}",
        f"  by {world.get('ranks')} ranks on {world.get('device')}{_mesh(world)}, "
        + ", ".join(f"{name} {version}" for name, version in software.items()),
        f"  {_size(total)} in {len(report['files'])} files",
    ]
    for kind, one in report["kinds"].items():
        lines.append(f"    {kind:20} {_size(one['bytes']):>10}  {one['tensors']:5} tensors")
    for grid in report["grids"]:
        names = grid["parameters"]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(
            f"    {grid['method']:10} {grid['shape']:>14}  blocks {grid['blocks']:12} "
            f"{names[0]}{more}"
        )
    return lines


def _mesh(world: dict[str, Any]) -> str:
    axes = [f"{name} {extent}" for name, extent in (world.get("mesh") or {}).items()]
    return f" ({' x '.join(axes)})" if axes else ""


def compared(first_path: Path, first: Manifest, second_path: Path, second: Manifest) -> Report:
    """Differences of two checkpoints' settings, counters, geometry and tensors.

    Values are not read. Tensors of equal shape and dtype, but in files with different hashes, are
    listed under ``"content"`` and may still be equal.
    """
    one, two = first.record.get("geometry", {}), second.record.get("geometry", {})
    tensors: dict[str, list[str]] = defaultdict(list)
    for key in sorted(first.tensors.keys() | second.tensors.keys()):
        tensors[_difference(key, first, second)].append(key)
    tensors.pop("", None)
    return {
        "first": {"path": str(first_path), "step": first.step, "run": first.record.get("run")},
        "second": {"path": str(second_path), "step": second.step, "run": second.record.get("run")},
        "settings": settings_differences(
            first.record.get("settings", {}),
            second.record.get("settings", {}),
            places=("in the first", "in the second"),
        ),
        "counters": settings_differences(
            _counters(first), _counters(second), places=("in the first", "in the second")
        ),
        "geometry": [
            name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)
        ],
        "tensors": dict(tensors),
        "values": {},
    }


def _counters(manifest: Manifest) -> dict[str, Any]:
    """Counters of steps, samples and others, by dotted name."""
    values = manifest.record.get("values", {})
    return {f"{name}.{key}": one for name, state in values.items() for key, one in state.items()}


def _difference(key: str, first: Manifest, second: Manifest) -> str:
    one, two = first.tensors.get(key), second.tensors.get(key)
    if one is None or two is None:
        return "only in the first" if two is None else "only in the second"
    if one.shape != two.shape:
        return "shape"
    if one.dtype != two.dtype:
        return "dtype"
    files = [
        {(box.start, box.extent, manifest.files[box.file].xxh128) for box in entry.boxes}
        for entry, manifest in ((one, first), (two, second))
    ]
    return "" if files[0] == files[1] else "content"


def lines_of_comparison(report: Report) -> list[str]:
    """The comparison as text."""
    lines = [f"{one['path']}: step {one['step']} of run {one['run']}" for one in
             (report["first"], report["second"])]  # fmt: skip
    lines += [f"  setting   {line}" for line in report["settings"]]
    lines += [f"  counter   {line}" for line in report["counters"]]
    lines += [f"  geometry  {name}" for name in report["geometry"]]
    for what, keys in report["tensors"].items():
        shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        lines.append(f"  {what:18} {len(keys)} tensors: {shown}")
    largest = sorted(
        report["values"].items(), key=lambda item: (not item[0].startswith(MODEL_PREFIX), -item[1])
    )
    lines += [f"  value     {key}: by {change:.2g} of its largest" for key, change in largest[:10]]
    if len(largest) > 10:
        lines.append(f"  value     and {len(largest) - 10} more tensors")
    return lines if len(lines) > 2 else [*lines, "  no difference"]


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
