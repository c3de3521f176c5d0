"""Blocks, shards, copies and turns: every element and every block is accounted for exactly once."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from tests.reference.blocks import blocks_of, merged_shape
from titan_shampoo.block_memory import as_blocks
from titan_shampoo.distributed.assignment import pack_slots
from titan_shampoo.distributed.copies import Copy, View, coalesce, pieces
from titan_shampoo.distributed.geometry import Grid, Merge, make_grid
from titan_shampoo.distributed.layout import Sharding, cut_order
from titan_shampoo.distributed.overlap import holders, overlap_table

Shape = tuple[int, ...]
Offsets = NDArray[np.int64]

shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)
merges: st.SearchStrategy[Merge] = st.sampled_from(["matrix", "paper", "none"])
block_sizes = st.integers(1, 12)
costs = st.lists(st.integers(0, 10**6), max_size=20)


def offsets(view: View) -> Offsets:
    """Flat offset of each element of a view, in the view's own order."""
    grids = [
        np.arange(n).reshape(-1, *[1] * (len(view.size) - dim - 1)) * step
        for dim, (n, step) in enumerate(zip(view.size, view.stride, strict=True))
    ]
    return np.asarray(sum(grids, np.full(view.size, view.offset))).ravel()


@st.composite
def grids(draw: st.DrawFn) -> tuple[Shape, Grid]:
    shape = draw(shapes)
    batch_dims = draw(st.integers(0, max(len(shape) - 1, 0)))
    size = draw(block_sizes | st.tuples(block_sizes, block_sizes))
    return shape, make_grid(shape, block_size=size, merge=draw(merges), batch_dims=batch_dims)


@dataclass(frozen=True)
class Cutting:
    """A tensor's shape, the mesh axes that shard it, and in which order they really cut it."""

    shape: Shape
    placements: list[Placement]
    sizes: list[int]
    order: list[int]
    """Positions of the axes, first cut first."""

    def sharding(self) -> Sharding:
        """What the library makes of the placements."""
        return Sharding(
            tuple(self.sizes), cut_order(list(zip(self.placements, self.sizes, strict=True)))
        )

    def shards(self, numbers: Tensor) -> list[Tensor]:
        """Local tensors by one torch.chunk after the other, the last mesh axis fastest."""
        parts: dict[Shape, Tensor] = {(0,) * len(self.sizes): numbers}
        for axis in self.order:
            dim, size = dim_of(self.placements[axis]), self.sizes[axis]
            parts = {
                (*at[:axis], coordinate, *at[axis + 1 :]): chunk
                for at, part in parts.items()
                for coordinate, chunk in enumerate(chunks(part, size, dim))
            }
        return [parts[at] for at in sorted(parts)]


@st.composite
def cuttings(draw: st.DrawFn, shape: Shape) -> Cutting:
    """FSDP2 cuts what tensor parallelism has cut before: a strided shard left of a plain one."""
    placements: list[Placement] = []
    sizes: list[int] = []
    order: list[int] = []
    for _ in range(draw(st.integers(0, 3)) if shape else 0):
        dim, size = draw(st.integers(0, len(shape) - 1)), draw(st.integers(2, 3))
        order = [axis + 1 for axis in order]
        placements, sizes = [Shard(dim), *placements], [size, *sizes]
        position = draw(st.integers(0, len(order)))
        before = [axis for axis in order[:position] if dim_of(placements[axis]) == dim]
        if before:
            placements[0] = _StridedShard(dim, split_factor=math.prod(sizes[a] for a in before))
        order.insert(position, 0)
    return Cutting(shape, placements, sizes, order)


def dim_of(placement: Placement) -> int:
    return int(placement.dim)  # type: ignore[attr-defined]  # Shard and _StridedShard have one


def chunks(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    """As torch.chunk, with empty tensors where it gives fewer."""
    found = list(tensor.chunk(count, dim)) if tensor.shape[dim] else []
    return found + [tensor.narrow(dim, 0, 0)] * (count - len(found))


def shards_by_dtensor(cutting: Cutting, numbers: Tensor) -> list[Tensor]:
    """Local tensors by DTensor's own definition, which is that of FSDP2 where the cuts are even."""
    shards = [numbers]
    for placement, size in zip(cutting.placements, cutting.sizes, strict=True):
        shards = [part for shard in shards for part in split(placement, shard, size)]
    return shards


def split(placement: Any, tensor: Tensor, size: int) -> list[Tensor]:
    parts, _ = placement._split_tensor(tensor, size, with_padding=False, contiguous=True)
    return list(parts)


@pytest.mark.parametrize(("shape", "merge", "expected"), [
    ((64, 3, 7, 7), "matrix", (64, 147)),
    ((512, 512, 3, 3), "matrix", (512, 4608)),
    ((64, 3, 7, 7), "paper", (64, 147)),
    ((512, 512, 3, 3), "paper", (512, 512, 9)),
    ((12, 9), "paper", (108,)),
    ((64, 3, 7, 7), "none", (64, 3, 7, 7)),
    ((8, 3, 1, 1), "none", (8, 3)),
    ((1, 6), "matrix", (6,)),
    ((1, 1), "matrix", (1,)),
    ((), "matrix", (1,)),
])  # fmt: skip
def test_merged_shapes_of_the_paper(shape: Shape, merge: Merge, expected: Shape) -> None:
    assert make_grid(shape, block_size=1024, merge=merge).merged_shape == expected


def test_paper_merges_up_to_the_block_size_and_not_above() -> None:
    assert make_grid((12, 9), block_size=108, merge="paper").merged_shape == (108,)
    assert make_grid((12, 9), block_size=107, merge="paper").merged_shape == (12, 9)


@given(shapes, merges, block_sizes)
def test_merging_is_that_of_the_reference(shape: Shape, merge: Merge, size: int) -> None:
    grid = make_grid(shape, block_size=size, merge=merge)
    assert grid.merged_shape == merged_shape(shape, merge, size)


@given(shapes, st.sampled_from(["matrix", "none"]), block_sizes, block_sizes, st.data())
def test_blocks_are_those_of_the_reference_in_the_same_order(
    shape: Shape, merge: Merge, first: int, other: int, data: st.DataObject
) -> None:
    batch_dims = data.draw(st.integers(0, max(len(shape) - 1, 0)))
    grid = make_grid(shape, block_size=(first, other), merge=merge, batch_dims=batch_dims)
    numbers = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    expected = blocks_of(numbers, merge=merge, block_size=(first, other), batch_dims=batch_dims)
    merged = numbers.reshape(grid.merged_shape)
    for position, block in itertools.zip_longest(grid.positions(), expected):
        start, extent = grid.block_start(position), grid.block_extent(position)
        mine = merged[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))]
        assert grid.block_shape(position) == block.shape
        assert np.array_equal(mine.reshape(block.shape), block)


@given(grids())
def test_blocks_tile_the_merged_tensor_exactly_once(case: tuple[Shape, Grid]) -> None:
    shape, grid = case
    assert math.prod(grid.merged_shape) == math.prod(shape)
    covered = np.zeros(grid.merged_shape, int)
    positions = list(grid.positions())
    for position in positions:
        start, extent = grid.block_start(position), grid.block_extent(position)
        assert min(extent) > 0
        covered[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))] += 1
    assert len(positions) == grid.num_blocks
    assert (covered == 1).all()


@given(grids(), st.data())
def test_pieces_of_all_shards_tile_every_block_exactly_once(
    case: tuple[Shape, Grid], data: st.DataObject
) -> None:
    shape, grid = case
    cutting = data.draw(cuttings(shape))
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    merged, sharding = numbers.reshape(grid.merged_shape), cutting.sharding()
    memories = [shard.contiguous().flatten().numpy() for shard in cutting.shards(numbers)]
    regions = [sharding.region(shape, grid, shard) for shard in range(len(memories))]
    used = [np.zeros(len(memory), int) for memory in memories]
    for position in grid.positions():
        start, extent = grid.block_start(position), grid.block_extent(position)
        block = np.full(math.prod(extent), -1)
        for memory, region, count in zip(memories, regions, used, strict=True):
            for piece in pieces(region, start, extent):
                assert (block[offsets(piece.in_block)] == -1).all()
                block[offsets(piece.in_block)] = memory[offsets(piece.in_shard)]
                count[offsets(piece.in_shard)] += 1
        box = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
        assert np.array_equal(as_blocks(torch.from_numpy(block), extent)[0], merged[box])
    assert all((count == 1).all() for count in used)


@given(grids(), st.data())
def test_overlap_table_counts_the_elements_of_all_pieces(
    case: tuple[Shape, Grid], data: st.DataObject
) -> None:
    shape, grid = case
    sharding = data.draw(cuttings(shape)).sharding()
    if data.draw(st.booleans()):
        grid = grid.cut_at(sharding.edges(shape, grid))
    table = overlap_table(sharding, shape, grid)
    assert table.shape == (sharding.num_regions, grid.num_blocks)
    for block, position in enumerate(grid.positions()):
        start, extent = grid.block_start(position), grid.block_extent(position)
        found = [
            sum(piece.numel for piece in pieces(sharding.region(shape, grid, shard), start, extent))
            for shard in range(sharding.num_regions)
        ]
        assert table[:, block].tolist() == found
        assert holders(table)[block] == tuple(shard for shard, n in enumerate(found) if n)


@given(grids(), st.data())
def test_no_shard_edge_goes_through_a_block_that_is_cut_there(
    case: tuple[Shape, Grid], data: st.DataObject
) -> None:
    shape, grid = case
    sharding = data.draw(cuttings(shape)).sharding()
    cut = grid.cut_at(sharding.edges(shape, grid))
    assert all(len(shards) == 1 for shards in holders(overlap_table(sharding, shape, cut)))
    assert all(set(mine) <= set(more) for mine, more in zip(grid.edges, cut.edges, strict=True))
    assert (cut.fingerprint == "") == (cut.edges == grid.edges)


@given(st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple), st.data())
def test_even_shards_are_those_of_dtensor(counts: Shape, data: st.DataObject) -> None:
    cutting = data.draw(cuttings(counts))
    shape = list(counts)
    for placement, size in zip(cutting.placements, cutting.sizes, strict=True):
        shape[dim_of(placement)] *= size
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    grid = make_grid(tuple(shape), block_size=1024, merge="none")
    expected = shards_by_dtensor(cutting, numbers)
    merged = numbers.reshape(grid.merged_shape)
    for number, shard in enumerate(expected):
        region = cutting.sharding().region(tuple(shape), grid, number)
        held = merged[np.ix_(*[[i for a, b in dim for i in range(a, b)] for dim in region])]
        assert torch.equal(held.flatten(), shard.flatten())


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    size = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    source, target = [
        View(size, tuple(draw(st.integers(1, 4)) for _ in size), draw(st.integers(0, 12)))
        for _ in range(2)
    ]
    return Copy(("from", draw(st.integers(0, 1))), source, ("to", 0), target)


@st.composite
def runs_of_copies(draw: st.DrawFn) -> list[Copy]:
    """Copies at equal distances, at nearly equal ones, and unrelated ones."""
    found: list[Copy] = []
    for copy in draw(st.lists(copies(), max_size=4)):
        steps = draw(st.tuples(st.integers(-1, 5), st.integers(-1, 5)))
        found += [
            copy._replace(
                source_view=copy.source_view.shifted(12 + k * steps[0]),
                target_view=copy.target_view.shifted(12 + k * steps[1]),
            )
            for k in range(draw(st.integers(1, 5)))
        ]
    return found


def moves(some: list[Copy]) -> Counter[Any]:
    """Every single element move of some copies, with its multiplicity."""
    return Counter(
        (copy.source, int(a), copy.target, int(b))
        for copy in some
        for a, b in zip(offsets(copy.source_view), offsets(copy.target_view), strict=True)
    )


@given(runs_of_copies())
def test_coalesced_copies_move_the_same_elements(some: list[Copy]) -> None:
    joined = coalesce(some)
    assert len(joined) <= len(some)
    assert moves(joined) == moves(some)
    # torch.as_strided takes no negative stride, and writes to a stride of zero are refused.
    assert all(min(copy.source_view.stride + copy.target_view.stride) > 0 for copy in joined)


@given(grids())
def test_coalesced_copies_leave_the_same_memory(case: tuple[Shape, Grid]) -> None:
    shape, grid = case
    whole = Sharding((), ()).region(shape, grid, 0)
    some, filled = [], 0
    for position in grid.positions():
        extent = grid.block_extent(position)
        some += [
            Copy(("param", 0), piece.in_shard, ("stack", 0), piece.in_block.shifted(filled))
            for piece in pieces(whole, grid.block_start(position), extent)
        ]
        filled += math.prod(extent)
    source, targets = torch.randn(math.prod(shape)), []
    for list_of_copies in (some, coalesce(some)):
        target = torch.full_like(source, math.nan)
        for copy in list_of_copies:
            target.as_strided(*copy.target_view).copy_(source.as_strided(*copy.source_view))
        targets.append(target)
    assert torch.equal(targets[0], targets[1])
    assert not targets[0].isnan().any()


def test_all_blocks_of_a_parameter_enter_a_stack_by_one_copy() -> None:
    grid = make_grid((12, 20), block_size=4)
    whole = Sharding((), ()).region((12, 20), grid, 0)
    some = [
        Copy(("param", 0), piece.in_shard, ("stack", 0), piece.in_block.shifted(16 * number))
        for number, position in enumerate(grid.positions())
        for piece in pieces(whole, grid.block_start(position), grid.block_extent(position))
    ]
    assert len(some) == 15
    assert len(coalesce(some)) == 1


@given(costs, st.integers(1, 12))
def test_no_turn_costs_more_than_the_mean_by_more_than_one_block(
    some: list[int], period: int
) -> None:
    loads = [0] * period
    for cost, turn in zip(some, pack_slots(some, [0.0] * period), strict=True):
        loads[turn] += cost
    assert max(loads) <= sum(some) / period + max(some, default=0)
