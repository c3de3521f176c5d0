"""Small runs that save and resume: given gradients, every layout and method, no trainer."""

import copy
import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from checkpoint.manager import CheckpointManager
from checkpoint.reader import whole_tensors
from checkpoint.saving import write
from checkpoint.verify import verify
from titan_shampoo.distributed.layout import local_tensor
from titan_shampoo.distributed.state import BlockTensor
from titan_shampoo.titan import ParallelDims
from titan_shampoo.titan.config import JobConfig
from titan_shampoo.titan.optimizers import Members, OptimizersContainer

SHAPES = {
    "tok_embeddings.weight": (9, 4),
    "wq.weight": (10, 12),
    "wo.weight": (5, 7),
    "conv.weight": (6, 4, 2, 2),
    "norm.weight": (7,),
}
# What each layout of ranks is: mesh shape, names, degrees of torchtitan's dims.
LAYOUTS: dict[str, tuple[int, ...]] = {
    "single": (1,), "ddp2": (2,), "ddp3": (3,), "fsdp2": (2,), "fsdp3": (3,), "fsdp4": (4,),
    "hsdp2x2": (2, 2), "fsdp2xtp2": (2, 2), "pp2": (2,), "pp3": (3,),
}  # fmt: skip

OWN_TABLES = {
    "Shampoo": "shampoo", "SOAP": "soap", "KLShampoo": "kl_shampoo",
    "Eva": "eva", "EvaF": "eva_f", "EvaS": "eva_s", "FOOF": "foof", "KFAC": "kfac",
}  # fmt: skip
LAYER_METHODS = ("Eva", "EvaF", "EvaS", "FOOF", "KFAC")
_BLOCKS = {"block_size": 4, "precondition_frequency": 3, "start_step": 1, "momentum": 0.5}
_FACTORS = {"precondition_frequency": 3, "factor_frequency": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "Shampoo": _BLOCKS, "SOAP": _BLOCKS, "KLShampoo": _BLOCKS, "FOOF": _FACTORS, "KFAC": _FACTORS,
}  # fmt: skip
BATCH = 24


def world_of(layout: str) -> int:
    world = 1
    for extent in LAYOUTS[layout]:
        world *= extent
    return world


class Counter:
    """A component whose state is one number."""

    def __init__(self, key: str) -> None:
        self.key, self.value = key, 0

    def state_dict(self) -> dict[str, int]:
        return {self.key: self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state[self.key]


class Progress(Counter):
    """The number of steps, and of labels, which are not counted here."""

    def state_dict(self) -> dict[str, int]:
        return {"step": self.value, "num_labels_seen": 0}


class Run:
    """A model, its optimizers and what else a run consists of, in one layout."""

    def __init__(
        self,
        folder: Path,
        layout: str = "single",
        method: str = "Shampoo",
        *,
        options: dict[str, Any] | None = None,
        shapes: dict[str, tuple[int, ...]] | None = None,
        noise: float = 0.0,
        dtype: torch.dtype = torch.float32,
        settings: dict[str, Any] | None = None,
        **checkpoint: Any,
    ) -> None:
        self.layout, self.noise, self.dtype = layout, noise, dtype
        self.shapes = SHAPES if shapes is None else shapes
        torch.manual_seed(1234 + (dist.get_rank() if dist.is_initialized() else 0))
        self.place, dims = placement(layout)
        self.model = self._model()
        config: Any = copy.deepcopy(JobConfig().optimizer)
        config.name, config.lr, config.implementation = method, 0.1, "for-loop"
        if method in OWN_TABLES:
            for key, value in {**OPTIONS.get(method, {}), **(options or {})}.items():
                assert hasattr(getattr(config, OWN_TABLES[method]), key), key
                setattr(getattr(config, OWN_TABLES[method]), key, value)
        self.optimizers = OptimizersContainer([self.model], config, dims, self._whole_model())
        self.rates, self.loader = map(Counter, ("last_epoch", "samples"))
        self.progress = Progress("step")
        table = copy.deepcopy(JobConfig().checkpoint)
        for key, value in {"enable": True, "interval": 1, "keep_latest_k": 0, **checkpoint}.items():
            assert hasattr(table, key), key
            setattr(table, key, value)
        self.manager = CheckpointManager(
            dataloader=self.loader,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.rates,
            states={"train_state": self.progress},
            checkpoint_config=table,
            base_folder=str(folder),
        )
        if settings:
            self.manager._settings.update(settings)

    def _model(self) -> nn.Module:
        model = nn.Module()
        generator = torch.Generator().manual_seed(0)
        for index, (name, shape) in enumerate(self.shapes.items()):
            whole = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            if self._is_mine(index):
                outer, inner = name.split(".")
                module = nn.Module()
                module.register_parameter(inner, nn.Parameter(self.place(whole)))
                model.register_module(outer, module)
        return model

    def _whole_model(self) -> Members | None:
        """Names and shapes of the parameters of all stages of a pipeline; none are stacks."""
        if not self.layout.startswith("pp"):
            return None
        empty = partial(torch.empty, dtype=self.dtype, device="meta")
        return [(n, nn.Parameter(empty(shape)), 0, None) for n, shape in self.shapes.items()]

    def _is_mine(self, index: int) -> bool:
        is_pipeline = self.layout.startswith("pp")
        return not is_pipeline or index % dist.get_world_size() == dist.get_rank()

    def _differentiate(self) -> None:
        """Gradients that depend on the position in the data and on nothing else."""
        for name, param in self.model.named_parameters():
            whole = normal(name, self.loader.value, *param.shape)
            param.grad = self.place(whole.to(self.dtype))

    def step(self) -> int:
        """One step."""
        number = self.progress.value + 1
        self._differentiate()
        if self.noise:
            for param in self.model.parameters():
                grad = local_tensor(param.grad)  # type: ignore[arg-type]  # there is one
                grad.add_(torch.rand_like(grad), alpha=self.noise)
        for optimizer in self.optimizers.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + self.rates.value)
        self.optimizers.step()
        self.progress.value, self.rates.value = number, self.rates.value + 1
        self.loader.value += 8
        return number

    def train(self, until: int, *, last: int | None = None) -> int:
        """Step and save up to a step, or until asked to stop; returns the last step done."""
        while self.progress.value < until and not self.manager.stopped:
            number = self.step()
            self.manager.save(number, last_step=number == last)
        return self.progress.value

    def save_to(self, place: Path) -> None:
        """Write what the manager would, elsewhere."""
        manager = self.manager
        record = manager._record(self.progress.value)
        write(place, manager._full_state(), record, manager._group)

    def local_bytes(self) -> str:
        """A hash of everything on this rank: weights, optimizer state, counters."""
        digest = hashlib.sha256()
        tensors = self.manager._state.tensors(self.manager._state.components)
        for key, value in sorted(tensors.items()):
            if isinstance(value, BlockTensor):
                chunks = value.chunks
            else:
                chunks = {(): local_tensor(value.detach())}
            for start, chunk in sorted(chunks.items()):
                data = chunk.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                digest.update(f"{key}{start}".encode() + data)
        digest.update(repr(self.manager._state.values()).encode())
        return digest.hexdigest()


class LayerRun(Run):
    """A run whose method sees what goes through layers: each is given inputs of its own."""

    def _model(self) -> nn.Module:
        model = Layers()
        for index, (name, shape) in enumerate(self.shapes.items()):
            if self._is_mine(index):
                module = layer(name, shape).to(self.dtype)
                with torch.no_grad():
                    for key, param in module.named_parameters():
                        param.copy_(normal(f"{name} {key}", 0, *param.shape))
                model.register_module(name.removesuffix(".weight"), module)
        reader, self.readers = parallelize(model, self.layout)
        self.mine = slice(reader, None, self.readers)
        """This rank's part of a batch."""
        return model

    def _whole_model(self) -> Members | None:
        if not self.layout.startswith("pp"):
            return None
        with torch.device("meta"):
            modules = {name: layer(name, shape) for name, shape in self.shapes.items()}
        return [
            (f"{name.removesuffix('.weight')}.{key}", param, 0, None)
            for name, module in modules.items()
            for key, param in module.named_parameters()
        ]

    def _differentiate(self) -> None:
        self.optimizers.zero_grad()
        layers = dict(self.model.named_children())
        outputs = self.model({
            name: inputs_of(layer, name, self.loader.value, self.dtype)[self.mine]
            for name, layer in layers.items()
        })  # fmt: skip
        loss = torch.zeros((), dtype=self.dtype)
        for name, output in outputs.items():
            slopes = normal(f"{name} slope", self.loader.value, BATCH, *output.shape[1:])
            loss = loss + (output * slopes[self.mine]).sum() * self.readers / BATCH
        loss.backward()
        if self.layout.startswith("ddp"):
            for param in self.model.parameters():
                assert param.grad is not None
                dist.all_reduce(param.grad)
                param.grad /= self.readers


class Layers(nn.Module):
    """Layers side by side, each applied to its own input."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.get_submodule(name)(given) for name, given in inputs.items()}


def layer(name: str, shape: Any) -> nn.Module:
    """The layer that has a weight of this name and shape; some have a bias."""
    if "embeddings" in name:
        return nn.Embedding(*shape)
    if len(shape) == 1:
        return nn.RMSNorm(shape)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=name == "wq.weight")
    return nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)


def inputs_of(module: Any, name: str, position: int, dtype: torch.dtype) -> Tensor:
    """The global batch of a layer: tokens, images or rows."""
    if isinstance(module, nn.Embedding):
        return normal(name, position, BATCH).abs().long()
    if isinstance(module, nn.Conv2d):
        return normal(name, position, BATCH, module.in_channels, 4, 4).to(dtype)
    width = module.in_features if isinstance(module, nn.Linear) else module.weight.numel()
    return normal(name, position, BATCH, width).to(dtype)


def parallelize(model: nn.Module, layout: str) -> tuple[int, int]:
    """Shard the model as a layout says; which part of a batch this rank reads, and of how many."""
    shape = LAYOUTS[layout]
    if layout.startswith(("single", "pp")):
        return 0, 1
    if layout.startswith("ddp"):
        return dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    if layout == "fsdp2xtp2":
        parallelize_module(model, mesh["b"], {
            "wq": ColwiseParallel(output_layouts=Replicate()),
            "wo": RowwiseParallel(input_layouts=Replicate()),
        })  # fmt: skip
        mesh = mesh["a"]
    for module in model.children():
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return dist.get_rank() // (world_of(layout) // mesh.size()), mesh.size()


def normal(name: str, position: int, *shape: int) -> Tensor:
    """Normal numbers that depend on a name and a position only."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {position}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@contextmanager
def run_in(
    folder: Path, layout: str = "single", method: str = "Shampoo", **kwargs: Any
) -> Iterator[Run]:
    run = (LayerRun if method in LAYER_METHODS else Run)(folder, layout, method, **kwargs)
    try:
        yield run
    finally:
        run.manager.close()


def content(folder: Path) -> dict[str, Tensor]:
    """Every global tensor of a good checkpoint but the generators'."""
    manifest = verify(folder)
    keys = [key for key in manifest.tensors if not key.startswith("rng.")]
    return dict(whole_tensors(folder, manifest, keys))


def placement(layout: str) -> tuple[Any, ParallelDims]:
    """How a layout stores a tensor, and torchtitan's name for it."""
    shape = LAYOUTS[layout]
    world = world_of(layout)
    degrees = {"dp_replicate": 1, "dp_shard": 1, "tp": 1, "pp": 1}
    if layout.startswith("fsdp"):
        degrees |= {"dp_shard": shape[0], "tp": shape[1] if len(shape) > 1 else 1}
    elif layout.startswith("hsdp"):
        degrees |= {"dp_replicate": shape[0], "dp_shard": shape[1]}
    elif layout.startswith("ddp"):
        degrees["dp_replicate"] = world
    elif layout.startswith("pp"):
        degrees["pp"] = world
    dims = ParallelDims(cp=1, ep=1, etp=1, world_size=world, **degrees)
    if layout.startswith(("single", "ddp", "pp")):
        return Tensor.clone, dims
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    if layout == "fsdp2xtp2":
        return lambda tensor: _strided(tensor, mesh), dims
    placements: Any = {1: [Shard(0)], 2: [Replicate(), Shard(0)]}[len(shape)]
    return (
        lambda tensor: distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None),
        dims,
    )


def _strided(tensor: Tensor, mesh: Any) -> DTensor:
    """What FSDP2 makes of parameters that are sharded over tp along their rows."""
    if tensor.ndim < 2 or tensor.shape[0] % 2:
        return distribute_tensor(tensor.clone(), mesh, [Shard(0), Replicate()], src_data_rank=None)
    local = tensor.chunk(2)[mesh.get_local_rank("b")]
    parts = local.chunk(2)
    rank = mesh.get_local_rank("a")
    local = parts[rank] if rank < len(parts) else local[:0]
    return DTensor.from_local(
        local.clone(), mesh, [_StridedShard(0, split_factor=2), Shard(0)],
        run_check=False, shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def equal(first, second):
    one, two = content(first), content(second)
    return one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)


def run_until_signal(folder, number, delay, signalled_rank):
    with run_in(folder, "fsdp2", interval=1000) as run:
        run.manager.load()
        run.train(1)
        if dist.get_rank() == signalled_rank:
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        last = run.train(10_000)
        digest = run.local_bytes()
    with run_in(folder, "fsdp2", load_only=True) as run:
        run.manager.load()
        return last, run.progress.value, digest == run.local_bytes()
