"""Parameters of any shape on any meshes, in one optimizer, take the steps of one process."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests.support.block_views import of_blocks
from tests.support.internals import plan_of, stacks_of
from tests.support.ranks import run_on_ranks
from titan_shampoo import KLShampoo, Shampoo
from titan_shampoo.distributed import blocks as blocks_module
from titan_shampoo.distributed import plan as plan_module
from titan_shampoo.distributed.layout import local_tensor

STEPS = 6
METHODS: dict[str, Any] = {"Shampoo": Shampoo, "KLShampoo": KLShampoo}
MESHES: dict[int, list[tuple[int, ...]]] = {2: [(2,)], 3: [(3,)], 4: [(4,), (2, 2), (1, 4)]}

Placed = dict[str, tuple[DeviceMesh | None, list[Placement]]]


@dataclass(frozen=True)
class Case:
    """A random model, how each of its parameters lies, and options; the same on all ranks."""

    shapes: dict[str, tuple[int, ...]]
    placed: Placed
    options: dict[str, Any]
    method: str
    chance_of_no_gradient: float


def random_case(seed: int, meshes: list[DeviceMesh]) -> Case:
    draw = random.Random(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    placed: Placed = {}
    for number in range(draw.randint(1, 6)):
        shape = tuple(draw.randint(1, 9) for _ in range(draw.choice([0, 1, 2, 2, 2, 3, 4])))
        name = f"layers.{number}"
        shapes[name] = shape
        mesh = draw.choice([None, *meshes, *meshes])
        axes = [Replicate(), *[Shard(dim) for dim in range(len(shape))]]
        placed[name] = (mesh, [draw.choice(axes) for _ in range(mesh.ndim if mesh else 0)])
    options = {
        "lr": 0.1,
        "block_size": draw.choice([1, 2, 3, 4, 64, (2, 5)]),
        "merge": draw.choice(["matrix", "none"]),
        "precondition_frequency": draw.randint(1, 4),
        "start_step": draw.randint(1, 3),
        "refresh": draw.choice(["staggered", "together"]),
        "grafting": draw.choice(["adam", "sgd", None]),
        "momentum": draw.choice([0.0, 0.5]),
        "weight_decay": draw.choice([0.0, 0.1]),
        "fallback": draw.choice(["adamw", None]),
    }
    method = draw.choice(list(METHODS))
    if method == "Shampoo":
        options["eps"] = 1e-3  # blocks may be singular: roots must not amplify rounding
    return Case(shapes, placed, options, method, draw.choice([0.0, 0.3]))


def drawn(case: Case, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in case.shapes.items()
    }


def gradients(case: Case, step: int) -> dict[str, Tensor | None]:
    draw = random.Random(step)
    grads = drawn(case, step)
    return {n: None if draw.random() < case.chance_of_no_gradient else g for n, g in grads.items()}


def place(case: Case, name: str, whole: Tensor) -> Tensor:
    mesh, placements = case.placed[name]
    if mesh is None:
        return whole.clone()
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def compare(case: Case, alone: dist.ProcessGroup) -> None:
    """Train on all ranks and on this one alone; the parts of this rank must agree."""
    runs = {}
    for group in (None, alone):
        params = {
            name: torch.nn.Parameter(place(case, name, whole) if group is None else whole)
            for name, whole in drawn(case, 0).items()
        }
        optimizer = METHODS[case.method](params.items(), process_group=group, **case.options)
        for step in range(1, STEPS + 1):
            for name, grad in gradients(case, step).items():
                there = grad is not None and group is None
                params[name].grad = place(case, name, grad) if there and grad is not None else grad
            optimizer.step()
        runs[group] = {name: param.detach() for name, param in params.items()}
    for name, whole in runs[alone].items():
        mine, expected = (local_tensor(t) for t in (runs[None][name], place(case, name, whole)))
        error = (mine - expected).norm() / max(1.0, float(whole.norm()))
        told = f"{name} {case.shapes[name]} {case.placed[name]} {case.method} {case.options}"
        assert error <= 1e-9, f"{told}: relative error {error:.1e}"


def compare_cases(seeds: list[int]) -> int:
    world = dist.get_world_size()
    names = ("replicas", "shards")
    meshes = [
        init_device_mesh("cpu", shape, mesh_dim_names=names[-len(shape) :])
        for shape in MESHES[world]
    ]
    alone, _ = dist.new_subgroups(group_size=1)
    for seed in seeds:
        with pytest.MonkeyPatch.context() as patch:
            if seed % 2:  # small blocks travel for balance as well, and buckets are small
                patch.setattr(blocks_module, "FLOPS_PER_BYTE", 0.0)
                patch.setattr(plan_module, "BUCKET_NUMEL", 100)
            try:
                compare(random_case(seed, meshes), alone)
            except Exception as error:
                error.add_note(f"seed {seed} on {world} ranks")
                raise
    return len(seeds)


@pytest.mark.parametrize("ranks", MESHES)
def test_random_models_on_random_layouts(ranks: int) -> None:
    seeds = list(range(100 * ranks, 100 * ranks + 10))
    assert run_on_ranks(ranks, compare_cases, seeds) == [10] * ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", MESHES)
def test_two_hundred_random_models_on_random_layouts(ranks: int) -> None:
    seeds = list(range(1000 * ranks, 1000 * ranks + 67))
    assert run_on_ranks(ranks, compare_cases, seeds) == [67] * ranks


def one_small_parameter() -> tuple[int, list[str], list[str]]:
    """Four ranks in two groups of two, one block: three ranks own nothing."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    whole = torch.arange(12.0).view(3, 4)
    placed = distribute_tensor(whole, mesh, [Replicate(), Shard(0)], src_data_rank=None)
    param = torch.nn.Parameter(placed)
    optimizer = Shampoo([("w", param)], precondition_frequency=1)
    for _ in range(2):
        param.grad = placed.clone()
        optimizer.step()
    saved = optimizer.state_dict()
    again = Shampoo([("w", param)], precondition_frequency=1)
    again.load_state_dict(saved)
    again.step()
    global_keys = sorted(again.sharded_state()["w"])
    return len(plan_of(again).stacks), sorted(saved["state"][0]), global_keys


def test_ranks_that_own_nothing_construct_step_save_and_load() -> None:
    results = run_on_ranks(4, one_small_parameter)
    assert sorted(stacks for stacks, _, _ in results) == [0, 0, 0, 1]
    for _, keys, global_keys in results:
        assert {"step", "cursor"} <= set(keys)
        assert global_keys == results[0][2]


def bytes_of_state(shards: int) -> int:
    """State of this rank, momentum aside, with four ranks as ``shards`` columns of replicas."""
    mesh = init_device_mesh("cpu", (4 // shards, shards), mesh_dim_names=("replicas", "shards"))
    params = {
        str(number): torch.nn.Parameter(
            distribute_tensor(torch.ones(64, 64), mesh, [Replicate(), Shard(0)], src_data_rank=None)
        )
        for number in range(4)
    }
    optimizer = Shampoo(params.items(), block_size=16)
    return sum(
        value.numel() * value.itemsize for state in stacks_of(optimizer) for value in state.values()
    )


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_state_of_a_rank_falls_with_the_number_of_ranks(shards: int) -> None:
    # Factors, roots and moments; failures, refreshes and condition number of each block.
    whole = 4 * 16 * (4 * (2 * 16 * 16 + 2 * 16 * 16 + 2 * 16 * 16) + 3 * 4)
    assert run_on_ranks(4, bytes_of_state, shards) == [whole // 4] * 4


def step_experts() -> list[tuple[Tensor, Tensor]]:
    """Experts over one axis of the mesh, the rest of the model over both; and one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
    alone, _ = dist.new_subgroups(group_size=1)
    generator = torch.Generator().manual_seed(0)
    wholes = {
        "experts.w1": torch.randn(5, 6, 8, generator=generator, dtype=torch.float64),
        "attention.wq": torch.randn(12, 8, generator=generator, dtype=torch.float64),
        "attention.wo": torch.randn(7, 9, generator=generator, dtype=torch.float64),
    }
    layouts: dict[str, tuple[DeviceMesh, list[Placement]]] = {
        "experts.w1": (mesh["experts"], [Shard(0)]),
        "attention.wq": (mesh, [Shard(0), Replicate()]),
        "attention.wo": (mesh["data"], [Shard(1)]),
    }
    runs: list[dict[str, Any]] = []
    for together in (True, False):
        params = {
            name: torch.nn.Parameter(
                distribute_tensor(whole.clone(), *layouts[name], src_data_rank=None)
                if together else whole.clone()
            )
            for name, whole in wholes.items()
        }  # fmt: skip
        groups = [
            {"params": [(name, param)], "batch_dims": 1 if "experts" in name else 0}
            for name, param in params.items()
        ]
        optimizer = Shampoo(
            groups, lr=0.1, block_size=4, precondition_frequency=2,
            process_group=None if together else alone,
        )  # fmt: skip
        for step in range(1, 7):
            for name, param in params.items():
                grad = wholes[name] * step + wholes[name].square()
                param.grad = (
                    distribute_tensor(grad, *layouts[name], src_data_rank=None)
                    if together else grad
                )  # fmt: skip
            optimizer.step()
        runs.append({name: param.detach() for name, param in params.items()})
    return [
        (local_tensor(runs[0][name]),
         local_tensor(distribute_tensor(runs[1][name], *layouts[name], src_data_rank=None)))
        for name in wholes
    ]  # fmt: skip


def test_experts_on_a_mesh_of_their_own_are_stepped_one_by_one() -> None:
    for pairs in run_on_ranks(4, step_experts):
        for mine, expected in pairs:
            torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


def experts_with_factors() -> list[int]:
    mesh = init_device_mesh("cpu", (2,))
    placed = distribute_tensor(torch.ones(4, 6, 8), mesh, [Shard(0)], src_data_rank=None)
    param = torch.nn.Parameter(placed)
    optimizer = Shampoo([{"params": [("experts.w1", param)], "batch_dims": 1}], block_size=8)
    assert isinstance(param, DTensor)
    assert not any(block.is_cut for block in plan_of(optimizer).blocks)
    return list(of_blocks(optimizer.state[param], "left"))


def test_every_expert_has_its_own_factors_on_its_own_rank() -> None:
    assert run_on_ranks(2, experts_with_factors) == [[0, 1], [2, 3]]
