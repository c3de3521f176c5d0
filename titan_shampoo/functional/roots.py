"""Inverse roots ``A^(-exponent)`` of stacks of symmetric positive semi-definite matrices.

Eigendecomposition, and the coupled Newton iteration of Higham 2008 (section 7.3) in the form of
Anil et al. 2020.
"""

from typing import Literal

import torch
from torch import Tensor

RootMethod = Literal["auto", "eigh", "newton"]

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

    Raises:
        ValueError: If ``method`` is ``"newton"`` and ``1 / exponent`` is not a whole number.
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
    if abs(order * exponent - 1) > 1e-9:
        raise ValueError(f"exponent: got {exponent}, wanted 1 / a whole number with 'newton'; "
                         "set root_method to 'eigh'")  # fmt: skip
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    if eps_relative is not None:
        # The Frobenius norm bounds the largest eigenvalue; finding that itself is what Newton
        # avoids.
        norms = torch.linalg.matrix_norm(matrices, keepdim=True)
        damped = matrices + (eps_relative * norms).clamp(min=SMALLEST_DAMPING) * identity
    else:
        damped = matrices + eps * identity
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
