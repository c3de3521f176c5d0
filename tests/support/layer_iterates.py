"""Losses, learning rates and weights of the runs whose iterates are compared with a reference."""

from typing import Any

from torch import Tensor, nn

from tests.support.layer_models import normal

LAYERS = ("conv", "dilated", "wide", "narrow", "last")
STEPS, LR, TOLERANCE = 20, 0.05, 1e-10


def loss_at(step: int) -> Any:
    def loss_of(model: nn.Module) -> Tensor:
        targets = normal(500 + step, 6, 3)
        return ((model(normal(step, 6, 2, 7, 6)) - targets) ** 2).sum(1).mean()

    return loss_of


def learning_rate(step: int) -> float:
    return LR * (1 - step / (2 * STEPS))


def arrays_of(module: nn.Module) -> tuple[Any, Any]:
    weight: Any = module.weight
    bias: Any = module.bias
    return (
        weight.detach().numpy().copy(),
        None if bias is None else bias.detach().numpy().copy(),
    )
