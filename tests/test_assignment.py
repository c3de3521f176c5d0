"""No rank holds the others up, neither over the period nor in any one step of it."""

import random
import re
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bin_packing import is_impossible
from tests.support.planned_parameters import (
    PERIOD,
    fsdp_parameters,
    llama_8b,
    loads,
    resnet50,
    shampoo_cost,
)
from titan_shampoo.distributed.advice import imbalance, suggestions
from titan_shampoo.distributed.assignment import (
    TOLERANCE,
    Claim,
    Job,
    assign_owners,
    spread_slots,
)
from titan_shampoo.distributed.blocks import Block, Parameter, assigned_blocks

MODELS = {"resnet50": resnet50, "llama 8b": llama_8b}
costs = st.lists(st.integers(0, 10**6), max_size=20)


def job(
    rates: Sequence[int], holders: Sequence[tuple[int, ...]], num_ranks: int, travel: bool
) -> Job:
    """Blocks of one parameter cut into ``num_ranks`` shards, all due in one turn."""
    work = np.array(rates, float)
    zeros = np.zeros(len(rates), np.int64)
    may_travel = np.full(len(rates), travel)
    ranks = np.arange(num_ranks)[None]
    return Job(ranks, holders, work, work, zeros, 1, may_travel)


@given(costs, st.integers(1, 8))
def test_no_rank_is_above_the_mean_by_more_than_one_block(some: list[int], ranks: int) -> None:
    everyone = [tuple(range(ranks))] * len(some)
    (owners,) = assign_owners([job(some, everyone, ranks, travel=False)])
    totals = np.bincount(owners, some, ranks)
    assert totals.max() <= sum(some) / ranks * (1 + TOLERANCE) + max(some, default=0)


def test_a_rank_with_a_large_block_gets_no_small_ones() -> None:
    (owners,) = assign_owners([job([8, *[1] * 8], [(0, 1)] * 9, 2, travel=False)])
    assert owners.tolist() == [0] + [1] * 8


@given(st.lists(st.tuples(st.integers(0, 99), st.sets(st.integers(0, 5), min_size=1))))
def test_blocks_that_may_not_travel_stay_with_a_holder(blocks: list[tuple[int, set[int]]]) -> None:
    holders = [tuple(sorted(ranks)) for _, ranks in blocks]
    (owners,) = assign_owners([job([rate for rate, _ in blocks], holders, 6, travel=False)])
    assert all(owner in ranks for owner, ranks in zip(owners, holders, strict=True))


def test_blocks_travel_only_as_far_as_balance_needs() -> None:
    (owners,) = assign_owners([job([1] * 12, [(0,)] * 8 + [(1,)] * 4, 2, travel=True)])
    assert np.bincount(owners).tolist() == [6, 6]
    assert (owners[8:] == 1).all()  # those that lie on the idle rank stay there


@given(st.permutations([Claim(f"layers.{n}", n % 2, 3, (1.0, 2.0, 3.0)) for n in range(11)]))
def test_turns_do_not_depend_on_the_order_of_parameters(claims: list[Claim]) -> None:
    expected = dict(zip(sorted(claims), spread_slots(sorted(claims)), strict=True))
    assert dict(zip(claims, spread_slots(claims), strict=True)) == expected


def test_a_later_group_does_not_move_turns() -> None:
    first = [Claim("b", 0, 4, (3.0, 2.0)), Claim("c", 0, 4, (5.0,))]
    assert spread_slots([Claim("a", 1, 4, (9.0,)), *first])[1:] == spread_slots(first)


MESHES = [(1, 8), (1, 64), (1, 512), (8, 8), (64, 8), (8, 64)]
"""Replicas and shards: FSDP2, and HSDP on as many ranks."""
BLOCK_SIZES = [128, 256, 512, 1024]
TABLE = [
    pytest.param(model, mesh, size, marks=pytest.mark.slow if slow else ())
    for model in MODELS
    for mesh in MESHES
    for size in BLOCK_SIZES
    for slow in [model == "llama 8b" and size < 512]  # up to 425,984 blocks: some seconds each
]


@pytest.mark.parametrize(("model", "mesh", "block_size"), TABLE)
def test_known_models_are_level_or_no_assignment_is(
    model: str, mesh: tuple[int, int], block_size: int
) -> None:
    """Where it takes smaller blocks to be level, the plan names them."""
    replicas, shards = mesh

    def planned(size: int) -> tuple[list[Parameter], list[Block], list[float]]:
        shapes = MODELS[model]()
        params = fsdp_parameters(shapes, shards, block_size=size, num_replicas=replicas)
        blocks = assigned_blocks(params)
        return params, blocks, [shampoo_cost(b.shape).per_step(PERIOD) for b in blocks]

    params, blocks, work = planned(block_size)
    busiest = float(loads(params, blocks).mean(0).max())
    mean = sum(work) / (replicas * shards)
    if busiest > 1.05 * mean:
        assert is_impossible(work, replicas * shards, 0.999 * busiest)
        advice = re.search("set block_size = ([0-9]+)", suggestions(params, blocks)[0])
        assert advice
        params, blocks, _ = planned(int(advice[1]))
        assert imbalance(params, blocks) <= 1.05


@pytest.mark.parametrize(("model", "block_size", "ranks", "allowed"), [
    ("resnet50", 128, 8, 1.07),
    ("resnet50", 64, 64, 1.15),
    ("llama 8b", 1024, 8, 1.05),
    ("llama 8b", 1024, 64, 1.08),
    ("llama 8b", 512, 512, 1.20),
])  # fmt: skip
def test_ranks_are_level_in_every_single_step(
    model: str, block_size: int, ranks: int, allowed: float
) -> None:
    params = fsdp_parameters(MODELS[model](), ranks, block_size=block_size)
    work = loads(params, assigned_blocks(params))
    assert (work.max(1).values <= allowed * work.mean(1)).all()


def test_shard_alignment_lets_nothing_travel() -> None:
    params = fsdp_parameters(resnet50(), 3, block_size=256, alignment="shard")
    assert not any(block.is_cut for block in assigned_blocks(params))


def test_small_blocks_do_not_pay_for_travelling() -> None:
    shapes = [(16, 16)] * 3  # a row of blocks on each of four ranks, nothing on the other four
    blocks = assigned_blocks(fsdp_parameters(shapes, 8, block_size=2))
    assert not any(block.is_cut for block in blocks)


def test_a_plan_of_llama_8b_on_512_ranks_takes_seconds() -> None:
    start = time.process_time()
    assigned_blocks(fsdp_parameters(llama_8b(), 512, block_size=256))
    assert time.process_time() - start < 30


def test_equal_work_is_given_out_the_same_way_twice() -> None:
    shapes = llama_8b()[:14]
    random.Random(0).shuffle(shapes)
    once, again = (assigned_blocks(fsdp_parameters(shapes, 64, block_size=512)) for _ in "ab")
    assert once == again
