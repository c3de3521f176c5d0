"""KL-Shampoo (Lin et al. 2025): each factor collects the gradient whitened by the others.

``L <- beta2 L + (1 - beta2) G R^-1 G^T / i``, and likewise R: the Gaussian with a
Kronecker-structured covariance that is nearest in Kullback-Leibler divergence. The direction is
``L^(-1/2) G R^(-1/2)``.

Factors begin as the identity in units of the first gradient: their product is its mean square. The
identity itself may be a million times what they collect, and outlasts hundreds of steps.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from titan_shampoo.functional.factors import (
    active_factors,
    average_squares_,
    contract,
    measured,
    product_cost,
    unfold,
)
from titan_shampoo.functional.roots import floored_inverse_root
from titan_shampoo.functional.rule import Clock, State, StateShape, worst
from titan_shampoo.functional.shampoo import ShampooRule
from titan_shampoo.functional.symmetric import unpack

EIGENVALUE_FLOOR = 1e-6
"""Smallest eigenvalue that counts, relative to the largest."""


class KLShampooRule(ShampooRule):
    """The mathematics of KL-Shampoo: other factors and roots than Shampoo's, the same direction."""

    name = "kl_shampoo"

    def state_shapes(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[StateShape]:
        """As Shampoo's, but factors and roots start as the identity."""
        shapes = super().state_shapes(shape, options)
        return [s._replace(starts_as_identity=s.dim is not None) for s in shapes]

    def cost(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[float, float]:
        """As Shampoo's, and the products that precondition the gradient for every other factor."""
        step, refresh = super().cost(shape, options)
        dims = [dim for dim, _ in active_factors(shape, options)]
        return step + (len(dims) - 1) * product_cost(shape, dims), refresh

    def accumulate_(
        self, state: State, grad: Tensor, clock: Clock, options: Mapping[str, Any]
    ) -> None:
        """``L_k <- beta2 L_k + (1 - beta2) U_k U_k^T / (elements of the other dims)``.

        ``U_k`` is the gradient contracted with the roots ``L_j^(-1/2)`` of the last refresh along
        all dims but ``k``, unfolded along ``k``.
        """
        shape = tuple(grad.shape[1:])
        dims = active_factors(shape, options)
        if clock.ready is not True:
            _rescale_first_(state, grad, clock, [name for _, name in dims])
        grad = measured(grad, clock)
        roots = {dim: measured(state[f"{name}_root"], clock) for dim, name in dims}
        for dim, name in dims:
            whitened = contract(
                grad, [(other, root) for other, root in roots.items() if other != dim]
            )
            scale = shape[dim] / math.prod(shape)
            average_squares_(state[name], unfold(whitened, dim), options["betas"][1], clock, scale)

    def refresh(
        self,
        state: State,
        due: Tensor,
        clock: Clock,
        shape: tuple[int, ...],
        options: Mapping[str, Any],
    ) -> State:
        """New roots ``L_k^(-1/2)`` of the blocks that are due, eigenvalues floored."""
        new: State = {}
        conditions = []
        for dim, name in active_factors(shape, options):
            factor = unpack(state[name][due], shape[dim])
            root, condition = floored_inverse_root(factor, 0.5, floor=EIGENVALUE_FLOOR)
            new[f"{name}_root"] = root
            conditions.append(condition)
        return new | worst(conditions)


def _rescale_first_(state: State, grad: Tensor, clock: Clock, names: list[str]) -> None:
    """Blocks in their first step: factors ``c I`` with ``c^(number of factors) = mean G^2``."""
    square = grad.square().flatten(1).mean(1)
    is_first = (clock.step == 1) & (square > 0)
    scale = torch.where(is_first, square, 1.0) ** (1 / len(names))
    for name in names:
        factor, root = state[name], state[f"{name}_root"]
        factor.mul_(scale.to(factor.dtype)[:, None])
        root.mul_(scale.rsqrt().to(root.dtype)[:, None, None])
