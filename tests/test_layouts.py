"""Every layout of parameters gives the iterates of one process, to rounding.

Gradients are given, so that only the optimizer is under test; float64, so that any difference in
what is computed, and not only in its order, shows. All layouts of as many ranks share one run.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tests.support.ranks import run_on_ranks
from titan_shampoo import SOAP, KLShampoo, Shampoo
from titan_shampoo.titan.initialization import local_part

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


Placer = Callable[[str, Tensor], Tensor]
"""How a tensor of this name is stored on this rank."""
Parts = dict[str, tuple[Tensor, Tensor]]
"""What a rank holds of each parameter: positions in the flat whole, and values, flat."""


@dataclass
class Layout:
    """How the model is stored."""

    placed: Placer
    names: Sequence[str] = tuple(SHAPES)
    """Parameters on this rank."""
    distribution: dict[str, Any] = field(default_factory=dict)
    """What the optimizer has to be told."""


def train(
    layout: Layout, method: str, options: Mapping[str, Any], *, disturbed: bool = False
) -> Parts:
    """What this rank holds after STEPS steps, with weights that others write if ``disturbed``."""
    start, placed = full_tensors(0), layout.placed
    params = {name: torch.nn.Parameter(placed(name, start[name])) for name in layout.names}
    if "frozen" in params:
        params["frozen"].requires_grad_(False)
    make, own = METHODS[method]
    optimizer = make(params.items(), **{**OPTIONS, **own, **options, **layout.distribution})
    for step in range(1, STEPS + 1):
        grads = gradients(step)
        for name, param in params.items():
            param.grad = placed(name, grads[name]) if name in grads else None
        optimizer.step()
        if disturbed:
            disturb(step, params, placed)
    return {name: part_of(param.detach()) for name, param in params.items()}


@torch.no_grad()
def disturb(step: int, params: Mapping[str, torch.nn.Parameter], placed: Placer) -> None:
    """Load weights after step 7, swap an average in after step 11, and out after step 12."""
    others = full_tensors(100)
    for name, param in params.items():
        other = placed(name, others[name])
        if step == 7:
            param.copy_(other)
        elif step == 11:
            param.lerp_(other, 0.5)
        elif step == 12:
            param.lerp_(other, -1.0)


def part_of(tensor: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(tensor.numel()).view(tensor.shape)
    if isinstance(tensor, DTensor):
        return local_part(positions, tensor).flatten(), tensor.to_local().flatten()
    return positions.flatten(), tensor.flatten()


def put_together(ranks: Sequence[Parts]) -> dict[str, Tensor]:
    """Whole parameters; what several ranks hold must be equal, bit by bit."""
    found = {}
    for name, shape in SHAPES.items():
        whole = torch.full(shape, torch.nan, dtype=torch.float64).flatten()
        for parts in ranks:
            if name in parts:
                positions, values = parts[name]
                before = whole[positions]
                assert torch.equal(before.where(~before.isnan(), values), values), name
                whole[positions] = values
        assert not whole.isnan().any(), f"{name}: no rank holds a part"
        found[name] = whole.view(shape)
    return found


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
    """What FSDP2 makes of parameters whose rows tp has cut: strided where both cut them."""
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


def train_layouts(
    names: Sequence[str],
    methods: Sequence[str],
    options: Mapping[str, Any],
    disturbed: bool = False,
) -> dict[tuple[str, str], Parts]:
    """What this rank holds after training by each method in each layout."""
    layouts = LAYOUTS[dist.get_world_size()]
    found = {}
    for name in names:
        layout = layouts[name]()
        for method in methods:
            found[name, method] = train(layout, method, options, disturbed=disturbed)
    return found


@functools.cache
def trained(ranks: int) -> list[dict[tuple[str, str], Parts]]:
    return run_on_ranks(ranks, train_layouts, list(LAYOUTS[ranks]), list(METHODS), {})


@functools.cache
def trained_alone(method: str) -> dict[str, Tensor]:
    return put_together([train(Layout(plain), method, {})])


def assert_equal(mine: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in expected.items():
        error = (mine[name] - tensor).norm() / tensor.norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("ranks", "layout"), [(ranks, layout) for ranks in LAYOUTS for layout in LAYOUTS[ranks]]
)
def test_iterates_equal_those_of_one_process(ranks: int, layout: str, method: str) -> None:
    whole = put_together([parts[layout, method] for parts in trained(ranks)])
    assert_equal(whole, trained_alone(method), 1e-12)


def test_weights_that_others_write_between_steps_are_respected() -> None:
    layouts, methods = ["fsdp", "hsdp 2x2", "mixed"], ["Shampoo", "SOAP"]
    results = run_on_ranks(4, train_layouts, layouts, methods, {}, True)
    for method in methods:
        expected = put_together([train(Layout(plain), method, {}, disturbed=True)])
        assert not torch.allclose(expected["square"], trained_alone(method)["square"])
        for layout in layouts:
            whole = put_together([parts[layout, method] for parts in results])
            assert_equal(whole, expected, 1e-12)


OF_OPTIONS: list[dict[str, Any]] = [
    {"block_size": 1024, "refresh": "together"},
    {"block_size": (2, 5), "grafting": "sgd", "weight_decay_type": "l2"},
    {"merge": "paper", "block_size": 12, "fallback": None},
    {"merge": "none", "block_size": 3, "nesterov": True},
]


def train_options(layout: str, some: Sequence[Mapping[str, Any]]) -> list[Parts]:
    return [train_layouts([layout], ["Shampoo"], o)[layout, "Shampoo"] for o in some]


@pytest.mark.parametrize(("ranks", "layout"), [(3, "fsdp"), (4, "hsdp 2x2")])
def test_options_do_not_depend_on_the_layout(ranks: int, layout: str) -> None:
    results = run_on_ranks(ranks, train_options, layout, OF_OPTIONS)
    for number, options in enumerate(OF_OPTIONS):
        expected = put_together([train(Layout(plain), "Shampoo", options)])
        assert_equal(put_together([parts[number] for parts in results]), expected, 1e-11)


@pytest.mark.parametrize(("ranks", "layout"), [(4, "hsdp 2x2"), (2, "ddp")])
def test_messages_in_bfloat16_cost_little_and_leave_replicas_equal(ranks: int, layout: str) -> None:
    options = {"communication_dtype": torch.bfloat16, "lr": 1e-3}
    expected = put_together([train(Layout(plain), "Shampoo", {"lr": 1e-3})])
    results = run_on_ranks(ranks, train_layouts, [layout], ["Shampoo"], options)
    found = put_together([parts[layout, "Shampoo"] for parts in results])
    assert_equal(found, expected, 1e-2)
    assert not torch.equal(found["square"], expected["square"]), "the option does nothing"
