"""Eva, Eva-f and Eva-s (Zhang et al. 2023, arXiv 2308.02123): curvature that is one outer product.

By Sherman-Morrison all three are the gradient without a multiple of one outer product ``V``, over
the damping ``y``: ``P = (G - c V) / y``. With ``a`` the mean input of the layer, ``b`` the sum of
the gradients at its output and ``v_j`` the mean of G over all dims but ``j``

    Eva      V = b a^T               c = <G, V> / (y + |V|^2)
    Eva-f    V = (G a) a^T           c = 1 / (y + |a|^2)
    Eva-s    V = v_1 x v_2 x ...     c = <G, V> / (y + |V|^2)

so that three scalars of a layer give ``<P, G>`` and ``|P|^2`` without another pass over a matrix.

For gradients ``c`` times as large, ``|V|^2`` of Eva-s of order ``k`` is ``c^(2 k)`` times as large:
float32 holds that of no gradient below 1e-5. Hence scalars are float64, and its vectors of columns
are means of the gradient in units of its root mean square.
"""

import math
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

    def inner(self) -> Tensor:
        """``<P, G> = (|G|^2 - c <G, V>) / y``, at least zero."""
        return self.undamped_inner() / self.damping

    def direction_square(self) -> Tensor:
        """``|P|^2 = (|G|^2 - 2 c <G, V> + c^2 |V|^2) / y^2``."""
        return self.undamped_square() / self.damping**2

    def undamped_inner(self) -> Tensor:
        """``<y P, G>``, at least zero."""
        product = self.grad_square - self.coefficient * self.overlap
        return product.clamp(min=0)  # zero at most by rounding

    def undamped_square(self) -> Tensor:
        """``|y P|^2``, which has no power of the damping that may leave the range of floats."""
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


def eva(grad: Tensor, input_mean: Tensor, output_sum: Tensor, *, damping: float) -> Tensor:
    """Solve ``(b b^T kron a a^T + y I) x = grad``.

    Args:
        grad: Gradient of the mean loss, ``(d_out, d_in)``, or of any shape ``(d_out, ...)``.
        input_mean: ``a``, ``(d_in,)``.
        output_sum: ``b``, ``(d_out,)``.
        damping: ``y``, greater than zero.
    """
    return _undamped("input_output", grad, output_sum, input_mean, damping) / damping


def eva_f(grad: Tensor, input_mean: Tensor, *, damping: float) -> Tensor:
    """``grad (a a^T + y I)^-1``; arguments as for :func:`eva`."""
    left = grad.flatten(1) @ input_mean
    return _undamped("input", grad, left, input_mean, damping) / damping


def eva_s(grad: Tensor, *, damping: float) -> Tensor:
    """Solve ``(kron_j v_j v_j^T + y I) x = grad``; scaled to the length of ``grad``.

    Args:
        grad: ``(d_1, ..., d_k)``.
        damping: ``y``, greater than zero.
    """
    unit = root_mean_square(grad.square().sum(), grad.numel())
    scaled = grad / unit
    vectors = marginal_means(scaled)
    in_units = damping / unit.double() ** (2 * grad.ndim)
    undamped = _undamped("gradient", scaled, vectors[0], outer(vectors[1:]), in_units)
    length = undamped.norm()
    return undamped * torch.where(length > 0, grad.norm() / length, 1.0)


def root_mean_square(square: Tensor, numel: int | Tensor) -> Tensor:
    """``|G| / sqrt(numel)``, greater than zero: 1 where the gradient is zero.

    Args:
        square: ``|G|^2``.
        numel: Elements of G.
    """
    return torch.where(square > 0, square.sqrt() / numel**0.5, 1.0)


def _undamped(
    curvature: Curvature, grad: Tensor, left: Tensor, right: Tensor, damping: float | Tensor
) -> Tensor:
    """``G - c left right^T``, of the shape of ``grad``."""
    matrix = grad.reshape(grad.shape[0], math.prod(grad.shape[1:]))
    found = terms(
        curvature,
        grad_square=matrix.square().sum().double(),
        overlap=(left @ matrix @ right).double(),
        left_square=(left @ left).double(),
        right_square=(right @ right).double(),
        damping=torch.as_tensor(damping, dtype=torch.float64, device=grad.device),
    )
    coefficient = found.coefficient.to(grad.dtype)
    return torch.addr(matrix, left * coefficient, right, alpha=-1).view_as(grad)


def marginal_means(grad: Tensor) -> list[Tensor]:
    """Means of ``grad`` over all dims but one, for each dim: ``(d_j,)``; ones for none."""
    return [total * (total.numel() / max(1, grad.numel())) for total in marginal_sums(grad)]


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
