"""Blocked Shampoo (Gupta et al. 2018; Shi et al. 2023, arXiv 2309.06497) on stacks of equal blocks.

Each dim of a block has a factor, the running sum of squares of the gradient unfolded along that
dim; the direction is the filtered gradient contracted with an inverse root of every factor.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from titan_shampoo.functional.factors import (
    accumulate_factors_,
    active_factors,
    contract,
    product_cost,
    root_exponents,
)
from titan_shampoo.functional.grafting import (
    accumulate_squares_,
    diagonal_beta2,
    grafted_direction,
)
from titan_shampoo.functional.roots import (
    inverse_root,
    next_basis,
    root_from_eigenvalues,
    tracked_eigenvalues,
)
from titan_shampoo.functional.rule import (
    Clock,
    State,
    StateShape,
    bias_correction,
    per_block,
    power,
)

TINY_NORM = 1e-16


class ShampooRule:
    """The mathematics of Shampoo; options are read from the parameter group at every call."""

    name = "shampoo"
    rests_at_first = False

    def state_shapes(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[StateShape]:
        """Factors and roots of each dim, filtered gradient and grafting moments of a block."""
        shapes = []
        for dim, name in active_factors(shape, options):
            square = (shape[dim], shape[dim])
            # Should the very first refresh of a block fail, its direction is the grafted gradient.
            root = StateShape(f"{name}_root", square, dim, starts_as_identity=True)
            shapes += [StateShape(name, square, dim), root]
            if options.get("root_method") == "qr":
                shapes.append(StateShape(f"{name}_basis", square, dim, starts_as_identity=True))
        if options["betas"][0] > 0:
            shapes.append(StateShape("exp_avg", shape))
        if options["grafting"] in ("adagrad", "rmsprop", "adam"):
            shapes.append(StateShape("exp_avg_sq", shape))
        return shapes

    def cost(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[float, float]:
        """Floating-point operations (in every step, in a refresh) for one block."""
        dims = [dim for dim, _ in active_factors(shape, options)]
        step = 2 * product_cost(shape, dims) + 20.0 * math.prod(shape)
        return step, sum(25.0 * shape[dim] ** 3 for dim in dims)

    def accumulate_(
        self, state: State, grad: Tensor, step: Tensor, options: Mapping[str, Any]
    ) -> None:
        """Add the gradient to the factor of every dim.

        Args:
            state: Tensors named by :meth:`state_shapes`, ``(n, ...)`` each.
            grad: ``(n, *block)``.
            step: Step of each block, counted from 1, ``(n,)`` int64.
            options: Parameter group.
        """
        accumulate_factors_(state, grad, options)

    def refresh(
        self,
        state: State,
        due: Tensor,
        clock: Clock,
        shape: tuple[int, ...],
        options: Mapping[str, Any],
    ) -> State:
        """New inverse roots ``(L_k / bc2 + eps I)^(-exponent)`` of the blocks that are due.

        Args:
            state: As for :meth:`accumulate_`.
            due: Positions of the blocks in the stack, ``(k,)`` int64.
            clock: Their steps, and which of them have roots already.
            shape: Shape of a block.
            options: Parameter group.
        """
        beta2 = options["betas"][1]
        exponents = root_exponents(shape, options)
        damping = {"eps": options["eps"], "eps_relative": options["eps_relative"]}
        new: State = {}
        for dim, name in active_factors(shape, options):
            factor, exponent = state[name][due], exponents[dim]
            if options["bias_correction"] and beta2 < 1:
                factor = factor / bias_correction(beta2, clock.step, factor)
            if options["root_method"] == "qr":
                old = state[f"{name}_basis"][due]
                basis = next_basis(factor, old, clock.ready, method="qr")
                values = tracked_eigenvalues(factor, basis)
                new[f"{name}_basis"] = basis
                new[f"{name}_root"] = root_from_eigenvalues(values, basis, exponent, **damping)
            else:
                method = options["root_method"]
                new[f"{name}_root"] = inverse_root(factor, exponent, method=method, **damping)
        return new

    def direction(
        self,
        state: State,
        grad: Tensor,
        clock: Clock,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Preconditioned, grafted direction ``(n, *block)``; the grafted method's until ``ready``.

        Args:
            state: As for :meth:`accumulate_`; filtered gradient and moments are updated in place.
            grad: ``(n, *block)``.
            clock: Steps, and which blocks have roots.
            options: Parameter group.
        """
        average, scale = self._filtered(state, grad, clock.step, options)
        graft = self._graft(state, grad, average, clock.step, options)
        fallback = average if graft is None else graft
        if clock.ready is False:
            return fallback * scale
        direction = average
        for dim, name in active_factors(grad.shape[1:], options):
            direction = contract(direction, state[f"{name}_root"], dim)
        length = scale
        if graft is not None:
            length = scale * (scale * _norms(graft)) / (scale * _norms(direction) + TINY_NORM)
        if clock.ready is True:
            return direction * length
        ready = per_block(clock.ready, grad)
        return torch.where(ready, direction * length, fallback * scale)

    def _filtered(
        self, state: State, grad: Tensor, step: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The gradient averaged by beta1 (and beta3), and the factor that corrects its bias.

        The factor is applied to the direction, which saves a pass over memory.
        """
        beta1, beta3 = options["betas"][0], options["beta3"]
        one = per_block(torch.ones_like(step, dtype=grad.dtype), grad)
        if beta1 == 0:
            return grad, one
        average = state["exp_avg"]
        if beta3 is None or beta3 == beta1:
            beta3 = beta1
            filtered = average.lerp_(grad, 1 - beta1)
        else:
            filtered = torch.lerp(average, grad, 1 - beta3)
            average.lerp_(grad, 1 - beta1)
        if not options["bias_correction"]:
            return filtered, one
        return filtered, 1 / (1 - beta3 * power(beta1, step - 1, grad))

    def _graft(
        self,
        state: State,
        grad: Tensor,
        filtered: Tensor,
        step: Tensor,
        options: Mapping[str, Any],
    ) -> Tensor | None:
        method = options["grafting"]
        if method is None:
            return None
        beta2 = diagonal_beta2(options)
        squares = state.get("exp_avg_sq")
        if squares is not None:
            accumulate_squares_(squares, grad, method, beta2)
        correction = bias_correction(beta2, step, grad)
        return grafted_direction(
            filtered, squares, correction, method=method, eps=options["grafting_eps"]
        )


def _norms(blocks: Tensor) -> Tensor:
    return torch.linalg.vector_norm(blocks, dim=tuple(range(1, blocks.ndim)), keepdim=True)
