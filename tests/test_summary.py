"""Figures of a plan for all ranks, and what it advises."""

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.support.planned_parameters import fsdp_parameters, llama_8b, loads, resnet50
from tests.support.ranks import run_on_ranks
from titan_shampoo import SOAP, Shampoo
from titan_shampoo.distributed.advice import ACCEPTED, imbalance, suggestions
from titan_shampoo.distributed.blocks import assigned_blocks
from titan_shampoo.distributed.plan import make_plan
from titan_shampoo.distributed.summary import readable, summarize


@pytest.mark.parametrize(("replicas", "shards", "block_size"), [(1, 5, 64), (2, 3, 64), (4, 1, 32)])
def test_figures_of_every_rank_are_those_of_its_own_plan(
    replicas: int, shards: int, block_size: int
) -> None:
    shapes = [(128, 64), (96, 160), (64, 64), (48, 80)]
    params = fsdp_parameters(shapes, shards, block_size=block_size, num_replicas=replicas)
    blocks = assigned_blocks(params)
    summary = summarize(params, blocks, {})
    work = loads(params, blocks)
    for rank in range(replicas * shards):
        me = divmod(rank, shards)
        plan = make_plan(
            fsdp_parameters(shapes, shards, block_size=block_size, num_replicas=replicas, me=me)
        )
        owned = [block for stack in plan.stacks for block in stack.blocks]
        (bucket,) = plan.buckets
        buffer = replicas * max(bucket.gather_width, sum(bucket.outbox_splits))
        messages = sum(bucket.inbox_splits) + buffer + (bucket.gather_width if replicas > 1 else 0)
        assert summary.blocks[rank] == len(owned)
        assert summary.working["blocks in stacks"][rank] == 4 * sum(b.numel for b in owned)
        assert summary.working["messages"][rank] == 4 * messages
        assert summary.mean_flops[rank] == pytest.approx(float(work[:, rank].mean()))
    assert summary.imbalance == pytest.approx(float(work.mean(0).max() / work.mean()))
    assert summary.worst_imbalance >= summary.imbalance


def test_the_plan_names_the_block_size_that_makes_work_even() -> None:
    params = fsdp_parameters(resnet50(), 64, block_size=1024)
    (advice,) = suggestions(params, assigned_blocks(params))
    assert advice.startswith("work is uneven: the busiest rank has 2.")
    assert advice.endswith("times the mean; set block_size = 384")
    smaller = fsdp_parameters(resnet50(), 64, block_size=384)
    assert imbalance(smaller, assigned_blocks(smaller)) <= ACCEPTED


def test_an_even_and_aligned_plan_needs_no_advice() -> None:
    params = fsdp_parameters(llama_8b()[:7], 2, block_size=512)
    assert suggestions(params, assigned_blocks(params)) == []


def test_the_plan_names_the_block_size_with_which_nothing_travels() -> None:
    params = fsdp_parameters(llama_8b()[:7], 8, block_size=1024)
    (advice,) = suggestions(params, assigned_blocks(params))
    assert "nothing travels with block_size = [128, 1024]" in advice
    aligned = fsdp_parameters(llama_8b()[:7], 8, block_size=(128, 1024))
    assert not any(block.is_cut for block in assigned_blocks(aligned))


def test_a_model_that_no_block_size_makes_even_is_told_so() -> None:
    params = fsdp_parameters([(32, 32)], 8, block_size=32)
    (advice,) = suggestions(params, assigned_blocks(params))
    assert "no smaller block_size" in advice


def summary_of_an_optimizer(method: str) -> tuple[str, dict[str, float], dict[str, float]]:
    """The printed plan, and bytes of state on this rank: planned and held."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    params = {
        name: torch.nn.Parameter(
            distribute_tensor(torch.ones(shape), mesh, [Replicate(), Shard(0)], src_data_rank=None)
        )
        for name, shape in {"w": (40, 24), "v": (16, 16), "bias": (7,)}.items()
    }
    make: Any = {"Shampoo": Shampoo, "SOAP": SOAP}[method]
    optimizer = make(params.items(), block_size=8, momentum=0.9)
    summary = optimizer.plan_summary()
    rank = torch.distributed.get_rank()
    planned = {kind: float(figures[rank]) for kind, figures in summary.state.items()}
    held: dict[str, float] = {}
    for name, param in params.items():
        for key, value in optimizer.state[param].items():
            if key == "blocks":  # their numbers
                continue
            local = value.to_local() if hasattr(value, "to_local") else value
            kind = key.split(".")[0]
            kind = f"adamw {kind}" if name == "bias" else kind
            kind = "counters" if kind in ("step", "cursor") else kind
            held[kind] = held.get(kind, 0) + local.numel() * local.itemsize
    return str(summary), planned, held


@pytest.mark.parametrize("method", ["Shampoo", "SOAP"])
def test_an_optimizer_prints_its_plan(method: str) -> None:
    for text, planned, held in run_on_ranks(4, summary_of_an_optimizer, method):
        assert planned == held
        for words in ("per rank", "blocks owned", "FLOP",
                      "state: left", "state: momentum", "state: adamw exp_avg",
                      "sent in a step", "largest / mean", "collectives in a step: 3"):  # fmt: skip
            assert words in text


def test_refreshing_together_shows_in_the_largest_step() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    staggered, together = (
        Shampoo([("w", weight)], block_size=16, precondition_frequency=8, refresh=refresh)
        for refresh in ("staggered", "together")
    )
    spread, at_once = staggered.plan_summary(), together.plan_summary()
    assert at_once.mean_flops == pytest.approx(spread.mean_flops)
    assert at_once.largest_refresh == pytest.approx(8 * spread.largest_refresh)


def test_a_group_may_mix_precisions() -> None:
    params = [("a", torch.nn.Parameter(torch.ones(8, 8))),
              ("b", torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float64)))]  # fmt: skip
    optimizer = Shampoo(params, block_size=8, communication_dtype=torch.float32)
    for _, param in params:
        param.grad = torch.eye(8, dtype=param.dtype)
    optimizer.step()
    figures = optimizer.plan_summary()
    assert figures.working["blocks in stacks"].tolist() == [8 * 8 * (4 + 8)]
    for _, param in params:
        assert optimizer.state[param]["left.8x8"].dtype == param.dtype


def test_units_are_readable() -> None:
    assert readable(0, "B") == "0 B"
    assert readable(1536, "B") == "1.50 KiB"
    assert readable(999, "FLOP") == "999 FLOP"
    assert readable(1.2e15, "FLOP") == "1.20 PFLOP"
    assert readable(2.5, "") == "2.5"
