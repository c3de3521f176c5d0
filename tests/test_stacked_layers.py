"""Small layers of equal shape are stepped as one stack: the same iterates in fewer operations."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.layer_models import normal
from tests.support.ranks import run_on_ranks
from titan_shampoo import Eva, EvaF, EvaS
from titan_shampoo.layers import bunches

METHODS: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "EvaS": EvaS}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "unscaled": {"scaling": None},
    "relative": {"damping_mode": "relative", "scaling": "norm", "momentum": 0.0},
    "coupled decay": {"weight_decay": 0.1, "weight_decay_type": "l2", "nesterov": True},
}
STEPS, UNUSED = 4, 2


class Siblings(nn.Module):
    """Five layers of one shape side by side, one of another, and one that is used at times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 5, bias=False) for _ in range(5))
        self.last = nn.Linear(5, 3)
        self.double()

    def forward(self, inputs: Tensor, step: int) -> Tensor:
        used = [layer for n, layer in enumerate(self.layers) if n != UNUSED or step % 2]
        return self.last(sum(torch.tanh(layer(inputs)) for layer in used))


def train(method: str, options: dict[str, Any], *, sharded: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model: Any = Siblings()
    reader, num_readers = 0, 1
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        reader, num_readers = dist.get_rank(), dist.get_world_size()
    own = {} if method == "EvaS" else {"model": model}
    optimizer = METHODS[method](model.named_parameters(), lr=0.05, **own, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = normal(step, 12, 6), normal(100 + step, 12, 3)
        mine = slice(reader, None, num_readers)
        loss = (model(inputs[mine], step) - targets[mine]).square().sum() / (12 / num_readers)
        loss.backward()
        optimizer.step()
    params = {name: param.detach() for name, param in model.named_parameters()}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in params.items()}


def difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max(float((some[name] - others[name]).abs().max()) for name in others)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_stacked_layers_move_as_single_ones(
    method: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = train(method, VARIANTS[variant])
    monkeypatch.setattr(bunches, "SMALL_NUMEL", 0)
    assert 0 < difference(stacked, train(method, VARIANTS[variant])) < 1e-14


def train_sharded() -> dict[tuple[str, str], dict[str, Tensor]]:
    return {
        (method, variant): train(method, options, sharded=True)
        for method in METHODS
        for variant, options in VARIANTS.items()
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_stacked_layers_that_are_sharded_move_as_in_one_process(ranks: int) -> None:
    for found in run_on_ranks(ranks, train_sharded):
        for (method, variant), weights in found.items():
            expected = train(method, VARIANTS[variant])
            assert difference(weights, expected) < 1e-13, f"{method}, {variant}"
