"""Methods for layers on a small model: options, steps, and copies of weights and state."""

from collections.abc import Iterable
from typing import Any

import pytest
from torch import Tensor, nn

from tests.support.copied_state import copied_state
from tests.support.layer_models import normal
from titan_shampoo import FOOF, KFAC, Eva, EvaF, EvaS
from titan_shampoo.layers.optimizer import LayerOptimizer

METHODS: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "EvaS": EvaS, "FOOF": FOOF, "KFAC": KFAC}
OPTIONS: dict[str, Any] = {"lr": 0.05, "damping": 0.01, "weight_decay": 0.1}
every_method = pytest.mark.parametrize("method", METHODS)


def make(method: str, model: nn.Module, params: Any = None, **options: Any) -> LayerOptimizer:
    own = {} if method == "EvaS" else {"model": model}
    given = model.named_parameters() if params is None else params
    return METHODS[method](given, **OPTIONS | own | options)


def loss_of(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    images, targets = normal(step, 6, 2, 7, 6).to(dtype), normal(500 + step, 6, 3).to(dtype)
    return ((model(images) - targets) ** 2).sum(1).mean()


def advance(optimizer: LayerOptimizer, model: nn.Module, steps: Iterable[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def states(optimizer: LayerOptimizer) -> dict[str, Tensor]:
    return copied_state(optimizer.state_dict())
