"""Every root method gives the inverse root that the eigenvalues define."""

import pytest
import torch
from torch import Tensor

from titan_shampoo.functional.roots import (
    RootMethod,
    condition_number,
    inverse_root,
    next_basis,
    root_from_eigenvalues,
    tracked_eigenvalues,
)


def spectrum(condition: float, extent: int = 24, count: int = 3) -> tuple[Tensor, Tensor]:
    """Eigenvalues from 7 down to ``7 / condition``, and random orthonormal vectors."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, extent, extent, generator=generator, dtype=torch.float64)
    exponents = torch.linspace(0, 1, extent, dtype=torch.float64)
    return 7 * condition**-exponents, torch.linalg.qr(noise)[0]


def powered(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    return (vectors * values**exponent) @ vectors.mT


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("exponent", [1 / 2, 1 / 4, 1 / 8])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize(
    ("method", "dtype", "tolerance"),
    [
        ("eigh", torch.float64, 1e-8),
        ("newton", torch.float64, 1e-6),
        ("newton_schulz", torch.float64, 1e-8),
        ("eigh", torch.float32, 1e-1),  # rounding the matrix alone moves small eigenvalues
        ("newton_schulz", torch.float32, 1e-1),
    ],
)
def test_root_is_that_of_the_eigenvalues(
    exponent: float, condition: float, method: RootMethod, dtype: torch.dtype, tolerance: float
) -> None:
    values, vectors = spectrum(condition)
    matrices = powered(values, vectors, 1.0).to(dtype)
    root, found = inverse_root(matrices, exponent, eps=1e-9, method=method)
    assert relative_error(root, powered(values + 1e-9, vectors, -exponent)) < tolerance
    estimates = method in ("newton", "newton_schulz")
    low, high = (0.2, 1.2) if estimates or dtype == torch.float32 else (0.999, 1.001)
    assert all(low < one / condition < high for one in found.flatten().tolist())


@pytest.mark.parametrize("method", ["eigh", "newton", "newton_schulz"])
def test_relative_damping_is_relative_to_the_largest_eigenvalue(method: RootMethod) -> None:
    values, vectors = spectrum(1e8)
    matrices = powered(values, vectors, 1.0)
    root, _ = inverse_root(matrices, 0.5, eps=1.0, eps_relative=0.1, method=method)
    assert relative_error(root, powered(values + 0.7, vectors, -0.5)) < 1e-2


@pytest.mark.parametrize("method", ["eigh", "newton", "newton_schulz"])
def test_root_of_nothing_is_finite(method: RootMethod) -> None:
    nothing = torch.zeros(2, 5, 5)
    for eps_relative in (None, 1e-6):
        found = inverse_root(nothing, 0.25, eps=1e-12, eps_relative=eps_relative, method=method)
        assert found.root.isfinite().all()
        assert (found.condition - 1).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["eigh", "newton"])
def test_one_matrix_without_eigenvalues_does_not_spoil_the_others(method: RootMethod) -> None:
    values, vectors = spectrum(10.0)
    matrices = powered(values, vectors, 1.0)
    matrices[1] = torch.nan
    root, conditions = inverse_root(matrices, 0.5, eps=1.0, eps_relative=1e-12, method=method)
    assert conditions.isfinite().flatten().tolist() == [True, False, True]
    assert root[1].isnan().all()
    expected = powered(values, vectors, -0.5)
    assert relative_error(root[[0, 2]], expected[[0, 2]]) < 1e-6


@pytest.mark.parametrize("exponent", [1 / 2, 1 / 4, 1 / 6, 1 / 16])
@pytest.mark.parametrize("extent", [8, 64, 200])
def test_newton_finds_roots_of_rank_one(extent: int, exponent: float) -> None:
    """In float32, with a damping far below its rounding, it found none."""
    vector = torch.randn(2, extent, 1, generator=torch.Generator().manual_seed(extent))
    root, _ = inverse_root(vector @ vector.mT, exponent, eps=1e-12, method="newton")
    squares = vector.double().square().sum(1, keepdim=True)
    unit = vector.double() / squares.sqrt()
    damping = 8 * torch.finfo(torch.float32).eps * squares
    others = torch.eye(extent, dtype=torch.float64) - unit @ unit.mT
    expected = (squares + damping) ** -exponent * (unit @ unit.mT) + damping**-exponent * others
    assert relative_error(root, expected) < 0.1


@pytest.mark.parametrize("method", ["newton", "newton_schulz"])
@pytest.mark.parametrize("exponent", [1 / 2, 1 / 4])
def test_a_matrix_with_a_negative_eigenvalue_has_a_root_or_none(
    exponent: float, method: RootMethod
) -> None:
    """newton_schulz ended at 1e14 with an eigenvalue of twice the rounding below zero."""
    noise = torch.finfo(torch.float32).eps
    _, vectors = spectrum(1.0, count=1)
    for negative in (0.5, 1.1, 1.5, 2.0, 4.0, 20.0, 1e4):
        values = torch.full((1, 24), 0.5 * noise, dtype=torch.float64)
        values[:, 0], values[:, 1] = 1.0, -negative * noise
        matrix = (vectors * values) @ vectors.mT
        root, _ = inverse_root(matrix.float(), exponent, eps=1e-12, method=method)
        assert root.isnan().all() or root.abs().max() < 1.5 * noise**-exponent


def test_orthogonal_iteration_follows_a_drifting_matrix() -> None:
    values, vectors = spectrum(1e4)
    basis, _ = next_basis(powered(values, vectors, 1.0), vectors, False, method="qr")
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        noise = torch.randn(vectors.shape, generator=generator, dtype=torch.float64)
        vectors = torch.linalg.qr(vectors + 1e-4 * noise)[0]
        matrices = powered(values, vectors, 1.0)
        basis, seen_before = next_basis(matrices, basis, True, method="qr")
    seen = tracked_eigenvalues(matrices, basis)
    root, condition = root_from_eigenvalues(seen, basis, 0.25, eps=1e-12, eps_relative=None)
    assert relative_error(root, powered(values, vectors, -0.25)) < 1e-2
    assert condition.flatten().tolist() == pytest.approx([1e4] * 3, rel=0.1)
    before = condition_number(seen_before)
    assert before.flatten().tolist() == pytest.approx([1e4] * 3, rel=0.1)


def test_first_basis_is_found_by_eigendecomposition_whatever_the_method() -> None:
    values, vectors = spectrum(1e4)
    matrices = powered(values, vectors, 1.0)
    identity = torch.eye(24, dtype=torch.float64).expand_as(matrices)
    ready = torch.tensor([False, True, False])
    basis, found = next_basis(matrices, identity, ready, method="qr")
    off_diagonal = basis.mT @ matrices @ basis
    off_diagonal.diagonal(dim1=-2, dim2=-1).zero_()
    assert off_diagonal[[0, 2]].norm() < 1e-10
    assert off_diagonal[1].norm() > 1e-3
    assert found[[0, 2]].sort().values.allclose(values.flip(0).expand(2, -1))
