"""Stacks are decomposed side by side as they would be one after the other."""

import os
import threading

import pytest
import torch

from titan_shampoo.functional.roots import eigh
from titan_shampoo.functional.side_by_side import SMALL_EXTENT, side_by_side


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def stack(count: int, extent: int) -> torch.Tensor:
    rows = torch.randn(count, extent, extent, generator=torch.Generator().manual_seed(0))
    return (rows @ rows.mT).double()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_matrix_gets_the_result_that_it_gets_alone_on_one_thread(three_threads, count):
    matrices = stack(count, 96)
    values, vectors = eigh(matrices)
    torch.set_num_threads(1)
    alone = [torch.linalg.eigh(matrix) for matrix in matrices]
    torch.set_num_threads(3)
    assert torch.equal(values, torch.stack([pair.eigenvalues for pair in alone]))
    assert torch.equal(vectors, torch.stack([pair.eigenvectors for pair in alone]))


def test_threads_that_begin_later_have_the_number_that_was_set(three_threads):
    eigh(stack(3, 32))
    numbers = []
    later = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert numbers == [3]


def test_few_large_matrices_and_other_devices_are_left_to_torch(three_threads):
    asked = []

    def function(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        asked.append(part.shape)
        return (part,)

    large = SMALL_EXTENT + 1
    side_by_side(function, torch.empty(2, large, large))
    side_by_side(function, torch.empty(3, 8, 8, device="meta"))
    assert asked == [(2, large, large), (3, 8, 8)]
    side_by_side(function, torch.empty(3, large, large))
    assert asked[2:] == [(1, large, large)] * 3


def test_one_matrix_that_is_left_over_has_all_threads(three_threads):
    asked = []

    def function(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
        asked.append((len(part), torch.get_num_threads()))
        return (part,)

    for count in (1, 2, 7):
        matrices = stack(count, 8)
        (found,) = side_by_side(function, matrices)
        assert torch.equal(found, matrices)
    assert sorted(asked[1:3]) == [(1, 1), (1, 1)]
    assert asked[:1] == asked[-1:] == [(1, 3)]
    assert sorted(asked[3:-1]) == [(2, 1)] * 3


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_matrix_that_has_no_decomposition_costs_only_itself(three_threads, bad):
    matrices = stack(3, 32)
    matrices[bad] = torch.nan
    values, vectors = eigh(matrices)
    good = [number for number in range(3) if number != bad]
    assert not vectors[bad].isfinite().all()
    torch.testing.assert_close(
        vectors[good] * values[good].unsqueeze(-2) @ vectors[good].mT, matrices[good]
    )


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_has_threads_of_its_own(three_threads):
    matrices = stack(3, 32)
    eigh(matrices)
    child = os.fork()
    if not child:
        (found,) = side_by_side(lambda part: (part,), matrices)
        os._exit(0 if len(found) == 3 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
