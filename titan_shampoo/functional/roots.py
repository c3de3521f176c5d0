"""Inverse roots ``A^(-exponent)`` of stacks of symmetric positive semi-definite matrices.

Eigendecomposition; the coupled Newton iteration (Higham 2008, section 7.3, in the form of Anil et
al. 2020); and for accelerators the coupled Newton-Schulz iteration with the optimal scaling of Chen
& Chow 2014, which is nothing but matrix products.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from titan_shampoo.functional.degenerate import ordered, settled, shifted
from titan_shampoo.functional.side_by_side import side_by_side

RootMethod = Literal["auto", "eigh", "newton", "newton_schulz", "qr"]
BasisMethod = Literal["eigh", "qr"]
Degenerate = Literal["previous", "arbitrary"]

SMALLEST_DAMPING = 1e-30
"""Relative damping of nothing: keeps its inverse finite, so that its direction is 0, not 0 / 0."""
RANGE = 1e-24
"""Smallest damping of float32 factors, relative to the largest eigenvalue.

Roots of a factor of 1e24 with a damping of 1e-12 would differ by more than float32 holds of squares
of directions. Ordinary factors, up to 1e24 times the damping, know nothing of it.
"""
NEWTON_NOISE = 8
"""Damping of the coupled Newton iteration, at least, in roundings of the largest eigenvalue.

Averages of thousands of steps have eigenvalues of -3 of them where they should be zero.
"""
NEWTON_TOLERANCE = 1e-6
NEWTON_ITERATIONS = 100
"""Four times as many as eigenvalues at the rounding of float32 need, twice those of float64."""
POWER_ITERATIONS = 16
CONDITION_ITERATIONS = 4
"""Power iterations for the condition number of a root; they are nothing beside its products."""
NEWTON_SCHULZ_MIN_EXTENT = 512
"""Extent from which ``"auto"`` prefers matrix products to eigendecomposition on accelerators."""


def not_nothing(damping: Tensor, smallest: float = SMALLEST_DAMPING) -> Tensor:
    """Relative damping, but ``smallest`` where there is nothing to be relative to.

    Args:
        damping: At least zero; float32 has no inverse of what is below its smallest number.
        smallest: Greater than zero.
    """
    return torch.where(damping < torch.finfo(torch.float32).tiny, smallest, damping)


class Root(NamedTuple):
    """An inverse root of each matrix of a stack, and what was seen on the way to it."""

    root: Tensor
    """``(n, d, d)``."""
    condition: Tensor
    """Largest over smallest eigenvalue of the damped matrix, ``(n, 1)``."""


def inverse_root(
    matrices: Tensor,
    exponent: float,
    *,
    eps: float,
    eps_relative: float | None = None,
    method: RootMethod = "auto",
) -> Root:
    """``(A + eps I)^(-exponent)`` for each matrix ``A`` of a stack; NaN where it could not be had.

    With it comes the condition number of ``A + eps I``: exact where there are eigenvalues; the
    Newton iterations have none, and estimate it from below by a few power iterations.

    Args:
        matrices: Symmetric positive semi-definite, ``(n, d, d)``.
        exponent: Positive power of the inverse.
        eps: Damping, absolute.
        eps_relative: Damping relative to the largest eigenvalue, used instead of ``eps`` if given.
        method: ``"newton"`` needs ``1 / exponent`` to be a whole number, ``"newton_schulz"`` a
            power of two from 2 on. They find no root where an eigenvalue may as well be negative:
            their damping is at least the rounding of the largest eigenvalue (``"newton"``: eight
            times that, 1e-6 of it in float32). ``"auto"`` is ``"newton_schulz"`` for large matrices
            on accelerators, else ``"eigh"``. (``"qr"`` needs the basis of the last refresh: see
            ``next_basis``.)
    """
    if method == "auto":
        is_large = matrices.is_cuda and matrices.shape[-1] >= NEWTON_SCHULZ_MIN_EXTENT
        method = "newton_schulz" if is_large and halvings(exponent) else "eigh"
    if method == "newton":
        return _newton(matrices, exponent, eps, eps_relative)
    if method == "newton_schulz":
        return _newton_schulz(matrices, exponent, eps, eps_relative)
    return root_from_eigenvalues(*eigh(matrices), exponent, eps=eps, eps_relative=eps_relative)


def root_from_eigenvalues(
    values: Tensor, vectors: Tensor, exponent: float, *, eps: float, eps_relative: float | None
) -> Root:
    """``Q (lambda + damping)^(-exponent) Q^T``; eigenvalues are lifted to the damping at least.

    Args:
        values: ``(n, d)``, in any order.
        vectors: Eigenvectors in columns, ``(n, d, d)``.
        exponent: Positive power of the inverse.
        eps: Damping, absolute.
        eps_relative: Damping relative to the largest eigenvalue, instead of ``eps`` if given.
    """
    if eps_relative is None:
        damping = torch.full_like(values[:, :1], eps)
        if values.dtype == torch.float32:
            damping = damping.maximum(RANGE * values.amax(1, keepdim=True))
    else:
        damping = not_nothing(eps_relative * values.amax(1, keepdim=True))
    lift = (-values.amin(1, keepdim=True)).clamp(min=0.0)
    # In this order: beside a lift, damping may be less than rounding.
    return _root_of(values + lift + damping, vectors, exponent)


def _root_of(values: Tensor, vectors: Tensor, exponent: float) -> Root:
    """``Q lambda^(-exponent) Q^T`` of positive eigenvalues."""
    root = (vectors * values.pow(-exponent).unsqueeze(-2)) @ vectors.mT
    return Root(root, condition_number(values))


def condition_number(values: Tensor) -> Tensor:
    """Largest over smallest of positive eigenvalues ``(n, d)``, ``(n, 1)``; finite."""
    ratio = values.amax(1, keepdim=True) / values.amin(1, keepdim=True)
    return ratio.clamp(max=torch.finfo(values.dtype).max)


def semidefinite(matrices: Tensor) -> Tensor:
    """The matrices with eigenvalues raised to what those of float64 are good to, ``(n, d, d)``.

    Rounding in a narrower dtype leaves eigenvalues below zero where they should be zero.

    Args:
        matrices: Symmetric, ``(n, d, d)`` float64.
    """
    values, vectors = eigh(matrices)
    noise = values.shape[-1] * torch.finfo(values.dtype).eps * values[:, -1:]
    return (vectors * values.maximum(noise).unsqueeze(-2)) @ vectors.mT


def lifted(values: Tensor) -> Tensor:
    """Eigenvalues ``(n, d)`` of positive semi-definite matrices, lifted by what they are good to.

    That is the rounding of the largest of each.
    """
    noise = torch.finfo(values.dtype).eps * values.amax(1, keepdim=True)
    return values.clamp(min=0.0) + not_nothing(noise)


def _estimated_condition(damped: Tensor, root: Tensor, exponent: float) -> Tensor:
    """That of ``damped``, from below: its largest eigenvalue times the inverse of its smallest.

    At 256 rows, from spectra that fall as a power or exponentially to 1e-6, it is 0.6 to 1 of it.

    Args:
        damped: ``(n, d, d)``.
        root: ``damped^(-exponent)``, whose largest eigenvalue belongs to the smallest of it.
        exponent: Positive.
    """
    inverse = _largest_eigenvalues(root, CONDITION_ITERATIONS).pow(1 / exponent)
    condition = _largest_eigenvalues(damped, CONDITION_ITERATIONS) * inverse
    return condition.flatten(1).clamp(min=1.0, max=torch.finfo(damped.dtype).max)


def halvings(exponent: float) -> int:
    """How often 1 is halved to give ``exponent``; 0 if it is not 1/2, 1/4, 1/8, ..."""
    times = round(-math.log2(exponent))
    return times if times >= 1 and 2.0**-times == exponent else 0


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors; NaN for a matrix that has none."""
    # In units, as thresholds of solvers are absolute: else the size of a matrix would choose the
    # vectors of eigenvalues that are equal but for rounding.
    unit = _units(matrices, 1.0)
    matrices = matrices / unit
    try:
        values, vectors = side_by_side(torch.linalg.eigh, matrices)
    except torch.linalg.LinAlgError:
        # One bad matrix fails the whole stack: find it, so that the others still get theirs.
        pairs = [_eigh_or_nan(matrix) for matrix in matrices]
        values = torch.stack([p[0] for p in pairs])
        vectors = torch.stack([p[1] for p in pairs])
    return values * unit.squeeze(-1), vectors


def _eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues in ascending order; NaN for a matrix that has none."""
    try:
        return torch.linalg.eigvalsh(matrices)
    except torch.linalg.LinAlgError:
        return eigh(matrices)[0]


def _eigh_or_nan(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition of one matrix in float64."""
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError:
        nan = torch.full_like(matrix, torch.nan)
        return nan[0], nan
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _newton(matrices: Tensor, exponent: float, eps: float, eps_relative: float | None) -> Root:
    """Coupled Newton iteration; each matrix stops when ``max|M - I|`` is below the tolerance."""
    order = round(1 / exponent)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    noise = torch.finfo(matrices.dtype).eps
    unit = _units(matrices, eps if eps_relative is None else SMALLEST_DAMPING)
    matrices = matrices / unit
    if eps_relative is None:
        damping = eps / unit
    else:
        damping = not_nothing(eps_relative * _eigenvalues(matrices)[:, -1:, None], smallest=1.0)
    damping = damping.maximum(NEWTON_NOISE * noise * _largest_eigenvalues(matrices))
    damped = matrices + damping * identity
    scale = (order + 1) / (2 * torch.linalg.matrix_norm(damped, keepdim=True))
    root, coupled = scale.pow(exponent) * identity, scale * damped
    tolerance = max(NEWTON_TOLERANCE, order * noise)
    for _ in range(NEWTON_ITERATIONS):
        error = (coupled - identity).abs().amax(dim=(-2, -1), keepdim=True)
        active = error > tolerance
        if not active.any():
            break
        factor = identity * (1 + 1 / order) - coupled / order
        root = torch.where(active, root @ factor, root)
        coupled = torch.where(active, torch.linalg.matrix_power(factor, order) @ coupled, coupled)
    root = torch.where(error <= tolerance, root, torch.nan)
    condition = _estimated_condition(damped, root, exponent)
    return Root(root / unit**exponent, condition)


def _units(matrices: Tensor, of_nothing: float) -> Tensor:
    """Powers of two of the size of the largest entry of each matrix, ``(n, 1, 1)``.

    The squares in a norm would leave the range of floats long before the entries do.

    Args:
        matrices: ``(n, d, d)``.
        of_nothing: That of a matrix of zeros.
    """
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    unit = torch.exp2(torch.frexp(largest).exponent.to(largest.dtype))
    return torch.where(largest > 0, unit, of_nothing)


def _newton_schulz(
    matrices: Tensor, exponent: float, eps: float, eps_relative: float | None
) -> Root:
    """Inverse root by repeated square roots, the last one inverted; matrix products only."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    unit = _units(matrices, eps if eps_relative is None else SMALLEST_DAMPING)
    matrices = matrices / unit
    norms = torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=SMALLEST_DAMPING)
    noise = torch.finfo(matrices.dtype).eps
    largest = _largest_eigenvalues(matrices / norms)
    relative = eps / unit / norms if eps_relative is None else eps_relative * largest
    # Below the rounding of the largest eigenvalue there is nothing to take a root of.
    relative = relative.maximum(noise * largest).clamp(min=SMALLEST_DAMPING)
    root = matrices / norms + relative * identity
    scale = 1 / (1 + relative)  # of norm 1 at most, eigenvalues at least the damping
    damped = root = root * scale
    smallest = relative * scale
    bound = smallest.pow(-exponent)
    for _ in range(halvings(exponent) - 1):
        root, _ = _square_roots(root, smallest, noise)
        smallest = smallest.sqrt()
    _, inverse = _square_roots(root, smallest, noise)
    condition = _estimated_condition(damped, inverse, exponent)
    # With a negative eigenvalue the iteration may end at something large that is no root.
    size = inverse.abs().amax((-2, -1), keepdim=True)
    inverse = torch.where(size <= 1.5 * bound, inverse, torch.nan)
    return Root(inverse * (scale / norms) ** exponent / unit**exponent, condition)


def _largest_eigenvalues(matrices: Tensor, iterations: int = POWER_ITERATIONS) -> Tensor:
    """Rayleigh quotients after some power iterations, ``(n, 1, 1)``: good to a few percent."""
    vectors = matrices.sum(-1, keepdim=True) + matrices.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    for _ in range(iterations):
        vectors = torch.nn.functional.normalize(matrices @ vectors, dim=-2)
    return vectors.mT @ matrices @ vectors


def _square_roots(matrices: Tensor, smallest: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """``A^(1/2)`` and ``A^(-1/2)`` of matrices with eigenvalues in ``[smallest, 1]``.

    ``T = (3 a I - a^3 Z Y) / 2, Y <- Y T, Z <- T Z`` with the ``a`` that lifts the smallest
    singular value most; as many iterations as eigenvalues at the rounding need, so that no host has
    to look.
    """
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    root, inverse = matrices, identity.expand_as(matrices)
    low, slowest = smallest.sqrt(), math.sqrt(noise)
    while True:
        scale = (3 / (1 + low + low * low)).sqrt()
        factor = 1.5 * scale * identity - 0.5 * scale**3 * (inverse @ root)
        root, inverse = root @ factor, factor @ inverse
        low = (0.5 * scale * low * (3 - (scale * low) ** 2)).clamp(max=1.0)
        if slowest > 1 - noise:
            return root, inverse
        worst = math.sqrt(3 / (1 + slowest + slowest**2))
        slowest = min(1.0, 0.5 * worst * slowest * (3 - (worst * slowest) ** 2))


def floored_inverse_root(matrices: Tensor, exponent: float, *, floor: float) -> Root:
    """``A^(-exponent)`` with eigenvalues raised to ``floor`` times the largest."""
    values, vectors = eigh(matrices)
    smallest = not_nothing(floor * values[:, -1:])
    return _root_of(values.maximum(smallest), vectors, exponent)


def tracked_eigenvalues(matrices: Tensor, basis: Tensor) -> Tensor:
    """Rayleigh quotients ``diag(Q^T A Q)``, ``(n, d)``: eigenvalues if ``Q`` is the eigenbasis."""
    return (basis * (matrices @ basis)).sum(-2)


def next_basis(
    matrices: Tensor,
    previous: Tensor,
    ready: Tensor | bool,
    *,
    method: BasisMethod,
    degenerate: Degenerate = "previous",
) -> tuple[Tensor, Tensor]:
    """Orthonormal eigenvectors of each matrix, in columns, ``(n, d, d)``, and eigenvalues.

    The first ones are always found by eigendecomposition: one QR step from the identity finds none.
    The eigenvalues of ``"qr"``, ``(n, d)``, are those that ``previous`` sees, in any order.

    Args:
        matrices: Symmetric positive semi-definite, ``(n, d, d)``.
        previous: Basis of the last refresh, the identity before the first, ``(n, d, d)``.
        ready: Which matrices have had a refresh, ``(n,)`` bool, or one answer for all.
        method: ``"eigh"``, or ``"qr"`` for one step of orthogonal iteration.
        degenerate: ``"previous"``: among zero or equal eigenvalues ``previous`` decides (see
            ``functional.degenerate``); ``"arbitrary"``: rounding does.
    """
    if method == "eigh" or ready is False:
        return _eigenbasis(matrices, previous, degenerate)
    turned, seen = _orthogonal_iteration(matrices, previous, degenerate)
    if ready is True or bool(ready.all()):
        return turned, seen
    fresh = (~ready).nonzero().flatten()
    turned[fresh], seen[fresh] = _eigenbasis(matrices[fresh], previous[fresh], degenerate)
    return turned, seen


def _eigenbasis(
    matrices: Tensor, previous: Tensor, degenerate: Degenerate
) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues, these in ascending order."""
    values, vectors = eigh(matrices)
    if degenerate == "previous":
        vectors = settled(values, vectors, previous)
    return vectors, values


def _orthogonal_iteration(
    matrices: Tensor, previous: Tensor, degenerate: Degenerate
) -> tuple[Tensor, Tensor]:
    """``qr(A Q)``, with columns in the order of the eigenvalues that ``Q`` sees, and these."""
    product = matrices @ previous
    seen = (previous * product).sum(-2)
    if degenerate == "previous":
        product, order = shifted(product, previous), ordered(seen)
    else:
        order = seen.argsort(dim=-1, descending=True)
    columns = product.gather(-1, order.unsqueeze(-2).expand_as(product))
    basis, _ = side_by_side(torch.linalg.qr, columns)
    return basis, seen
