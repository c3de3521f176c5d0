"""Methods for blocks on given gradients: options, steps, and copies of weights and state."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.copied_state import copied_state
from titan_shampoo import SOAP, KLShampoo, Shampoo
from titan_shampoo.blocks.optimizer import BlockOptimizer

Params = dict[str, torch.nn.Parameter]
METHODS: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo}
SHAPES: dict[str, tuple[int, ...]] = {"a": (7, 5), "b": (5, 5), "bias": (6,), "conv": (4, 3, 2, 2)}
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "block_size": 4,
    "precondition_frequency": 2,
    "weight_decay": 0.1,
    "momentum": 0.5,
}
every_method = pytest.mark.parametrize("method", METHODS)


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Random tensors that depend on their name and the seed, and on no other name."""
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(name.encode())))
        for name, shape in shapes.items()
    }


def parameters(names: Iterable[str] = SHAPES, dtype: torch.dtype = torch.float32) -> Params:
    start = tensors(0)
    return {name: torch.nn.Parameter(start[name].to(dtype)) for name in names}


def make(method: str, params: Mapping[str, Tensor], **options: Any) -> BlockOptimizer:
    return METHODS[method](params.items(), **OPTIONS | options)


def advance(optimizer: torch.optim.Optimizer, params: Params, steps: Iterable[int]) -> None:
    """Steps with the gradients of these step numbers."""
    for step in steps:
        grads = tensors(1000 * step)
        for name, param in params.items():
            param.grad = grads[name].to(param.dtype) + 0.5
        optimizer.step()


def values(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


def states(optimizer: BlockOptimizer) -> dict[str, Tensor]:
    """All state of all parameters, copied."""
    return copied_state(optimizer.local_state_dict())
