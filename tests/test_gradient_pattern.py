"""Gradients that only some ranks have: a parameter steps on all of them or on none."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from tests.support.internals import deciding_groups, read_late
from tests.support.ranks import run_on_ranks
from titan_shampoo import SOAP, Shampoo
from titan_shampoo.distributed.gradient_pattern import GradientPattern, decision_groups
from titan_shampoo.distributed.layout import PlacementGroup

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
    read_late(optimizer)
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
    return optimizer.skipped_steps, sorted(group.size() for group in deciding_groups(optimizer))


def test_all_ranks_that_share_a_parameter_skip_a_step_together() -> None:
    assert run_on_ranks(4, skipped_steps) == [(1, [4])] * 4


def groups_of_one_stage() -> list[int]:
    """Deciding groups under HSDP in a stage of a pipeline, alone and with the other stage.

    No group has exactly the four ranks of a stage.
    """
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "replicas", "shards"))
    shards, replicas = mesh["shards"].get_group(), mesh["replicas"].get_group()
    first = 4 * mesh.get_local_rank("pp")
    placement_group = PlacementGroup(
        ((first, first + 1), (first + 2, first + 3)), 0, 0, shards, replicas
    )
    stages = mesh["pp"].get_group()
    whole_world = decision_groups([placement_group], None, stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_world_size", lambda: 99)  # as if other ranks did something else
        in_turn = decision_groups([placement_group], None, stages)
    found = []
    for groups in (decision_groups([placement_group], None), whole_world, in_turn):
        value = torch.tensor(float(dist.get_rank()))
        for group in groups:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
        found += [int(value), len(groups)]
    return found


def test_stages_of_a_pipeline_judge_for_themselves_or_together() -> None:
    together = [7, 1, 7, 3]
    expected = [[3, 2, *together]] * 4 + [[7, 2, *together]] * 4
    assert run_on_ranks(8, groups_of_one_stage) == expected


def steps_of_a_stage(late: bool) -> tuple[list[bool], int]:
    """Whether this rank's stage moved in each step; rank 3, in the second stage, has a NaN once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
    stage = mesh.get_local_rank("pp")
    weights = [(f"layers.{n}", torch.ones(8, 6)) for n in range(2)]
    placed = distribute_tensor(weights[stage][1], mesh["fsdp"], [Shard(0)], src_data_rank=None)
    param: Any = torch.nn.Parameter(placed)
    optimizer = Shampoo(
        [(weights[stage][0], param)], all_params=weights, pipeline_group=mesh["pp"].get_group(),
        block_size=4, precondition_frequency=1,
    )  # fmt: skip
    read_late(optimizer, late)
    moved = []
    for step in range(4):
        grad = param.detach().clone() + step
        if dist.get_rank() == 3 and step == 1:
            grad.to_local()[0] = torch.nan
        param.grad = grad
        before = param.detach().to_local().clone()
        optimizer.step()
        moved.append(not torch.equal(before, param.detach().to_local()))
    return moved, optimizer.skipped_steps


@pytest.mark.parametrize("late", [False, True])
def test_all_stages_of_a_pipeline_skip_a_step_together(late: bool) -> None:
    assert run_on_ranks(4, steps_of_a_stage, late) == [([True, False, True, True], 1)] * 4


def steps_of_a_stage_with_a_lone_parameter() -> tuple[list[bool], int]:
    """Beside what tensor parallelism cuts, each rank of a stage has a plain parameter to itself."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    lone = [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]
    placed = distribute_tensor(torch.ones(8, 6), mesh["tp"], [Shard(0)], src_data_rank=None)
    params: dict[str, Any] = {
        "cut": torch.nn.Parameter(placed), "plain": torch.nn.Parameter(torch.ones(6))
    }  # fmt: skip
    optimizer = Shampoo(
        params.items(), process_group=lone, pipeline_group=mesh["pp"].get_group(), block_size=4
    )
    moved = []
    for step in range(3):
        for param in params.values():
            param.grad = param.detach().clone() + step
        if dist.get_rank() == 3 and step == 1:
            params["plain"].grad[0] = torch.nan
        before = params["plain"].detach().clone()
        optimizer.step()
        moved.append(not torch.equal(before, params["plain"].detach()))
    return moved, len(deciding_groups(optimizer))


def test_stages_with_parameters_of_single_ranks_judge_over_the_same_groups() -> None:
    assert run_on_ranks(4, steps_of_a_stage_with_a_lone_parameter) == [([True, False, True], 1)] * 4


LAYOUTS_OF_TERMS: dict[str, list[Placement]] = {
    "matrix": [Shard(0)],
    "other": [Replicate()],
    "vector": [Replicate()],
}
"""As tensor parallelism has them: matrices are cut, norms are not; gradients may be sums."""


def lacks_its_term(rank: int, name: str, step: int) -> bool:
    return rank == 1 and (step % 3 == 0 if name == "matrix" else step in (2, 3, 6))


def train_with_sums(method: str, late: bool) -> dict[str, Tensor]:
    """Gradients are terms of sums over two ranks, which one of them lacks in some steps."""
    mesh = init_device_mesh("cpu", (2,))
    params: dict[str, Any] = {
        name: torch.nn.Parameter(
            distribute_tensor(whole, mesh, LAYOUTS_OF_TERMS[name], src_data_rank=None)
        )
        for name, whole in tensors(0).items()
    }
    optimizer = optimizer_of(params, method, 5)
    read_late(optimizer, late)
    for step in range(1, STEPS + 1):
        for name, term in tensors(step).items():
            scaled = term * (1 + dist.get_rank())
            absent = lacks_its_term(dist.get_rank(), name, step)
            params[name].grad = (
                None if absent else DTensor.from_local(scaled, mesh, [Partial()], run_check=False)
            )
        optimizer.step()
    return {name: param.detach().full_tensor() for name, param in params.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_term_of_a_gradient_that_a_rank_lacks_counts_as_zero(method: str) -> None:
    params = {name: torch.nn.Parameter(tensor) for name, tensor in tensors(0).items()}
    optimizer = optimizer_of(params, method, 5)
    for step in range(1, STEPS + 1):
        for name, term in tensors(step).items():
            params[name].grad = term * (1 if lacks_its_term(1, name, step) else 3)
        optimizer.step()
    for result in run_on_ranks(2, train_with_sums, method, False):
        for name, param in params.items():
            torch.testing.assert_close(result[name], param.detach(), rtol=1e-10, atol=1e-12)


def test_terms_that_a_rank_lacks_do_not_hang_where_the_host_reads_late() -> None:
    first, second = run_on_ranks(2, train_with_sums, "Shampoo", True)
    for name, value in first.items():
        assert value.isfinite().all()
        assert torch.equal(value, second[name])


def lacks_a_replica(replica: int, name: str, step: int) -> bool:
    return replica == 1 and step % 4 in (2, 3) and name != "other"


def train_replicas(layout: str, late: bool) -> dict[str, Tensor]:
    """Replicas of which one has no gradient in some steps."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))

    def placed(whole: Tensor) -> Tensor:
        if layout == "ddp":
            return whole.clone()
        return distribute_tensor(whole, mesh, [Replicate(), Shard(0)], src_data_rank=None)

    params = {n: torch.nn.Parameter(placed(whole)) for n, whole in tensors(0).items()}
    optimizer = optimizer_of(params, "Shampoo", 4)
    read_late(optimizer, late)
    for step in range(1, STEPS + 1):
        for name, grad in tensors(step).items():
            absent = lacks_a_replica(mesh.get_local_rank("r"), name, step)
            params[name].grad = None if absent else placed(grad)
        optimizer.step()
    return {
        name: param.full_tensor().detach() if isinstance(param, DTensor) else param.detach()
        for name, param in params.items()
    }


@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 2), ("hsdp", 4)])
def test_a_replica_without_a_gradient_takes_that_of_another(layout: str, ranks: int) -> None:
    params = {name: torch.nn.Parameter(tensor) for name, tensor in tensors(0).items()}
    optimizer = optimizer_of(params, "Shampoo", 4)
    for step in range(1, STEPS + 1):
        for name, grad in tensors(step).items():
            params[name].grad = grad
        optimizer.step()
    for result in run_on_ranks(ranks, train_replicas, layout, False):
        for name, param in params.items():
            torch.testing.assert_close(result[name], param.detach(), rtol=1e-10, atol=1e-12)


def test_replicas_stay_equal_where_the_host_reads_late() -> None:
    first, second = run_on_ranks(2, train_replicas, "ddp", True)
    for name, value in first.items():
        assert not torch.equal(value, tensors(0)[name])
        assert torch.equal(value, second[name])


def test_one_process_needs_no_collective_to_know() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in "ab"]
    gradient_pattern = GradientPattern(
        params, [PlacementGroup(((0,),), 0, 0, None, None)] * 2, torch.device("cpu")
    )
    params[0].grad = torch.full((2,), 3.0)
    assert gradient_pattern.codes() == [1, 0]
    assert not gradient_pattern.is_news([1, 1])
    assert gradient_pattern.is_news([1, 0])
    gradient_pattern.agree([1, 0])
    assert not gradient_pattern.is_news([1, 0])
    assert [*gradient_pattern.completed(gradient_pattern.codes())] == params[:1]
    assert gradient_pattern.completed(gradient_pattern.codes())[params[0]].tolist() == [3.0, 3.0]
