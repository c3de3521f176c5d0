"""Packed symmetric matrices hold what whole ones hold, in less memory."""

import pytest
import torch

from titan_shampoo.functional.factors import average_squares_
from titan_shampoo.functional.rule import Clock
from titan_shampoo.functional.symmetric import pack, packed_numel, slabs, unpack

EXTENTS = (1, 7, 127, 128, 147, 256, 300, 1000)
NOW = Clock(torch.ones(3, dtype=torch.int64), ready=True, starts_at_one=torch.zeros(3).bool())


def symmetric(extent: int) -> torch.Tensor:
    rows = torch.randn(3, extent, 5, generator=torch.Generator().manual_seed(0)).double()
    product = rows @ rows.mT
    return (product + product.mT) / 2


@pytest.mark.parametrize("extent", EXTENTS)
def test_slabs_cover_all_columns_once(extent: int) -> None:
    edges = [0, *(stop for _, stop in slabs(extent))]
    assert edges[-1] == extent
    assert [start for start, _ in slabs(extent)] == edges[:-1]
    assert edges == sorted(set(edges))


@pytest.mark.parametrize("extent", EXTENTS)
def test_unpacked_is_what_was_packed(extent: int) -> None:
    matrices = symmetric(extent)
    packed = pack(matrices)
    assert packed.shape == (3, packed_numel(extent))
    assert torch.equal(unpack(packed, extent), matrices)


@pytest.mark.parametrize(("extent", "sixteenths"), [(256, 10), (512, 10), (1024, 9)])
def test_large_matrices_take_little_more_than_half(extent: int, sixteenths: int) -> None:
    assert packed_numel(extent) == extent**2 * sixteenths // 16


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("taken", [None, True, False])
@pytest.mark.parametrize("beta2", [0.9, 1.0])
@pytest.mark.parametrize("extent", EXTENTS[:-1])
@pytest.mark.parametrize("count", [1, 3])
def test_averages_are_those_of_whole_matrices(
    count: int, extent: int, beta2: float, taken: bool | None, transposed: bool
) -> None:
    before = symmetric(extent)[:count]
    rows = torch.randn(count, extent, 9, generator=torch.Generator().manual_seed(1)).double()
    if transposed:
        rows = rows.mT.contiguous().mT
    if taken is False:
        rows.zero_()
    clock = NOW if taken is None else NOW._replace(taken=torch.tensor(taken))
    factor = pack(before)
    average_squares_(factor, rows, beta2, clock, scale=0.5)
    new = rows @ rows.mT * 0.5
    expected = before + new if beta2 == 1 else beta2 * before + (1 - beta2) * new
    if taken is False:
        assert torch.equal(unpack(factor, extent), before)
    else:
        assert torch.allclose(unpack(factor, extent), expected, rtol=1e-12, atol=1e-12)


def test_only_measured_blocks_take_the_gradient() -> None:
    before = symmetric(130)
    factor = pack(before)
    rows = torch.ones(2, 130, 1).double()
    average_squares_(factor, rows, 1.0, NOW._replace(measured=torch.tensor([0, 2])))
    changed = unpack(factor, 130) - before
    assert torch.equal(changed[1], torch.zeros(130, 130).double())
    assert torch.allclose(changed[[0, 2]], torch.ones(2, 130, 130).double())
