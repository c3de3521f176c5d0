"""Inverse roots ``A^(-exponent)`` of stacks of symmetric positive semi-definite matrices.

Eigendecomposition, and the coupled Newton iteration of Higham 2008 (section 7.3) in the form of
Anil et al. 2020.
"""

from typing import Literal

import torch
from torch import Tensor

RootMethod = Literal["auto", "eigh", "newton"]
BasisMethod = Literal["eigh", "qr"]

SMALLEST_DAMPING = 1e-30
"""Keeps the root of an all-zero factor finite under relative damping."""
NEWTON_TOLERANCE = 1e-6
NEWTON_ITERATIONS = 1000


def inverse_root(
    matrices: Tensor,
    exponent: float,
    *,
    eps: float,
    eps_relative: float | None = None,
    method: RootMethod = "auto",
) -> Tensor:
    """``(A + eps I)^(-exponent)`` for each matrix ``A`` of a stack; NaN where it could not be had.

    Args:
        matrices: Symmetric positive semi-definite, ``(n, d, d)``.
        exponent: Positive power of the inverse.
        eps: Damping, absolute.
        eps_relative: Damping relative to the largest eigenvalue, used instead of ``eps`` if given.
        method: ``"newton"`` needs ``1 / exponent`` to be a whole number; ``"auto"`` is ``"eigh"``.
    """
    if method == "newton":
        return _newton(matrices, exponent, eps, eps_relative)
    values, vectors = _eigh(matrices)
    if eps_relative is None:
        damping: Tensor | float = eps
    else:
        damping = (eps_relative * values[:, -1:]).clamp(min=SMALLEST_DAMPING)
    values = values + damping
    values = values + (damping - values[:, :1]).clamp(min=0.0)
    return (vectors * values.pow(-exponent).unsqueeze(-2)) @ vectors.mT


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors; NaN for a matrix that has none."""
    try:
        return torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:
        # One bad matrix fails the whole stack: find it, so that the others still get theirs.
        pairs = [_eigh_or_nan(matrix) for matrix in matrices]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def _eigh_or_nan(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition of one matrix in float64."""
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError:
        nan = torch.full_like(matrix, torch.nan)
        return nan[0], nan
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _newton(matrices: Tensor, exponent: float, eps: float, eps_relative: float | None) -> Tensor:
    """Coupled Newton iteration; each matrix stops when ``max|M - I|`` is below the tolerance."""
    order = round(1 / exponent)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    damping: Tensor | float = eps
    if eps_relative is not None:
        largest = torch.linalg.eigvalsh(matrices)[:, -1:, None]
        damping = (eps_relative * largest).clamp(min=SMALLEST_DAMPING)
    damped = matrices + damping * identity
    scale = (order + 1) / (2 * torch.linalg.matrix_norm(damped, keepdim=True))
    root, coupled = scale.pow(exponent) * identity, scale * damped
    for _ in range(NEWTON_ITERATIONS):
        active = (coupled - identity).abs().amax(dim=(-2, -1), keepdim=True) > NEWTON_TOLERANCE
        if not active.any():
            return root
        factor = identity * (1 + 1 / order) - coupled / order
        root = torch.where(active, root @ factor, root)
        coupled = torch.where(active, torch.linalg.matrix_power(factor, order) @ coupled, coupled)
    return torch.where(active, torch.nan, root)


def floored_inverse_root(matrices: Tensor, exponent: float, *, floor: float) -> Tensor:
    """``A^(-exponent)`` with eigenvalues raised to ``floor`` times the largest, ``(n, d, d)``."""
    values, vectors = _eigh(matrices)
    smallest = (floor * values[:, -1:]).clamp(min=SMALLEST_DAMPING)
    values = values.maximum(smallest)
    return (vectors * values.pow(-exponent).unsqueeze(-2)) @ vectors.mT


def eigenbasis(matrices: Tensor, previous: Tensor, *, method: BasisMethod) -> Tensor:
    """Orthonormal eigenvectors of each matrix, in columns, ``(n, d, d)``.

    Args:
        matrices: Symmetric positive semi-definite, ``(n, d, d)``.
        previous: Basis to start from, ``(n, d, d)``; only ``"qr"`` uses it.
        method: ``"eigh"``, or ``"qr"`` for one step of orthogonal iteration, with columns in the
            order of the eigenvalues that the previous basis sees.
    """
    if method == "eigh":
        return _eigh(matrices)[1]
    product = matrices @ previous
    seen = (previous * product).sum(-2)
    order = seen.argsort(dim=-1, descending=True).unsqueeze(-2)
    return torch.linalg.qr(product.gather(-1, order.expand_as(product)))[0]
