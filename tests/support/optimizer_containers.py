"""Optimizers of a run as the trainer builds them, and what they hold, put together."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_shampoo.config.tables import Group
from titan_shampoo.distributed.state import BlockTensor
from titan_shampoo.titan import ParallelDims
from titan_shampoo.titan.config import JobConfig
from titan_shampoo.titan.optimizers import (
    OptimizersContainer,
    build_optimizers,
)

OWN_TABLES = {"Shampoo": "shampoo", "SOAP": "soap", "KLShampoo": "kl_shampoo", "SGD": "sgd"}
Values = dict[str, Tensor]


def optimizer_config(method: str, groups: tuple[Group, ...] = (), **own: Any) -> Any:
    config: Any = copy.deepcopy(JobConfig().optimizer)
    config.name, config.lr, config.implementation = method, 0.1, "for-loop"
    config.groups = list(groups)
    for key, value in own.items():
        setattr(getattr(config, OWN_TABLES[method]), key, value)
    return config


def container_of(model: nn.Module, config: Any) -> OptimizersContainer:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    dims = ParallelDims(1, world_size, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=world_size)
    return build_optimizers([model], config, dims)


def whole(values: dict[str, Tensor]) -> Values:
    """The values in global coordinates, put together from all ranks; none of it is missing."""
    result = {}
    for name, value in values.items():
        if isinstance(value, BlockTensor):
            parts: list[Any] = [value.chunks]
            if dist.is_initialized():
                parts = [None] * dist.get_world_size()
                dist.all_gather_object(parts, value.chunks)
            result[name] = torch.full(value.shape, torch.nan, dtype=value.dtype)
            for offsets, chunk in (item for chunks in parts for item in chunks.items()):
                place = zip(offsets, chunk.shape, strict=True)
                result[name][tuple(slice(at, at + size) for at, size in place)] = chunk
        else:
            value = value.detach()
            result[name] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
        assert not result[name].isnan().any(), name
    return result


def parameters(model: nn.Module) -> Values:
    return whole(dict(model.named_parameters()))


def same(mine: Values, other: Values) -> bool:
    """True if names, dtypes and every bit are equal."""
    return mine.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name])
        for name, value in mine.items()
    )
