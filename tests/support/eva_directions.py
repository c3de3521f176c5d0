"""Directions of Eva, Eva-f and Eva-s for one matrix, by the terms that the library uses.

The library never stores a direction: it moves weights by the gradient and an outer product.
"""

import math

import torch
from torch import Tensor

from titan_shampoo.functional.eva import (
    Curvature,
    marginal_sums,
    outer,
    root_mean_square,
    terms,
)


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
