"""Layouts of small models on ranks, and steps of methods for layers in each."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.support.layer_models import Mixed, Perceptron, normal
from titan_shampoo import Eva, EvaF, EvaS
from titan_shampoo.layers.optimizer import LayerOptimizer

METHODS: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "EvaS": EvaS}
STEPS, BATCH, MICROBATCHES, TIME = 4, 24, 2, 3
OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "damping": 1e-3,
    "weight_decay": 0.1,
    "statistics_decay": 0.5,
}
Values = dict[str, Tensor]


def make(method: str, model: nn.Module, **options: Any) -> LayerOptimizer:
    own = {} if method == "EvaS" else {"model": model}
    return METHODS[method](model.named_parameters(), **OPTIONS | own | options)


def batch(kind: type[nn.Module], step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the global batch."""
    shape = (2, 5, 5) if kind is Mixed else (TIME, 6)
    outputs = (3,) if kind is Mixed else (TIME, 4)
    return normal(step, BATCH, *shape), normal(1000 + step, BATCH, *outputs)


def train(
    model: nn.Module, optimizer: LayerOptimizer, kind: Any, reader: int, num_readers: int
) -> None:
    """Steps of two microbatches each on this reader's part, with an evaluation in between."""
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [t[reader::num_readers] for t in batch(kind, step)]
        for inputs, targets in zip(*[p.chunk(MICROBATCHES) for p in parts], strict=True):
            # The mean over this rank's batch; ranks are averaged by DDP and FSDP2.
            loss = ((model(inputs) - targets) ** 2).sum() / (BATCH * TIME / num_readers)
            loss.backward()
        with torch.no_grad():
            model(batch(kind, 99)[0])
        if isinstance(model, FSDPModule):
            model.reshard()  # the root stays gathered after an evaluation, with the old weights
        optimizer.step()


def values(model: nn.Module) -> Values:
    return {name.removeprefix("module."): whole(param) for name, param in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Column-wise, row-wise (with a bias), and replicated layers."""
    plan = {
        "first": ColwiseParallel(output_layouts=Replicate()),
        "thin": RowwiseParallel(input_layouts=Replicate()),
        "back": ColwiseParallel(output_layouts=Replicate()),
        "last": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def ddp(model: Any) -> tuple[nn.Module, int, int]:
    return DistributedDataParallel(model), dist.get_rank(), dist.get_world_size()


def fsdp(model: Any) -> tuple[nn.Module, int, int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.children():
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, dist.get_rank(), dist.get_world_size()


def fsdp_over_columns(model: Any) -> tuple[nn.Module, int, int]:
    def last_dim(param: nn.Parameter) -> Shard:
        return Shard(1 if param.ndim > 1 and param.shape[1] > 1 else 0)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, shard_placement_fn=last_dim)
    return model, dist.get_rank(), dist.get_world_size()


def summing_fsdp(model: Any) -> tuple[nn.Module, int, int]:
    """FSDP2 as torchtitan uses it: gradients are summed, and the loss is divided before."""
    sharded, rank, size = fsdp(model)
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return Divided(sharded, size), rank, size


class Divided(nn.Module):
    """A model whose gradients are divided by a number."""

    def __init__(self, model: nn.Module, divisor: int) -> None:
        super().__init__()
        self.module, self.divisor = model, divisor

    def forward(self, inputs: Tensor) -> Tensor:
        return _Divide.apply(self.module(inputs), self.divisor)


class _Divide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / ctx.divisor, None


def hsdp(model: Any) -> tuple[nn.Module, int, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "fsdp"))
    for module in model.children():
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, dist.get_rank(), 4


def tp(model: Any) -> tuple[nn.Module, int, int]:
    tensor_parallel(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    return model, 0, 1


def fsdp_by_tp(model: Any) -> tuple[nn.Module, int, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    tensor_parallel(model, mesh["tp"])
    fully_shard(model, mesh=mesh["fsdp"])
    return model, mesh.get_local_rank("fsdp"), 2


LAYOUTS: dict[str, tuple[int, Any, type[nn.Module]]] = {
    "ddp 2": (2, ddp, Mixed),
    "ddp 3": (3, ddp, Perceptron),
    "fsdp 2": (2, fsdp, Mixed),
    "fsdp 3": (3, fsdp, Mixed),
    "fsdp 4": (4, fsdp, Perceptron),
    "fsdp over columns": (2, fsdp_over_columns, Perceptron),
    "fsdp, summing": (2, summing_fsdp, Perceptron),
    "hsdp 2x2": (4, hsdp, Mixed),
    "tp": (2, tp, Perceptron),
    "fsdp x tp": (4, fsdp_by_tp, Perceptron),
}


def stages() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double(),
        nn.Sequential(nn.Tanh(), nn.Linear(5, 4)).double(),
    ]


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum() / (BATCH * TIME)
