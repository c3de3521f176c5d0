"""Blocks lie in memory as their products want it, and products are those of the definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from titan_shampoo.block_memory import as_blocks, in_memory_order, memory_order, memory_stride
from titan_shampoo.functional.factors import contract, unfold

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((), ()),
        ((7,), (0,)),
        ((3, 8), (0, 1)),
        ((8, 3), (0, 1)),
        ((256, 128, 9), (0, 2, 1)),
        ((9, 256, 128), (1, 0, 2)),
        ((64, 3, 3, 32), (0, 1, 2, 3)),
        ((64, 32, 3, 3), (0, 2, 3, 1)),
    ],
)
def test_short_dims_lie_between_the_two_longest(
    shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    assert memory_order(shape) == order


@given(shapes)
def test_a_view_of_memory_has_the_strides_that_copies_into_it_go_by(shape: tuple[int, ...]) -> None:
    memory = torch.arange(3 * math.prod(shape))
    blocks = as_blocks(memory, shape)
    assert blocks.shape == (3, *shape)
    assert torch.equal(in_memory_order(blocks).flatten(), memory)
    strided = memory.as_strided((3, *shape), (math.prod(shape), *memory_stride(shape)))
    assert torch.equal(strided, blocks)


@given(shapes, st.booleans())
def test_products_are_those_of_the_definition(shape: tuple[int, ...], lies: bool) -> None:
    blocks = numbers(3, *shape)
    if lies:
        blocks = as_blocks(in_memory_order(blocks).flatten(), shape)
    matrices = [(dim, numbers(3, extent, extent)) for dim, extent in enumerate(shape)]
    expected = blocks
    for dim, matrix in matrices:
        moved = expected.movedim(dim + 1, 1)
        expected = torch.einsum("nij,nj...->ni...", matrix, moved).movedim(1, dim + 1)
    product = contract(blocks, matrices)
    assert torch.allclose(product, expected, rtol=1e-12, atol=1e-12)
    assert in_memory_order(product).is_contiguous()


@given(shapes)
def test_squares_are_those_of_the_definition(shape: tuple[int, ...]) -> None:
    blocks = numbers(3, *shape)
    for dim in range(len(shape)):
        rows = unfold(blocks, dim)
        squares = rows @ rows.mT
        flat = blocks.movedim(dim + 1, 1).reshape(3, shape[dim], -1)
        expected = flat @ flat.mT
        found = squares if squares.ndim == 3 else squares.sum(1)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_products_of_convolutions_move_no_elements() -> None:
    shape = (16, 12, 9)
    blocks = as_blocks(numbers(3 * math.prod(shape)), shape)
    matrices = [(dim, numbers(3, extent, extent)) for dim, extent in enumerate(shape)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        contract(blocks, matrices)
        for dim in range(3):
            unfold(blocks, dim)
    events = profiler.events()
    assert events is not None
    moved = [math.prod(event.input_shapes[0]) for event in events if event.name == "aten::copy_"]
    # Only the small matrix of the kernel is repeated, once for each row that it meets.
    assert sum(moved) == 3 * 16 * 9 * 9
