"""The parameter lists that optimizers are timed on, and the machine that they are timed on."""

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from titan_shampoo.models.resnet import ResNet, ResNetArgs

NamedParameters = list[tuple[str, nn.Parameter]]


def resnet50() -> NamedParameters:
    """ResNet-50 with 1000 classes: 25.6 M parameters."""
    return _filled(ResNet(ResNetArgs(depth=50, num_classes=1000)))


def transformer(dim: int = 512, num_layers: int = 6, vocabulary: int = 8192) -> NamedParameters:
    """A Llama-style transformer, embeddings and output untied: 27 M parameters by default."""
    hidden = 3 * dim
    model = nn.ModuleDict({"tok_embeddings": nn.Embedding(vocabulary, dim)})
    shapes = {"wq": (dim, dim), "wk": (dim, dim), "wv": (dim, dim), "wo": (dim, dim)}
    shapes |= {"w1": (dim, hidden), "w2": (hidden, dim), "w3": (dim, hidden)}
    for layer in range(num_layers):
        linears = {name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
        norms = {name: nn.RMSNorm(dim) for name in ("attention_norm", "ffn_norm")}
        model[f"layers_{layer}"] = nn.ModuleDict({**linears, **norms})
    model["norm"] = nn.RMSNorm(dim)
    model["output"] = nn.Linear(dim, vocabulary, bias=False)
    return _filled(model)


def _filled(model: nn.Module) -> NamedParameters:
    """The model's parameters with a gradient each, all normal."""
    params = list(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for _, param in params:
        param.data = 0.02 * torch.randn(param.shape, generator=generator)
        param.grad = 0.01 * torch.randn(param.shape, generator=generator)
    return params


WORKLOADS: dict[str, Callable[[], NamedParameters]] = {
    "resnet50": resnet50,
    "transformer-27M": transformer,
    "transformer-0.7M": functools.partial(transformer, dim=128, num_layers=2, vocabulary=1024),
}


def machine() -> str:
    """Processor, threads and versions, in one line."""
    lines = [line.partition(":") for line in _cpu_info()]
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
