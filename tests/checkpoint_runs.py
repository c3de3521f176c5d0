"""Small runs that save and resume: given gradients, every layout and method, no trainer."""

import copy
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from checkpoint.manager import CheckpointManager
from checkpoint.reader import whole_tensors
from checkpoint.saving import write
from checkpoint.verify import verify
from titan_shampoo.distributed.layout import local_tensor
from titan_shampoo.distributed.state import BlockTensor
from titan_shampoo.titan import ParallelDims
from titan_shampoo.titan.config import JobConfig
from titan_shampoo.titan.optimizers import OptimizersContainer

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

OWN_TABLES = {"Shampoo": "shampoo", "SOAP": "soap", "KLShampoo": "kl_shampoo"}
OPTIONS = {
    "block_size": 4, "precondition_frequency": 3, "start_step": 1, "momentum": 0.5,
}  # fmt: skip


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
        for key, value in ({**OPTIONS, **(options or {})} if method in OWN_TABLES else {}).items():
            setattr(getattr(config, OWN_TABLES[method]), key, value)
        self.optimizers = OptimizersContainer([self.model], config, dims)
        self.rates, self.loader, self.progress = map(Counter, ("last_epoch", "samples", "step"))
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

    def _is_mine(self, index: int) -> bool:
        is_pipeline = self.layout.startswith("pp")
        return not is_pipeline or index % dist.get_world_size() == dist.get_rank()

    def step(self) -> int:
        """One step on gradients that depend on its number and on nothing else; then save."""
        number = self.progress.value + 1
        for name, param in self.model.named_parameters():
            key = zlib.crc32(f"{name} {self.loader.value}".encode())
            generator = torch.Generator().manual_seed(key)
            whole = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = self.place(whole.to(self.dtype))
            if self.noise:
                local_tensor(param.grad).add_(
                    torch.rand_like(local_tensor(param.grad)), alpha=self.noise
                )
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


@contextmanager
def run_in(folder: Path, *args: Any, **kwargs: Any) -> Iterator[Run]:
    run = Run(folder, *args, **kwargs)
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
