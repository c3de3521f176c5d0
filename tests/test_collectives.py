"""What a step sends: counted, and the same as the plan says."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from tests.support.internals import plan_of, stacks_of
from tests.support.message_buffers import Buffers
from tests.support.ranks import run_on_ranks
from titan_shampoo import Shampoo
from titan_shampoo.distributed import exchange, plan
from titan_shampoo.distributed.summary import summarize
from titan_shampoo.functional.shampoo import ShampooRule

SHAPES = [(16, 24), (24, 16), (8, 8), (16, 16), (40, 8)]
BUCKETS = 3
"""Of at most 600 elements: (16, 24); (24, 16) and (8, 8); (16, 16) and (40, 8)."""


class Counted:
    """Collectives of this rank, and the bytes that they send to other ranks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.sent = 0
        all_reduce, all_to_all, all_gather = (
            dist.all_reduce, dist.all_to_all_single, exchange.all_gather
        )  # fmt: skip

        def counted_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls["all_reduce"] += 1
            return all_reduce(tensor, *args, **kwargs)

        def counted_all_to_all(
            output: Tensor, source: Tensor, outputs: list[int], inputs: list[int], **kwargs: Any
        ) -> Any:
            self.calls["all_to_all"] += 1
            others = sum(inputs) - inputs[dist.get_group_rank(kwargs["group"], dist.get_rank())]
            self.sent += others * source.dtype.itemsize
            return all_to_all(output, source, outputs, inputs, **kwargs)

        def counted_all_gather(output: Tensor, source: Tensor, **kwargs: Any) -> Any:
            self.calls["all_gather"] += 1
            self.sent += (kwargs["group"].size() - 1) * source.numel() * source.dtype.itemsize
            return all_gather(output, source, **kwargs)

        patch.setattr(dist, "all_reduce", counted_all_reduce)
        patch.setattr(dist, "all_to_all_single", counted_all_to_all)
        patch.setattr(exchange, "all_gather", counted_all_gather)


def counted_steps(
    mesh_shape: tuple[int, ...], placements: list[Placement], block_size: int, shapes: Any
) -> tuple[Counter[str], int, float, int]:
    """Collectives and bytes of the third step, and those of the plan."""
    with pytest.MonkeyPatch.context() as patch:
        optimizer = optimizer_with_small_buckets(patch, mesh_shape, placements, block_size, shapes)
        optimizer.step()
        optimizer.step()
        counted = Counted(patch)
        optimizer.step()
        planned = plan_of(optimizer)
        summary = summarize(planned.params, planned.blocks, {})
        sent = summary.sent[summary.ranks.tolist().index(dist.get_rank())]
        return counted.calls, counted.sent, float(sent), summary.collectives


def optimizer_with_small_buckets(
    patch: pytest.MonkeyPatch,
    mesh_shape: tuple[int, ...],
    placements: list[Placement],
    block_size: int,
    shapes: Any,
) -> Shampoo:
    patch.setattr(plan, "BUCKET_NUMEL", 600)
    names = ("replicas", "shards")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    params = {}
    for number, shape in enumerate(shapes):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        placed = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        params[str(number)] = torch.nn.Parameter(placed)
        params[str(number)].grad = placed.clone()
    return Shampoo(params.items(), block_size=block_size, precondition_frequency=2)


LAYOUTS: dict[str, tuple[tuple[int, ...], list[Placement], int, dict[str, int]]] = {
    "aligned fsdp": ((4,), [Shard(0)], 2, {}),
    "travelling fsdp": ((4,), [Shard(0)], 16, {"all_to_all": 2 * BUCKETS}),
    "travelling fsdp on 3": ((3,), [Shard(0)], 8, {"all_to_all": 2 * BUCKETS}),
    "columns": ((2,), [Shard(1)], 16, {"all_to_all": 2 * BUCKETS}),
    "ddp": ((2,), [Replicate()], 8, {"all_gather": BUCKETS}),
    "aligned hsdp": ((2, 2), [Replicate(), Shard(0)], 4, {"all_gather": BUCKETS}),
    "travelling hsdp": (
        (2, 2), [Replicate(), Shard(0)], 16, {"all_gather": BUCKETS, "all_to_all": 2 * BUCKETS}
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_makes_the_planned_collectives_and_sends_the_planned_bytes(layout: str) -> None:
    mesh, placements, block_size, expected = LAYOUTS[layout]
    ranks = torch.Size(mesh).numel()
    for calls, sent, planned, collectives in run_on_ranks(
        ranks, counted_steps, mesh, placements, block_size, SHAPES
    ):
        checks = calls.pop("all_reduce")
        assert checks == 1
        assert dict(calls) == expected
        assert calls.total() == collectives
        assert sent == planned


def test_aligned_fsdp_sends_nothing_even_where_shards_are_of_different_size() -> None:
    shapes = [(18, 8), (30, 4)]  # 5, 5, 5, 3 and 8, 8, 8, 6 rows: ranks differ by a third
    results = run_on_ranks(4, counted_steps, (4,), [Shard(0)], 1, shapes)
    assert [(dict(calls), sent) for calls, sent, _, _ in results] == [({"all_reduce": 1}, 0)] * 4


def buffers_of_a_step(
    mesh_shape: tuple[int, ...], placements: list[Placement], block_size: int, shapes: Any
) -> tuple[int, int, float, int]:
    """Most exchanges and most bytes in flight, the bytes of the plan, and of all buckets."""
    with pytest.MonkeyPatch.context() as patch:
        optimizer = optimizer_with_small_buckets(patch, mesh_shape, placements, block_size, shapes)
        buffers = Buffers(patch)
        optimizer.step()
        assert not buffers.sizes
        summary = optimizer.plan_summary()
        planned = summary.working["messages"][summary.ranks.tolist().index(dist.get_rank())]
        num_buckets = len(plan_of(optimizer).buckets)
        return buffers.most_exchanges, buffers.most_bytes, float(planned), num_buckets


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_buckets_are_in_flight_at_most_with_the_planned_bytes(layout: str) -> None:
    mesh, placements, block_size, _ = LAYOUTS[layout]
    ranks = torch.Size(mesh).numel()
    shapes = [*SHAPES, (4, 4), *SHAPES[::-1]]
    for exchanges, most, planned, buckets in run_on_ranks(
        ranks, buffers_of_a_step, mesh, placements, block_size, shapes
    ):
        assert exchanges == 3 < buckets
        assert most == planned


def order_of_a_step() -> list[str]:
    """Gradients that leave, work, directions that leave, by bucket."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        optimizer = optimizer_with_small_buckets(patch, (2,), [Shard(0)], 16, SHAPES)
        buckets, stacks = plan_of(optimizer).buckets, stacks_of(optimizer)
        bucket_of = {
            stacks[stack]["left"].untyped_storage().data_ptr(): number
            for number, bucket in enumerate(buckets)
            for stack in bucket.stacks
        }
        gather, scatter = exchange.Exchange.gather, exchange.Exchange.scatter
        work = ShampooRule.direction

        def said_and(what: str, function: Any, *args: Any) -> Any:
            said.append(what)
            return function(*args)

        patch.setattr(exchange.Exchange, "gather", lambda own, *args: said_and(
            f"gather {buckets.index(own.bucket)}", gather, own, *args))  # fmt: skip
        patch.setattr(exchange.Exchange, "scatter", lambda own, *args: said_and(
            f"scatter {buckets.index(own.bucket)}", scatter, own, *args))  # fmt: skip
        patch.setattr(ShampooRule, "direction", lambda rule, state, *args: said_and(
            f"work {bucket_of[state['left'].untyped_storage().data_ptr()]}",
            work, rule, state, *args))  # fmt: skip
        optimizer.step()
    return list(dict.fromkeys(said))


def test_messages_of_other_buckets_travel_while_one_is_worked_on() -> None:
    for said in run_on_ranks(2, order_of_a_step):
        assert said.index("gather 0") < said.index("gather 1") < said.index("work 0")
        assert said.index("scatter 0") < said.index("gather 2") < said.index("work 1")
        assert [word for word in said if "work" not in word] == [
            "gather 0", "gather 1", "scatter 0", "gather 2", "scatter 1", "scatter 2"
        ]  # fmt: skip
