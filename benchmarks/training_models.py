"""The models of both recipes with one batch each, ready for whole training steps on some ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from titan_shampoo.models.resnet import ResNet, ResNetArgs

Layout = Literal["fsdp", "ddp"]


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank does in one step."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    """Mean loss of this rank's batch."""
    size: str
    """Of the batch, for the table."""


def transformer(flavor: str, tokens: int, sequence: int) -> Job:
    """Torchtitan's Llama of some flavour of the recipe, such as "27M"; random tokens."""
    # Answers for a CPU what torchtitan asks of a device, so it comes first.
    from titan_shampoo.titan.recipes import TRANSFORMERS  # noqa: PLC0415

    # isort: split
    from torchtitan.models.llama3 import Transformer  # noqa: PLC0415

    if tokens % sequence:
        raise SystemExit(f"--tokens {tokens}: wanted a multiple of --sequence {sequence}")
    if flavor not in TRANSFORMERS:
        raise SystemExit(f"--flavor {flavor}: wanted one of {', '.join(TRANSFORMERS)}")
    args = replace(TRANSFORMERS[flavor], max_seq_len=sequence)
    model = Transformer(args)
    with torch.no_grad():
        model.init_weights()
    text = torch.randint(args.vocab_size, (tokens // sequence, sequence + 1))

    def loss(module: nn.Module) -> Tensor:
        return cross_entropy(module(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return Job(model, loss, f"{tokens} tokens")


def resnet50(images: int, pixels: int) -> Job:
    """ResNet-50 on random images of ``pixels`` along each edge."""
    model = ResNet(ResNetArgs(depth=50, num_classes=1000))
    model.init_weights()
    batch, labels = torch.randn(images, 3, pixels, pixels), torch.randint(1000, (images,))

    def loss(module: nn.Module) -> Tensor:
        return cross_entropy(module(batch), labels)

    return Job(model, loss, f"{images} images of {pixels}")


def parallel(model: nn.Module, layout: Layout) -> nn.Module:
    """The model on all ranks: each block and the whole a unit of FSDP2, or wrapped by DDP."""
    if not dist.is_initialized():
        return model
    if layout == "ddp":
        return DistributedDataParallel(model)
    for container in (module for module in model.modules() if _is_container(module)):
        for block in container.children():
            fully_shard(block)
    fully_shard(model)
    return model


def _is_container(module: nn.Module) -> bool:
    """Whether a module holds the blocks of a network."""
    children = list(module.children())
    is_list = isinstance(module, nn.Sequential | nn.ModuleDict)
    return is_list and all(next(iter(child.children()), None) is not None for child in children)
