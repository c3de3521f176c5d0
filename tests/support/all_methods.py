"""Every method on one small model that is trained on noise."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo

METHODS: dict[str, Any] = {
    "Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo, "EvaS": EvaS, "Eva": Eva,
    "EvaF": EvaF, "FOOF": FOOF, "KFAC": KFAC,
}  # fmt: skip
TAPPED = ("Eva", "EvaF", "FOOF", "KFAC")


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()


def made(method: str, net: nn.Module, groups: Any = None, **options: Any) -> torch.optim.Optimizer:
    own = {"model": net} if method in TAPPED else {}
    return METHODS[method](groups or net.named_parameters(), **own, **options)


def backward(net: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    net.zero_grad()
    net(rows).square().mean().backward()


def advance(optimizer: torch.optim.Optimizer, net: nn.Module, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()


def everything(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """Parameters and state, copied."""
    found = {name: param.detach().clone() for name, param in net.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": value.clone() for key, value in state.items()}
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name, value in one.items() if not torch.equal(value, other[name])]


def local_rows(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(2 * step + rank)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64)


def sharded_step(optimizer: torch.optim.Optimizer, net: nn.Module, step: int) -> None:
    optimizer.zero_grad()
    net(local_rows(step, torch.distributed.get_rank())).square().mean().backward()
    optimizer.step()


def whole(net: nn.Module) -> dict[str, Tensor]:
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach()
        for name, param in net.named_parameters()
    }
