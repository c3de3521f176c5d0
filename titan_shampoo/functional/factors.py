"""Kronecker factors of blocks: one symmetric matrix per dim, collected and applied.

For a matrix G these are L = sum G G^T on the left and R = sum G^T G on the right; blocks of any
other number of dims have one factor per dim (Gupta et al. 2018, section 4).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from titan_shampoo.functional.rule import State


def accumulate_factors_(state: State, grad: Tensor, options: Mapping[str, Any]) -> None:
    """``L_k <- beta2 L_k + (1 - beta2) unfold_k(G) unfold_k(G)^T`` for every dim ``k``, in place.

    Args:
        state: Holds the factors, ``(n, d_k, d_k)`` each; with ``beta2 = 1`` they are sums.
        grad: ``(n, *block)``.
        options: Parameter group.
    """
    for dim, name in active_factors(grad.shape[1:], options):
        average_squares_(state[name], unfold(grad, dim), options["betas"][1])


def average_squares_(factor: Tensor, rows: Tensor, beta2: float, scale: float = 1.0) -> None:
    """``L <- beta2 L + (1 - beta2) scale U U^T``, in place; ``beta2 = 1`` sums.

    Args:
        factor: ``(n, d, d)``.
        rows: ``(n, d, m)``.
        beta2: In (0, 1].
        scale: Greater than zero.
    """
    weight = 1.0 if beta2 == 1.0 else 1.0 - beta2
    factor.baddbmm_(rows, rows.mT, beta=beta2, alpha=weight * scale)


def product_cost(shape: Sequence[int], dims: Sequence[int]) -> float:
    """Floating-point operations of one product of a block with a matrix along each of ``dims``."""
    return sum(2.0 * math.prod(shape) * shape[dim] for dim in dims)


def active_factors(shape: Sequence[int], options: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Pairs (dim, name of its factor) of the dims that are preconditioned."""
    exponents = root_exponents(shape, options)
    names = ("left", "right") if len(shape) <= 2 else [f"factor{dim}" for dim in range(len(shape))]
    return [(dim, name) for dim, (name, e) in enumerate(zip(names, exponents, strict=False)) if e]


def root_exponents(shape: Sequence[int], options: Mapping[str, Any]) -> list[float]:
    """Positive power of the inverse root for each dim: ``1 / (2 order)`` unless overridden."""
    exponent = options.get("exponent")
    if exponent is None:
        return [1 / (2 * len(shape))] * len(shape)
    if isinstance(exponent, (int, float)):
        return [float(exponent)] * len(shape)
    return [float(e) for e in exponent][: len(shape)]


def unfold(grad: Tensor, dim: int) -> Tensor:
    """Blocks as matrices with ``dim`` as rows: ``(n, d_dim, product of the others)``."""
    if grad.ndim == 2:
        return grad.unsqueeze(-1)
    return grad.movedim(dim + 1, 1).flatten(2)


def contract(blocks: Tensor, matrices: Tensor, dim: int) -> Tensor:
    """Each block multiplied by its matrix along ``dim``: ``(n, *block)``.

    Args:
        blocks: ``(n, *block)``.
        matrices: ``(n, d_new, d_dim)``.
        dim: Dim of the block.
    """
    if blocks.ndim == 3 and dim == 1:
        return blocks @ matrices.mT
    product = matrices @ unfold(blocks, dim)
    rest = [size for d, size in enumerate(blocks.shape[1:]) if d != dim]
    return product.reshape(*product.shape[:2], *rest).movedim(1, dim + 1)
