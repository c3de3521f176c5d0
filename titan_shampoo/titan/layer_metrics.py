"""Figures of layers and blocks from the optimizers, and their summary for people.

They are computed in logged steps only, because the numbers leave the device.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.plot import Record

LayerNumbers = dict[str, dict[str, float]]
"""``name of a layer -> {"rho": ..., "cosine": ...}``."""
BlockNumbers = dict[str, list[float]]
"""``name of a parameter -> one number per block``."""
Numbers = TypeVar("Numbers")


def on_host(layers: Mapping[str, Mapping[str, Tensor]]) -> LayerNumbers:
    """The tensors as numbers, by one transfer.

    Args:
        layers: 0-dim tensors by layer and kind.
    """
    flat = [value for numbers in layers.values() for value in numbers.values()]
    if not flat:
        return {}
    values = iter(torch.stack([value.double() for value in flat]).tolist())
    return {name: {kind: next(values) for kind in numbers} for name, numbers in layers.items()}


def lists_on_host(blocks: Mapping[str, Tensor]) -> BlockNumbers:
    """Numbers of blocks, by one transfer.

    Args:
        blocks: ``(blocks,)`` by parameter.
    """
    values = iter(torch.cat(list(blocks.values())).tolist() if blocks else ())
    return {name: [next(values) for _ in part] for name, part in blocks.items()}


def of_all_stages(here: dict[str, Numbers], stages: dist.ProcessGroup | None) -> dict[str, Numbers]:
    """Figures of all stages of a pipeline, from ``stages``; every rank must call it."""
    if stages is None:
        return here
    parts: list[dict[str, Numbers]] = [{} for _ in range(stages.size())]
    dist.all_gather_object(parts, here, group=stages)
    return {name: numbers for part in parts for name, numbers in part.items()}


def condition_numbers(blocks: BlockNumbers) -> Record:
    """``condition_median`` and ``condition_max`` over all blocks, and the layer of the maximum.

    Args:
        blocks: Condition numbers from optimizers of blocks; 0 for a block without one.
    """
    found = [number for numbers in blocks.values() for number in numbers if number > 0]
    if not found:
        return {}
    name = max(blocks, key=lambda name: max(blocks[name]))
    return {
        "condition_median": statistics.median(found),
        "condition_max": max(found),
        "condition_max_layer": name,
    }


def extremes(layers: LayerNumbers) -> Record:
    """``rho_min``, ``rho_min_layer``, ``rho_median``, ... over all layers, for each kind."""
    record: Record = {}
    kinds = dict.fromkeys(kind for numbers in layers.values() for kind in numbers)
    for kind in kinds:
        found = {name: numbers[kind] for name, numbers in layers.items() if kind in numbers}
        record[f"{kind}_median"] = statistics.median(found.values())
        for label, choose in (("min", min), ("max", max)):
            name = choose(found, key=found.__getitem__)
            record |= {f"{kind}_{label}": found[name], f"{kind}_{label}_layer": name}
    return record


def scalars(record: Record, kinds: Sequence[str] = ()) -> dict[str, float]:
    """The numbers of a record by name, ``"layers/<name>/rho"`` for numbers of layers."""
    found: dict[str, float] = {}
    for key, value in record.items():
        name = "/".join((*kinds, key))
        if isinstance(value, dict):
            found |= scalars(value, (*kinds, key))
        elif not isinstance(value, str):
            found[name] = value
    return found
