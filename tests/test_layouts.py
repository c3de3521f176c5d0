"""Every layout of parameters gives the iterates of one process, to rounding.

Gradients are given, so that only the optimizer is under test; float64, so that any difference in
what is computed, and not only in its order, shows.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tests.ranks import run_on_ranks
from titan_shampoo import Shampoo
from titan_shampoo.distributed.layout import local_tensor

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
    "eps_relative": 1e-6,
}
STEPS = 20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks have: eigenvectors depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def train(placed: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters after STEPS steps, whole; ``placed(name, tensor)`` is how a tensor is stored."""
    params = {name: torch.nn.Parameter(placed(name, t)) for name, t in full_tensors(0).items()}
    params["frozen"].requires_grad_(False)
    optimizer = Shampoo(params.items(), **OPTIONS | options)
    for step in range(1, STEPS + 1):
        grads = gradients(step)
        for name, param in params.items():
            param.grad = placed(name, grads[name]) if name in grads else None
        optimizer.step()
    return {name: whole(param.detach()) for name, param in params.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain(_: str, tensor: Tensor) -> Tensor:
    return tensor.clone()


def on_mesh(shape: tuple[int, ...], placements: Any) -> Any:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "fsdp", "tp")[: len(shape)])

    def placed(_: str, tensor: Tensor) -> Tensor:
        wanted = [
            p if not isinstance(p, Shard) or p.dim < tensor.ndim else Replicate()
            for p in placements
        ]
        return distribute_tensor(tensor.clone(), mesh, wanted, src_data_rank=None)

    return placed


def fsdp_by_tensor_parallel(dim: int) -> Any:
    """What FSDP2 makes of parameters that are sharded over tp: strided where both cut rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))

    def placed(_: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return distribute_tensor(
                tensor.clone(), mesh, [Shard(0), Replicate()], src_data_rank=None
            )
        if dim == 1:
            return distribute_tensor(tensor.clone(), mesh, [Shard(0), Shard(1)], src_data_rank=None)
        fsdp, tp = mesh.get_local_rank("fsdp"), mesh.get_local_rank("tp")
        local = _part(_part(tensor, tp), fsdp).clone()
        return DTensor.from_local(
            local, mesh, [_StridedShard(0, split_factor=2), Shard(0)],
            run_check=False, shape=tensor.shape, stride=tensor.stride(),
        )  # fmt: skip

    return placed


def _part(tensor: Tensor, index: int) -> Tensor:
    """Half of the rows as torch.chunk cuts them, empty where there is none."""
    size = -(-tensor.shape[0] // 2)
    return tensor[index * size : (index + 1) * size]


LAYOUTS: dict[str, tuple[int, Any]] = {
    "ddp 2": (2, lambda: plain),
    "ddp 3": (3, lambda: plain),
    "fsdp 2": (2, lambda: on_mesh((2,), [Shard(0)])),
    "fsdp 3": (3, lambda: on_mesh((3,), [Shard(0)])),
    "fsdp 4": (4, lambda: on_mesh((4,), [Shard(0)])),
    "columns 3": (3, lambda: on_mesh((3,), [Shard(1)])),
    "hsdp 2x2": (4, lambda: on_mesh((2, 2), [Replicate(), Shard(0)])),
    "replicated 2": (2, lambda: on_mesh((2,), [Replicate()])),
    "fsdp x row-wise tp": (4, lambda: fsdp_by_tensor_parallel(1)),
    "fsdp x column-wise tp": (4, lambda: fsdp_by_tensor_parallel(0)),
}


def train_layout(layout: str, options: dict[str, Any]) -> dict[str, Tensor]:
    placed = LAYOUTS[layout][1]()
    if layout == "fsdp x column-wise tp":
        return train_strided(placed, options)
    return train(placed, options)


def train_strided(placed: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """As train; DTensor cannot gather uneven strided shards, so they are put together by hand."""
    params = {name: torch.nn.Parameter(placed(name, t)) for name, t in full_tensors(0).items()}
    optimizer = Shampoo(params.items(), **OPTIONS | options)
    for step in range(1, STEPS + 1):
        grads = gradients(step)
        for name, param in params.items():
            param.grad = placed(name, grads[name]) if name in grads else None
        optimizer.step()
    result = {}
    for name, param in params.items():
        parts: list[Any] = [None] * 4
        dist.all_gather_object(parts, local_tensor(param.detach()))
        rows = [parts[2 * fsdp + tp] for tp in range(2) for fsdp in range(2)]
        result[name] = whole(param.detach()) if param.ndim < 2 else torch.cat(rows)
    return result


def assert_equal(mine: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in expected.items():
        error = (mine[name] - tensor).norm() / tensor.norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_iterates_equal_those_of_one_process(layout: str) -> None:
    expected = train(plain, {})
    for result in run_on_ranks(LAYOUTS[layout][0], train_layout, layout, {}):
        assert_equal(result, expected, 1e-12)


@pytest.mark.parametrize("options", [
    {"block_size": 1024, "refresh": "together"},
    {"block_size": (2, 5), "grafting": "sgd", "weight_decay_type": "l2"},
    {"merge": "paper", "block_size": 12, "fallback": None},
    {"merge": "none", "block_size": 3, "nesterov": True},
])  # fmt: skip
def test_options_do_not_depend_on_the_layout(options: dict[str, Any]) -> None:
    expected = train(plain, options)
    for layout in ("fsdp 3", "hsdp 2x2"):
        for result in run_on_ranks(LAYOUTS[layout][0], train_layout, layout, options):
            assert_equal(result, expected, 1e-11)


@pytest.mark.parametrize("layout", ["fsdp 3", "hsdp 2x2", "ddp 2"])
def test_messages_in_bfloat16_cost_little_and_leave_replicas_equal(layout: str) -> None:
    options = {"communication_dtype": torch.bfloat16, "lr": 1e-3}
    expected = train(plain, {"lr": 1e-3})
    results = run_on_ranks(LAYOUTS[layout][0], train_layout, layout, options)
    for result in results:
        assert_equal(result, expected, 1e-2)
        assert_equal(result, results[0], 0.0)
    assert not torch.equal(results[0]["square"], expected["square"]), "the option does nothing"


def different_parameters() -> str:
    """The error of a rank whose matrix has another shape than its replica's."""
    weight = torch.nn.Parameter(torch.zeros(4, 4 + dist.get_rank()))
    try:
        Shampoo([("w", weight)])
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_with_different_parameters_are_refused_at_construction() -> None:
    for message in run_on_ranks(2, different_parameters):
        assert "have different parameters or options" in message
        assert "process_group" in message
