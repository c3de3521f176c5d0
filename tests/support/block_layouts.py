"""Layouts of parameters on ranks, with gradients that are given, for methods for blocks."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from titan_shampoo import SOAP, KLShampoo, Shampoo

SHAPES = {
    "square": (12, 12),
    "wide": (5, 17),
    "row": (1, 6),
    "column": (6, 1),
    "few_rows": (2, 9),
    "conv": (6, 4, 3, 3),
    "vector": (7,),
    "tok_embeddings.weight": (9, 4),
    "frozen": (4, 4),
}
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "block_size": 4,
    "precondition_frequency": 3,
    "start_step": 1,
    "weight_decay": 0.1,
    "momentum": 0.5,
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Shampoo": (Shampoo, {"eps_relative": 1e-6}),
    "SOAP": (SOAP, {}),
    "KLShampoo": (KLShampoo, {}),
}
"""With their own options; vectors and embeddings are the fallback's in all of them."""


def full_tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, Tensor]:
    grads = full_tensors(step)
    del grads["frozen"]
    if step % 4 == 2:
        del grads["square"], grads["vector"]
    return grads


Placer = Callable[[str, Tensor], Tensor]
"""Form in which a tensor of this name is stored on this rank."""


@dataclass
class Layout:
    """Form in which the model is stored."""

    placed: Placer
    names: Sequence[str] = tuple(SHAPES)
    """Parameters on this rank."""
    distribution: dict[str, Any] = field(default_factory=dict)
    """Arguments of the optimizer for this layout."""


def plain(_: str, tensor: Tensor) -> Tensor:
    return tensor.clone()


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "fsdp", "tp")[: len(shape)])


def on_mesh(shape: tuple[int, ...], *placements: Placement) -> Layout:
    return Layout(placer(mesh_of(shape), *placements))


def placer(mesh: DeviceMesh, *placements: Placement) -> Placer:
    def placed(_: str, tensor: Tensor) -> Tensor:
        wanted = [
            p if not isinstance(p, Shard) or p.dim < tensor.ndim else Replicate()
            for p in placements
        ]
        return distribute_tensor(tensor.clone(), mesh, wanted, src_data_rank=None)

    return placed


def column_wise(shape: tuple[int, ...], *outer: Placement) -> Layout:
    """Layout of FSDP2 over parameters whose rows tp has cut: strided where both cut them."""
    mesh = mesh_of(shape)
    size = shape[-1]

    def placed(name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return placer(mesh, *outer, Shard(0), Replicate())(name, tensor)
        layout = [*outer, _StridedShard(0, split_factor=size), Shard(0)]
        return DTensor.from_local(
            _part(_part(tensor, mesh, -1), mesh, -2).clone(), mesh, layout,
            run_check=False, shape=tensor.shape, stride=tensor.stride(),
        )  # fmt: skip

    return Layout(placed)


def _part(tensor: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
    """This rank's share of the rows as torch.chunk cuts them, empty where there is none."""
    axis %= mesh.ndim
    size = -(-tensor.shape[0] // mesh.size(axis))
    index = mesh.get_local_rank(axis)
    return tensor[index * size : (index + 1) * size]


def on_mixed_meshes(shape: tuple[int, ...]) -> Layout:
    """Parameters on different meshes in one optimizer, one after the other, and plain ones."""
    world = dist.get_world_size()
    everyone, two = mesh_of((world,)), mesh_of(shape)
    placers = [
        placer(everyone, Shard(0)),
        placer(two, Replicate(), Shard(0)),
        plain,
        placer(everyone, Shard(1)),
        placer(two, Shard(1), Shard(0)),
    ]
    by_name = {name: placers[number % len(placers)] for number, name in enumerate(SHAPES)}
    return Layout(lambda name, tensor: by_name[name](name, tensor))


def pipeline(*placements: Placement) -> Layout:
    """Two stages, of which each rank knows its own, each on half of the ranks."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "fsdp"))
    stage = mesh.get_local_rank("pp")
    names = [name for number, name in enumerate(SHAPES) if number % 2 == stage]
    whole = [(name, torch.empty(shape, device="meta")) for name, shape in SHAPES.items()]
    distribution = {"all_params": whole, "pipeline_group": mesh["pp"].get_group()}
    return Layout(placer(mesh["fsdp"], *placements), names, distribution)


ROWS, COLUMNS, COPIES = Shard(0), Shard(1), Replicate()
LAYOUTS: dict[int, dict[str, Callable[[], Layout]]] = {
    1: {
        "plain": lambda: Layout(plain),
        "fsdp": lambda: on_mesh((1,), ROWS),
        "hsdp": lambda: on_mesh((1, 1), COPIES, ROWS),
        "fsdp x column-wise tp": lambda: column_wise((1, 1)),
    },
    2: {
        "ddp": lambda: Layout(plain),
        "fsdp": lambda: on_mesh((2,), ROWS),
        "columns": lambda: on_mesh((2,), COLUMNS),
        "replicated": lambda: on_mesh((2,), COPIES),
        "fsdp x row-wise tp": lambda: on_mesh((2, 1), ROWS, COLUMNS),
        "fsdp x column-wise tp": lambda: column_wise((1, 2)),
        "mixed": lambda: on_mixed_meshes((2, 1)),
        "pipeline": lambda: pipeline(ROWS),
    },
    3: {
        "ddp": lambda: Layout(plain),
        "fsdp": lambda: on_mesh((3,), ROWS),
        "columns": lambda: on_mesh((3,), COLUMNS),
        "replicated": lambda: on_mesh((3,), COPIES),
        "hsdp 3x1": lambda: on_mesh((3, 1), COPIES, ROWS),
        "hsdp 1x3": lambda: on_mesh((1, 3), COPIES, ROWS),
        "fsdp x row-wise tp": lambda: on_mesh((1, 3), ROWS, COLUMNS),
        "fsdp x column-wise tp": lambda: column_wise((3, 1)),
        "mixed": lambda: on_mixed_meshes((3, 1)),
    },
    4: {
        "ddp": lambda: Layout(plain),
        "fsdp": lambda: on_mesh((4,), ROWS),
        "columns": lambda: on_mesh((4,), COLUMNS),
        "hsdp 2x2": lambda: on_mesh((2, 2), COPIES, ROWS),
        "hsdp over columns": lambda: on_mesh((2, 2), COPIES, COLUMNS),
        "fsdp x replicated tp": lambda: on_mesh((2, 2), ROWS, COPIES),
        "fsdp x row-wise tp": lambda: on_mesh((2, 2), ROWS, COLUMNS),
        "fsdp x column-wise tp": lambda: column_wise((2, 2)),
        "hsdp x row-wise tp": lambda: on_mesh((2, 1, 2), COPIES, ROWS, COLUMNS),
        "hsdp x column-wise tp": lambda: column_wise((2, 1, 2), COPIES),
        "mixed": lambda: on_mixed_meshes((2, 2)),
        "pipeline": lambda: pipeline(ROWS),
        "pipeline, replicated": lambda: pipeline(COPIES),
    },
    8: {
        "hsdp x row-wise tp": lambda: on_mesh((2, 2, 2), COPIES, ROWS, COLUMNS),
        "hsdp x column-wise tp": lambda: column_wise((2, 2, 2), COPIES),
    },
}
