"""Eva, Eva-f and Eva-s (Zhang et al. 2023, arXiv 2308.02123): curvature that is one outer product.

By Sherman-Morrison all three are the gradient without a multiple of one outer product ``V``, over
the damping ``y``: ``P = (G - c V) / y``. With ``a`` the mean input of the layer, ``b`` the sum of
the gradients at its output and ``v_j`` the mean of G over all dims but ``j``

    Eva      V = b a^T               c = <G, V> / (y + |V|^2)
    Eva-f    V = (G a) a^T           c = 1 / (y + |a|^2)
    Eva-s    V = v_1 x v_2 x ...     c = <G, V> / (y + |V|^2)

so that three scalars of a layer give ``<y P, G>`` and ``|y P|^2`` without another pass over G.

For gradients ``c`` times as large, ``|V|^2`` of Eva-s of order ``k`` is ``c^(2 k)`` times as large:
float32 holds that of no gradient below 1e-5. Hence scalars are float64, and its vectors of columns
are means of the gradient in units of its root mean square.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Curvature = Literal["input_output", "input", "gradient"]
"""Whose outer product the curvature is: Eva's, Eva-f's, Eva-s's."""


class Terms(NamedTuple):
    """The scalars of each layer from which everything else follows, ``(layers,)`` each."""

    grad_square: Tensor
    """``|G|^2``."""
    overlap: Tensor
    """``<G, V>``."""
    square: Tensor
    """``|V|^2``."""
    coefficient: Tensor
    """``c``."""
    damping: Tensor
    """``y``, greater than zero."""

    def undamped_inner(self) -> Tensor:
        """``<y P, G> = |G|^2 - c <G, V>``, at least zero."""
        product = self.grad_square - self.coefficient * self.overlap
        return product.clamp(min=0)  # zero at most by rounding

    def undamped_square(self) -> Tensor:
        """``|y P|^2 = |G|^2 - 2 c <G, V> + c^2 |V|^2``; ``|P|^2`` may leave the range of floats."""
        cross = self.coefficient * (self.coefficient * self.square - 2 * self.overlap)
        return (self.grad_square + cross).clamp(min=0)

    def cosine(self) -> Tensor:
        """Cosine of the angle between P and G; 1 where the gradient is zero."""
        lengths = self.grad_square.sqrt() * self.undamped_square().sqrt()
        return torch.where(lengths > 0, self.undamped_inner() / lengths, 1.0)


def curvature_square(curvature: Curvature, left_square: Tensor, right_square: Tensor) -> Tensor:
    """The only eigenvalue of the curvature that is not zero, which is what damping is added to.

    Args:
        curvature: Of which method.
        left_square: ``|v|^2`` of the vector of the rows.
        right_square: ``|v|^2`` of the vector of the columns.
    """
    return right_square if curvature == "input" else left_square * right_square


def terms(
    curvature: Curvature,
    grad_square: Tensor,
    overlap: Tensor,
    left_square: Tensor,
    right_square: Tensor,
    damping: Tensor,
) -> Terms:
    """The terms of layers whose ``V`` is ``left right^T``.

    Args:
        curvature: Of which method.
        grad_square: ``|G|^2``, ``(layers,)`` as all others.
        overlap: ``left^T G right``.
        left_square: ``|left|^2``.
        right_square: ``|right|^2``.
        damping: Greater than zero.
    """
    denominator = damping + curvature_square(curvature, left_square, right_square)
    coefficient = (1.0 if curvature == "input" else overlap) / denominator
    return Terms(grad_square, overlap, left_square * right_square, coefficient, damping)


def root_mean_square(square: Tensor, numel: int | Tensor) -> Tensor:
    """``|G| / sqrt(numel)``, greater than zero: 1 where the gradient is zero.

    Args:
        square: ``|G|^2``.
        numel: Elements of G.
    """
    return torch.where(square > 0, square.sqrt() / numel**0.5, 1.0)


def marginal_sums(grad: Tensor, *, batch_dims: int = 0) -> list[Tensor]:
    """Sums of ``grad`` over all dims but one, for each dim: ``(d_j,)``.

    Args:
        grad: ``(..., d_1, ..., d_k)``.
        batch_dims: Leading dims, which all sums keep.
    """
    dims = range(batch_dims, grad.ndim)
    if len(dims) == 1:
        return [grad]
    return [grad.sum([other for other in dims if other != dim]) for dim in dims]


def outer(vectors: list[Tensor]) -> Tensor:
    """The outer product of vectors ``(..., d_j)``, flat, ``(..., d_1 d_2 ...)``."""
    product = vectors[0]
    for vector in vectors[1:]:
        product = (product[..., :, None] * vector[..., None, :]).flatten(-2)
    return product


def running_average_(
    average: Tensor, new: Tensor, count: Tensor, rows: Tensor, decay: Tensor
) -> Tensor:
    """``m <- decay m + (1 - decay) new`` in place, the first value as it is, none without rows.

    Args:
        average: ``(n,)``.
        new: ``(n,)``.
        count: Values averaged so far, ``(n,)``.
        rows: How many rows ``new`` was made of, ``(n,)``; nothing changes where there are none.
        decay: Weight of the old value, in [0, 1), ``(n,)``.
    """
    weight = torch.where(count == 0, 1.0, 1 - decay)
    step = torch.where(rows > 0, new - average, 0)
    return average.addcmul_(weight.to(average.dtype), step)
