"""FOOF and K-FAC solve the Kronecker systems they stand for; with factors of rank one, Eva's."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference import kfac as reference
from tests.support.eva_directions import eva, eva_f
from tests.support.layer_models import normal
from titan_shampoo.functional.kfac import Damping, direction, refreshed

SHAPES = [(5, 7), (1, 1), (1, 6), (6, 1), (3, 20)]
DAMPINGS = [1e-2, 0.3, 10.0]


def moment(seed: int, size: int, rank: int) -> Tensor:
    rows = normal(seed, rank, size)
    return rows.T @ rows / rank


def solved(
    grad: Tensor, a: Tensor, b: Tensor | None, damping: float, kind: Damping, relative: bool = False
) -> Tensor:
    y = torch.tensor([damping], dtype=torch.float64)
    state = refreshed(None if b is None else b[None], a[None], y, kind, is_relative=relative)
    return direction(state, grad[None])[0]


def error(mine: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(mine.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_foof_solves_the_kronecker_system(shape: tuple[int, int], damping: float) -> None:
    grad, a = normal(1, *shape), moment(2, shape[1], 4)
    expected = reference.foof(grad.numpy(), a.numpy(), damping)
    assert error(solved(grad, a, None, damping, "factored"), expected) < 1e-12


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["exact", "factored"])
def test_kfac_solves_the_kronecker_system(
    kind: Damping, shape: tuple[int, int], damping: float
) -> None:
    grad, a, b = normal(1, *shape), moment(2, shape[1], 4), moment(3, shape[0], 4)
    dense = reference.kfac_exact if kind == "exact" else reference.kfac_factored
    expected = dense(grad.numpy(), a.numpy(), b.numpy(), damping)
    assert error(solved(grad, a, b, damping, kind), expected) < 1e-11


def test_factored_damping_of_a_factor_that_is_zero_is_that_of_the_reference() -> None:
    grad, a, b = normal(1, 3, 4), moment(2, 4, 4), torch.zeros(3, 3, dtype=torch.float64)
    expected = reference.kfac_factored(grad.numpy(), a.numpy(), b.numpy(), 0.3)
    assert error(solved(grad, a, b, 0.3, "factored"), expected) < 1e-12


def test_one_block_without_eigenvalues_does_not_spoil_the_others() -> None:
    a, b = torch.stack([moment(1, 4, 6)] * 2), torch.stack([moment(2, 3, 6)] * 2)
    damping = torch.full((2,), 0.1, dtype=torch.float64)
    sound = refreshed(b, a, damping, "exact", is_relative=False)
    b[0] = torch.nan
    state = refreshed(b, a, damping, "exact", is_relative=False)
    assert state["left_values"][0].isnan().all()
    grad = normal(3, 2, 3, 4)
    assert torch.allclose(direction(state, grad)[1], direction(sound, grad)[1], rtol=1e-12)


def test_relative_damping_is_that_of_the_mean_eigenvalues() -> None:
    grad, a, b = normal(1, 3, 4), moment(2, 4, 9), moment(3, 3, 9)
    for left, scale in ((None, a.trace() / 4), (b, a.trace() / 4 * b.trace() / 3)):
        for kind in ("exact", "factored"):
            relative = solved(grad, a, left, 0.3, kind, relative=True)
            absolute = solved(grad, a, left, 0.3 * float(scale), kind)
            assert torch.allclose(relative, absolute, rtol=1e-13)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_foof_with_a_moment_of_rank_one_is_eva_f(damping: float) -> None:
    grad, a = normal(1, 5, 7), normal(2, 7)
    mine = solved(grad, torch.outer(a, a), None, damping, "factored")
    assert error(mine, eva_f(grad, a, damping=damping).numpy()) < 1e-11


@pytest.mark.parametrize("damping", DAMPINGS)
def test_exact_kfac_with_moments_of_rank_one_is_eva(damping: float) -> None:
    grad, a, b = normal(1, 5, 7), normal(2, 7), normal(3, 5)
    mine = solved(grad, torch.outer(a, a), torch.outer(b, b), damping, "exact")
    assert error(mine, eva(grad, a, b, damping=damping).numpy()) < 1e-11


def test_a_factor_that_cannot_be_inverted_gives_nan_and_leaves_its_neighbour() -> None:
    factors = torch.stack([torch.eye(3), -torch.eye(3)])
    state = refreshed(None, factors, torch.full((2,), 0.5), "factored", is_relative=False)
    assert state["right_inverse"][0].isfinite().all()
    assert state["right_inverse"][1].isnan().all()
