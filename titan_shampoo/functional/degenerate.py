"""Eigenbases that rounding does not decide, where eigenvalues are zero or equal.

Any orthonormal basis of such a space is one of eigenvectors. LAPACK returns one that follows from
rounding: gradients that are summed in another order give another. Here the previous basis decides.

A first basis, or one found anew: among eigenvalues equal to rounding, the vectors diagonalise
``Q W Q^T`` of the previous basis ``Q``, with fixed weights ``W``. If ``Q`` is one of eigenvectors
already, it stays. One step of orthogonal iteration: ``qr(A Q + Q M)``, where the diagonal ``M`` is
small beside each column of ``A Q``. A column that depends on others keeps its direction in ``Q``.
"""

import torch
from torch import Tensor

RELATIVE_SHIFT = 1e-2
"""Entry of ``M`` relative to the length of its column of ``A Q``.

Rounding in dependent columns grows by its inverse. Eigenvectors ``i, j`` are told apart at the rate
``lambda_j / lambda_i`` plus this.
"""
SMALLEST_SHIFT = 1e-6
"""The same relative to the longest column, at least: in a null space columns are rounding."""
ORDER_DIGITS = 2.0**20
"""Rayleigh quotients that differ by less, relative to the largest, keep their order."""


def tie(dtype: torch.dtype) -> float:
    """How far apart, relative to the largest, eigenvalues are equal: far above rounding.

    >>> f"{tie(torch.float64):.0e} {tie(torch.float32):.0e}"
    '2e-12 6e-06'
    """
    return float(torch.finfo(dtype).eps ** 0.75)


def settled(values: Tensor, vectors: Tensor, previous: Tensor) -> Tensor:
    """Eigenvectors as the previous basis decides among equal eigenvalues, ``(n, d, d)``.

    Args:
        values: Eigenvalues in ascending order, ``(n, d)``.
        vectors: Any eigenvectors, in columns, ``(n, d, d)``.
        previous: Orthonormal basis, ``(n, d, d)``.
    """
    clusters = _clusters(values)
    is_tied = clusters[:, 1:] == clusters[:, :-1]
    # Decompositions made the host wait for the device; it does not wait longer for this.
    tied = is_tied.nonzero()
    if not len(tied):
        return vectors
    chosen, last = tied[:, 0].unique(), int(tied[:, 1].max()) + 2
    some, own = vectors[chosen], clusters[chosen, :last]
    # In double precision: weights of a thousand vectors differ by a millionth.
    seen = (some[..., :last].mT @ previous[chosen]).double()
    extent = values.shape[-1]
    numbers = torch.arange(1, extent + 1, dtype=seen.dtype, device=seen.device)
    weights = (numbers / extent).sqrt()
    inside = own.unsqueeze(-1) == own.unsqueeze(-2)
    weighted = ((seen * weights) @ seen.mT) * inside
    weighted.diagonal(dim1=-2, dim2=-1).add_(2.0 * own)  # clusters stay apart, and in their order
    turns = torch.linalg.eigh(weighted)[1] * inside
    settled = vectors.clone()
    settled[chosen, :, :last] = some[..., :last] @ turns.to(vectors.dtype)
    return settled


def _clusters(values: Tensor) -> Tensor:
    """Number of the cluster of each eigenvalue, counted from 0, ``(n, d)`` int64.

    Neighbours closer than the tie are in one chain. A chain longer than the tie is cut into pieces
    of that length: the small eigenvalues of a large factor are dense, and not all equal.
    """
    width = tie(values.dtype) * values.abs().amax(1, keepdim=True)
    is_new = torch.ones_like(values, dtype=torch.bool)
    is_new[:, 1:] = values.diff() > width
    lowest = values.amin(1, keepdim=True)
    start = torch.where(is_new, values, lowest).cummax(1).values
    piece = ((values - start) / width).nan_to_num().floor()
    is_new[:, 1:] |= piece.diff() != 0
    return is_new.long().cumsum(1) - 1


def shifted(product: Tensor, previous: Tensor) -> Tensor:
    """``A Q + Q M`` over the largest entry of ``A Q``, ``(n, d, d)``.

    Args:
        product: ``A Q``, ``(n, d, d)``.
        previous: ``Q``, orthonormal.
    """
    largest = product.abs().amax((-2, -1), keepdim=True)
    product = product / torch.where(largest > 0, largest, 1.0)  # squares stay in range
    lengths = torch.linalg.vector_norm(product, dim=-2, keepdim=True)
    least = SMALLEST_SHIFT * lengths.amax(-1, keepdim=True)
    least = torch.where(least > 0, least, 1.0)  # the basis of nothing stays
    return torch.addcmul(product, previous, torch.maximum(RELATIVE_SHIFT * lengths, least))


def ordered(quotients: Tensor) -> Tensor:
    """Positions of Rayleigh quotients, the largest first, equal ones as they are, ``(n, d)``."""
    largest = quotients.amax(-1, keepdim=True)
    digits = (quotients / largest * ORDER_DIGITS).round()
    return digits.argsort(dim=-1, descending=True, stable=True)
