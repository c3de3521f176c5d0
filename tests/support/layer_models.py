"""Small models of layers in float64, and what goes through them, row by row."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.reference.eva import Seen


class Mixed(nn.Module):
    """Linear layers with and without bias, convolutions of all kinds, a norm, and an odd row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1)
        self.dilated = nn.Conv2d(4, 3, (2, 3), padding=2, dilation=2, bias=False)
        self.norm = nn.GroupNorm(1, 3)
        self.wide = nn.Linear(3, 5)
        self.narrow = nn.Linear(5, 1, bias=False)
        self.last = nn.Linear(1, 3)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.dilated(torch.tanh(self.conv(images))))
        tokens = self.norm(hidden).flatten(2).mT
        return self.last(self.narrow(torch.tanh(self.wide(tokens)))).mean(1)


class Perceptron(nn.Module):
    """Linear layers of uneven sizes, one of them a single row, on tokens ``(batch, time, 6)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.thin = nn.Linear(8, 1)
        self.back = nn.Linear(1, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 4)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(tokens))
        hidden = hidden + self.back(self.thin(hidden))
        return 2 * self.last(self.norm(hidden))  # FSDP2 loses its hook on an output that is a view


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind: type[nn.Module], seed: int = 0) -> Any:
    """A model whose weights depend on the seed only."""
    torch.manual_seed(seed)
    return kind()


def rows_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """The rows that the matrix of a layer is applied to, ``(rows, d_in)``; groups are not known."""
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        patches = functional.unfold(
            inputs, module.kernel_size, dilation=module.dilation, padding=module.padding,
            stride=module.stride,
        )  # fmt: skip
        return patches.mT.reshape(-1, patches.shape[1])
    return inputs.reshape(-1, inputs.shape[-1])


def seen_by(model: nn.Module, loss_of: Any, names: Iterable[str]) -> dict[str, Seen]:
    """Gradients, inputs and output gradients of layers, found without any tap.

    Args:
        model: Left without gradients.
        loss_of: Called with the model.
        names: Of the layers.
    """
    passed: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name in names:

        def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            passed[name] = inputs[0].detach(), output

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    loss = loss_of(model)
    for handle in handles:
        handle.remove()
    layers = {name: model.get_submodule(name) for name in passed}
    params = [p for module in layers.values() for p in module.parameters()]
    outputs = [output for _, output in passed.values()]
    grads = torch.autograd.grad(loss, [*params, *outputs])
    by_param = dict(zip(params, grads, strict=False))
    seen = {}
    for (name, module), grad in zip(layers.items(), grads[len(params) :], strict=True):
        rows = grad.movedim(1, -1) if isinstance(module, nn.Conv2d) else grad
        bias: Any = module.bias
        weight: Any = module.weight
        seen[name] = Seen(
            by_param[weight].numpy().copy(),
            None if bias is None else by_param[bias].numpy().copy(),
            rows_of(module, passed[name][0]).numpy().copy(),
            rows.reshape(-1, rows.shape[-1]).numpy().copy(),
        )
    return seen
