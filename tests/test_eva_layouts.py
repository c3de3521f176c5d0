"""Every layout of a real model, taps included, gives the iterates of one process to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.support.checkpoint_runs import LayerRun, run_in
from tests.support.layer_models import Mixed, Perceptron, made, normal
from tests.support.ranks import run_on_ranks
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
VARIANTS: dict[str, dict[str, Any]] = {
    "clipped": {},
    "unscaled": {"scaling": None, "damping": 0.3, "lr": 1e-3},
    "relative": {"damping_mode": "relative", "damping": 0.3, "scaling": "norm"},
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


def alone(method: str, kind: Any, options: dict[str, Any]) -> Values:
    model = made(kind)
    train(model, make(method, model, **options), kind, 0, 1)
    return values(model)


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
    """As torchtitan: gradients are summed, and the loss is divided before."""
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


def train_layout(layout: str) -> dict[tuple[str, str], Values]:
    """What every method and variant makes of the model in this layout."""
    _, place, kind = LAYOUTS[layout]
    found = {}
    for method in METHODS:
        for variant, options in VARIANTS.items():
            model, reader, num_readers = place(made(kind))
            optimizer = make(method, model, **options)
            train(model, optimizer, kind, reader, num_readers)
            found[method, variant] = values(model)
    return found


QUICK = ("fsdp 3", "hsdp 2x2", "fsdp x tp")  # of each kind the one with more to it


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS],
)
def test_iterates_equal_those_of_one_process(layout: str) -> None:
    size, _, kind = LAYOUTS[layout]
    results = run_on_ranks(size, train_layout, layout)
    for method in METHODS:
        for variant, options in VARIANTS.items():
            expected = alone(method, kind, options)
            for result in results:
                for name, tensor in expected.items():
                    mine = result[method, variant][name]
                    error = (mine - tensor).norm() / tensor.norm()
                    assert error <= 1e-12, f"{method}, {variant}, {name}: {error:.1e}"


def stages() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double(),
        nn.Sequential(nn.Tanh(), nn.Linear(5, 4)).double(),
    ]


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum() / (BATCH * TIME)


def train_stage(method: str, options: dict[str, Any]) -> Values:
    """One of two stages, 1F1B; all weights by their names in the whole."""
    stage = dist.get_rank()
    lone = [dist.new_group([rank]) for rank in range(2)][stage]
    module = stages()[stage]
    pipeline = PipelineStage(module, stage, 2, torch.device("cpu"))
    schedule = Schedule1F1B(pipeline, MICROBATCHES * 2, loss_fn=mean_loss, scale_grads=False)
    groups = {"process_group": lone, "pipeline_group": dist.group.WORLD}
    optimizer = make(method, module, **options, **groups)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch(Perceptron, step)
        if stage == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets, losses=[])
        optimizer.step()
    return {f"{stage}.{name}": value for name, value in values(module).items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_stages_of_a_pipeline_are_scaled_by_one_number(method: str, variant: str) -> None:
    model = nn.Sequential(*stages())
    optimizer = make(method, model, **VARIANTS[variant])
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch(Perceptron, step)
        mean_loss(model(inputs), targets).backward()
        optimizer.step()
    results = run_on_ranks(2, train_stage, method, VARIANTS[variant])
    for name, tensor in values(model).items():
        mine = (results[0] | results[1])[name]
        error = (mine - tensor).norm() / tensor.norm()
        assert error <= 1e-12, f"{name}: {error:.1e}"


def weights_without_tokens_here(folder: Path, method: str, layout: str) -> Values:
    """Weights after five steps of a batch of which the first rank reads all."""
    with run_in(folder, layout, method, dtype=torch.float64, load_only=True) as run:
        assert isinstance(run, LayerRun)
        if layout != "single":
            run.mine = slice(None) if dist.get_rank() == 0 else slice(0, 0)
        for _ in range(5):
            run.step()
        return values(run.model)


@pytest.mark.parametrize("method", ["Eva", "EvaF", "EvaS", "FOOF", "KFAC"])
def test_a_rank_without_tokens_takes_nothing_from_what_the_others_measure(
    tmp_path: Path, method: str
) -> None:
    (expected,) = run_on_ranks(1, weights_without_tokens_here, tmp_path, method, "single")
    for found in run_on_ranks(2, weights_without_tokens_here, tmp_path, method, "fsdp2"):
        for name, weight in expected.items():
            error = (found[name] - weight).norm() / weight.norm()
            assert error <= 1e-12, f"{name}: {error:.1e}"
