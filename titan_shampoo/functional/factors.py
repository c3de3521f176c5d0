"""Kronecker factors of blocks: one symmetric matrix per dim, collected and applied.

For a matrix G these are L = sum G G^T on the left and R = sum G^T G on the right; blocks of any
other number of dims have one factor per dim (Gupta et al. 2018, section 4).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from titan_shampoo.block_memory import from_memory_order, in_memory_order, memory_order
from titan_shampoo.functional.rule import Clock, State, StateShape
from titan_shampoo.functional.symmetric import packed_numel, slab_views, slabs


def accumulate_factors_(
    state: State, grad: Tensor, clock: Clock, options: Mapping[str, Any]
) -> None:
    """``L_k <- beta2 L_k + (1 - beta2) unfold_k(G) unfold_k(G)^T`` for every dim ``k``, in place.

    Args:
        state: Holds the factors, packed; with ``beta2 = 1`` they are sums.
        grad: ``(n, *block)``.
        clock: Whether the step is taken.
        options: Parameter group.
    """
    grad = measured(grad, clock)
    for dim, name in active_factors(grad.shape[1:], options):
        average_squares_(state[name], unfold(grad, dim), options["betas"][1], clock)


def measured(values: Tensor, clock: Clock) -> Tensor:
    """Those of the blocks whose factors take this gradient, ``(k, ...)``."""
    return values if clock.measured is None else values[clock.measured]


def average_squares_(
    factor: Tensor, rows: Tensor, beta2: float, clock: Clock, scale: float = 1.0
) -> None:
    """``L <- beta2 L + (1 - beta2) scale U U^T``, in place; ``beta2 = 1`` sums.

    Args:
        factor: Packed, ``(n, packed_numel(d))``.
        rows: ``U`` of the measured blocks, ``(k, d, m)``, or several, ``(k, s, d, m)``, whose
            squares are added; zero in a step that is not taken.
        beta2: In (0, 1].
        clock: Which blocks are measured, and whether the step is taken.
        scale: Greater than zero.
    """
    extent = rows.shape[-2]
    rate = clock.rate(beta2, factor)
    chosen = measured(factor, clock)
    for slab, (start, stop) in zip(slab_views(chosen, extent), slabs(extent), strict=True):
        # Not baddbmm: of a slab, whose matrices do not follow each other in memory, a CPU would
        # make one small product after the other. Nor addmm for one block alone: which blocks are
        # together depends on the layout, and results must not, where eigenvalues are equal.
        squares = rows[..., start:, :] @ rows[..., start:stop, :].mT
        if squares.ndim > 3:
            squares = squares.sum(1)
        if beta2 == 1.0:
            slab.add_(squares, alpha=scale)
        else:
            slab.lerp_(squares if scale == 1.0 else squares.mul_(scale), rate)
    if clock.measured is not None:
        factor[clock.measured] = chosen


def factor_shapes(
    shape: tuple[int, ...], options: Mapping[str, Any], *, start_as_identity: bool = False
) -> list[StateShape]:
    """State that holds the packed factor of each dim that is preconditioned."""
    return [
        StateShape(name, (packed_numel(shape[dim]),), dim, shape[dim], start_as_identity)
        for dim, name in active_factors(shape, options)
    ]


def product_cost(shape: Sequence[int], dims: Sequence[int]) -> float:
    """Floating-point operations of one product of a block with a matrix along each of ``dims``."""
    return sum(2.0 * math.prod(shape) * shape[dim] for dim in dims)


def square_cost(shape: Sequence[int], dims: Sequence[int]) -> float:
    """Floating-point operations of adding a block to the factors of ``dims``."""
    return sum(2.0 * math.prod(shape) / shape[dim] * packed_numel(shape[dim]) for dim in dims)


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
    """Matrices with ``dim`` as rows whose squares make up that of a block.

    Views, of blocks that lie as ``block_memory`` has it:
    ``(n, d_dim, product of the others)``, or of a dim between others in memory
    ``(n, product of the outer ones, d_dim, product of the inner ones)``.
    """
    parts, is_last = _around(in_memory_order(grad), memory_order(grad.shape[1:]).index(dim))
    return parts.mT if is_last else parts


def contract(blocks: Tensor, matrices: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Each block multiplied by its matrix along each of some dims: ``(n, *block)``.

    The products are made in the precision of the matrices.

    Args:
        blocks: ``(n, *block)``.
        matrices: Pairs (dim of the block, ``(n, d_dim, d_dim)``).
    """
    order = memory_order(blocks.shape[1:])
    product = in_memory_order(blocks)
    shape = product.shape
    for dim, matrix in matrices:
        parts, is_last = _around(product.view(shape).to(matrix.dtype), order.index(dim))
        if is_last:
            product = parts @ matrix.mT
        else:
            product = (matrix if parts.ndim == 3 else matrix.unsqueeze(1)) @ parts
    return from_memory_order(product.view(shape), order).to(blocks.dtype)


def _around(lying: Tensor, place: int) -> tuple[Tensor, bool]:
    """Blocks as matrices around the dim at ``place`` in memory, and whether it is the columns.

    Where it is first, ``(n, d, inner)``; last, ``(n, outer, d)``; else ``(n, outer, d, inner)``.
    """
    if lying.ndim == 2:
        return lying.unsqueeze(-1), False
    if place == 0:
        return lying.flatten(2), False
    if place == lying.ndim - 2:
        return lying.flatten(1, -2), True
    return lying.flatten(place + 2).flatten(1, place), False
