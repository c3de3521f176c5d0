"""Gradients that only some ranks have: a parameter steps on all of them or on none."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.ranks import run_on_ranks
from titan_shampoo import SOAP, Shampoo
from titan_shampoo.distributed.layout import Team
from titan_shampoo.distributed.presence import Presence, judges

SHAPES: dict[str, tuple[int, ...]] = {"matrix": (12, 10), "other": (8, 6), "vector": (9,)}
STEPS = 12
RANKS = 3
METHODS: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP}


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def lacks(rank: int, name: str, step: int) -> bool:
    """Rank 1 lacks the matrix in every third step, rank 2 the vector after step 4, all one step."""
    if name == "other":
        return step == 7
    return (rank, step % 3) == (1, 0) if name == "matrix" else rank == 2 and step > 4


def rows(rank: int, name: str) -> slice:
    """Rows of a shard as torch.chunk cuts them."""
    size = -(-SHAPES[name][0] // RANKS)
    return slice(rank * size, (rank + 1) * size)


def gradients_of_one_process(step: int) -> dict[str, Tensor]:
    grads = tensors(step)
    for name, grad in list(grads.items()):
        lacking = [rank for rank in range(RANKS) if lacks(rank, name, step)]
        for rank in lacking:
            grad[rows(rank, name)] = 0
        if len(lacking) == RANKS:
            del grads[name]
    return grads


def optimizer_of(params: dict[str, Any], method: str, block_size: int) -> Any:
    return METHODS[method](
        params.items(), lr=0.1, block_size=block_size, precondition_frequency=3, start_step=1,
        weight_decay=0.1,
    )  # fmt: skip


def train_sharded(method: str, block_size: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (RANKS,))
    params: dict[str, Any] = {}
    for name, whole in tensors(0).items():
        placed = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        params[name] = torch.nn.Parameter(placed)
    optimizer = optimizer_of(params, method, block_size)
    for step in range(1, STEPS + 1):
        for name, grad in tensors(step).items():
            placed = distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None)
            params[name].grad = None if lacks(dist.get_rank(), name, step) else placed
        optimizer.step()
    return {name: param.detach().full_tensor() for name, param in params.items()}


@pytest.mark.parametrize(("method", "block_size"), [("Shampoo", 2), ("Shampoo", 64), ("SOAP", 5)])
def test_absent_parts_of_a_gradient_count_as_zero(method: str, block_size: int) -> None:
    params = {name: torch.nn.Parameter(tensor) for name, tensor in tensors(0).items()}
    optimizer = optimizer_of(params, method, block_size)
    for step in range(1, STEPS + 1):
        grads = gradients_of_one_process(step)
        for name, param in params.items():
            param.grad = grads.get(name)
        optimizer.step()
    for result in run_on_ranks(RANKS, train_sharded, method, block_size):
        for name, param in params.items():
            torch.testing.assert_close(result[name], param.detach(), rtol=1e-10, atol=1e-12)


def train_with_late_reads(patterns: list[dict[int, list[str]]]) -> list[list[bool]]:
    """Which parameters move in each step, if ranks lack what the pattern says, read a step late."""
    mesh = init_device_mesh("cpu", (2,))
    params: dict[str, Any] = {}
    for name, whole in tensors(0).items():
        placed = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        params[name] = torch.nn.Parameter(placed)
    optimizer = optimizer_of(params, "Shampoo", 64)
    optimizer._watch.late = True  # as on accelerators
    moved = []
    for missing in patterns:
        for name, param in params.items():
            absent = name in missing.get(dist.get_rank(), [])
            param.grad = None if absent else param.detach().clone()
        before = {name: param.detach().to_local().clone() for name, param in params.items()}
        optimizer.step()
        moved.append([not torch.equal(before[n], p.detach().to_local()) for n, p in params.items()])
    return moved


def test_late_reads_do_not_move_what_no_rank_has_a_gradient_of() -> None:
    """News to all ranks counts at once, although the host reads the common numbers late."""
    frozen = {0: ["other"], 1: ["other"]}
    for moved in run_on_ranks(2, train_with_late_reads, [frozen, frozen, {}, frozen]):
        assert moved == [[True, False, True]] * 2 + [[True] * 3, [True, False, True]]


def test_late_reads_of_news_to_one_rank_stay_the_same_on_all() -> None:
    """Rank 1 gets its gradient back a step before anything can be done about it on both."""
    none, some = {0: ["matrix"], 1: ["matrix"]}, {0: ["matrix"]}
    patterns: list[dict[int, list[str]]] = [none, some, some, {}, {}]
    for moved in run_on_ranks(2, train_with_late_reads, patterns):
        assert [step[0] for step in moved] == [False, False, True, True, True]


def collectives_by_step(patterns: list[list[str]]) -> list[int]:
    """Reductions in each step, in which rank 0 lacks the parameters that the pattern names."""
    mesh = init_device_mesh("cpu", (2,))
    params: dict[str, Any] = {}
    for name, whole in tensors(0).items():
        placed = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        params[name] = torch.nn.Parameter(placed)
    optimizer = Shampoo(params.items(), block_size=2)
    calls: Counter[int] = Counter()
    all_reduce = dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        for step, missing in enumerate(patterns):

            def counted(*args: Any, step: int = step, **kwargs: Any) -> Any:
                calls[step] += 1
                return all_reduce(*args, **kwargs)

            patch.setattr(dist, "all_reduce", counted)
            for name, param in params.items():
                absent = dist.get_rank() == 0 and name in missing
                param.grad = None if absent else DTensor.from_local(
                    torch.ones_like(param.detach().to_local()), mesh, [Shard(0)],
                    shape=param.shape, stride=param.stride(),
                )  # fmt: skip
            optimizer.step()
    return [calls[step] for step in range(len(patterns))]


def test_ranks_agree_again_only_in_steps_that_bring_news() -> None:
    patterns = [[], [], ["vector"], ["vector"], ["vector", "matrix"], ["vector", "matrix"], [], []]
    for counts in run_on_ranks(2, collectives_by_step, patterns):
        assert counts == [1, 1, 2, 1, 2, 1, 2, 1]


def skipped_steps() -> tuple[int, list[int]]:
    """How many steps each rank skips if a gradient is not finite on rank 1 alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    alone, _ = dist.new_subgroups(group_size=1)
    whole = torch.ones(8, 8)
    placed = distribute_tensor(whole, mesh, [Replicate(), Shard(0)], src_data_rank=None)
    param = torch.nn.Parameter(placed)
    # Plain tensors lie on this rank alone; what the mesh shares must still be decided together.
    optimizer = Shampoo([("w", param)], process_group=alone)
    grad = torch.ones(4, 8)
    grad[0, 0] = torch.inf if dist.get_rank() == 1 else 1.0
    param.grad = DTensor.from_local(grad, mesh, [Replicate(), Shard(0)])
    optimizer.step()
    return optimizer.skipped_steps, sorted(group.size() for group in optimizer._judges)


def test_all_ranks_that_share_a_parameter_skip_a_step_together() -> None:
    assert run_on_ranks(4, skipped_steps) == [(1, [4])] * 4


def groups_of_one_stage() -> list[int]:
    """Who judges under HSDP in one stage of a pipeline: no group has exactly the four ranks."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "replicas", "shards"))
    shards, replicas = mesh["shards"].get_group(), mesh["replicas"].get_group()
    first = 4 * mesh.get_local_rank("pp")
    team = Team(((first, first + 1), (first + 2, first + 3)), 0, 0, shards, replicas)
    value = torch.tensor(float(dist.get_rank()))
    for group in judges([team], None):
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return [int(value), len(judges([team], None))]


def test_stages_of_a_pipeline_judge_for_themselves() -> None:
    assert run_on_ranks(8, groups_of_one_stage) == [[3, 2]] * 4 + [[7, 2]] * 4


def test_one_process_needs_no_collective_to_know() -> None:
    presence = Presence([Team(((0,),), 0, 0, None, None)] * 2, torch.device("cpu"))
    assert not presence.is_news([True, True])
    assert presence.is_news([True, False])
    presence.agree([True, False])
    assert list(presence.anywhere) == [True, False]
    assert not presence.is_news([True, False])
