"""Closed forms equal the dense solves they stand for, and scalars those of the directions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import eva as reference
from tests.support.eva_directions import eva, eva_f, eva_s, marginal_means
from titan_shampoo.functional.eva import (
    Curvature,
    Terms,
    outer,
    running_average_,
    terms,
)

MATRICES = [(5, 7), (1, 1), (1, 6), (6, 1)]
TENSORS = [*MATRICES, (3, 4, 5), (3, 2, 2, 3), (4,)]
DAMPINGS = [1e-3, 0.3, 10.0]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(mine: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(mine.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("shape", [*MATRICES, (3, 4, 5), (3, 2, 2, 3)])
def test_eva_solves_the_kronecker_system(shape: tuple[int, ...], damping: float) -> None:
    grad, a, b = normal(1, *shape), normal(2, int(np.prod(shape[1:]))), normal(3, shape[0])
    expected = reference.eva(grad.flatten(1).numpy(), a.numpy(), b.numpy(), damping).reshape(shape)
    assert error(eva(grad, a, b, damping=damping), expected) < 1e-12


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("shape", [*MATRICES, (3, 4, 5), (3, 2, 2, 3)])
def test_eva_f_solves_the_kronecker_system(shape: tuple[int, ...], damping: float) -> None:
    grad, a = normal(1, *shape), normal(2, int(np.prod(shape[1:])))
    expected = reference.eva_f(grad.flatten(1).numpy(), a.numpy(), damping).reshape(shape)
    assert error(eva_f(grad, a, damping=damping), expected) < 1e-12


@pytest.mark.parametrize("damping", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("shape", [*MATRICES, (3, 4, 5), (3, 2, 2, 3)])
def test_eva_s_solves_the_kronecker_system(shape: tuple[int, ...], damping: float) -> None:
    grad = normal(1, *shape) + 0.5
    assert error(eva_s(grad, damping=damping), reference.eva_s(grad.numpy(), damping)) < 1e-12


def found(curvature: Curvature, grad: Tensor, left: Tensor, right: Tensor, y: float) -> Terms:
    if curvature == "input":
        left = grad @ right
    if curvature == "gradient":
        left, right = marginal_means(grad)
    return terms(
        curvature,
        grad.square().sum(),
        left @ grad @ right,
        left @ left,
        right @ right,
        torch.tensor(y, dtype=torch.float64),
    )


@given(
    st.sampled_from(["input_output", "input", "gradient"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.floats(1e-3, 1e3),
)
def test_three_scalars_give_lengths_and_angles(
    curvature: Curvature, rows: int, columns: int, seed: int, damping: float
) -> None:
    grad, right, left = (
        normal(seed, rows, columns),
        normal(seed + 1, columns),
        normal(seed + 2, rows),
    )
    scalars = found(curvature, grad, left, right, damping)
    if curvature == "input_output":
        direction = eva(grad, right, left, damping=damping)
    elif curvature == "input":
        direction = eva_f(grad, right, damping=damping)
    else:
        left, right = marginal_means(grad)
        direction = eva(grad, right, left, damping=damping)
    direction = direction * damping
    inner, square = (direction * grad).sum(), direction.square().sum()
    # Relative to the sums that nearly cancel, where the gradient lies along the curvature.
    tolerance = 1e-12 * float(grad.square().sum())
    assert abs(scalars.undamped_inner() - inner) <= tolerance
    assert abs(scalars.undamped_square() - square) <= tolerance
    assert scalars.undamped_inner() >= 0


def test_a_layer_without_gradient_has_a_direction_of_zero_and_a_finite_cosine() -> None:
    scalars = found("input_output", torch.zeros(2, 3, dtype=torch.float64), normal(1, 2),
                    normal(2, 3), 0.3)  # fmt: skip
    assert scalars.undamped_inner() == 0
    assert scalars.undamped_square() == 0
    assert scalars.cosine() == 1


@pytest.mark.parametrize("shape", TENSORS)
def test_marginal_means_are_means_over_all_other_dims(shape: tuple[int, ...]) -> None:
    grad = normal(0, *shape)
    for dim, mean in enumerate(marginal_means(grad)):
        others = tuple(d for d in range(len(shape)) if d != dim)
        assert np.allclose(mean.numpy(), grad.numpy().mean(axis=others), rtol=1e-13)


def test_outer_product_runs_over_the_last_dim_first() -> None:
    vectors = [normal(0, 2), normal(1, 3), normal(2, 4)]
    expected = torch.einsum("i,j,k->ijk", *vectors).flatten()
    assert torch.allclose(outer(vectors), expected, rtol=1e-14)


def test_running_average_weighs_the_old_value_and_takes_the_first_as_it_is() -> None:
    average = torch.tensor([7.0, 7.0, 2.0])
    new = torch.tensor([1.0, torch.nan, 4.0])
    running_average_(
        average,
        new,
        torch.tensor([0.0, 3.0, 3.0]),
        torch.tensor([5.0, 0.0, 5.0]),
        torch.tensor(0.25),
    )
    assert average.tolist() == [1.0, 7.0, 0.25 * 2 + 0.75 * 4]
