"""Blocked Shampoo (Gupta et al. 2018; Shi et al. 2023, arXiv 2309.06497) on stacks of equal blocks.

Each dim of a block has a factor, the running sum of squares of the gradient unfolded along that
dim; the direction is the filtered gradient contracted with an inverse root of every factor.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from titan_shampoo.block_memory import memory_order
from titan_shampoo.functional.factors import (
    accumulate_factors_,
    active_factors,
    contract,
    factor_shapes,
    measured,
    product_cost,
    root_exponents,
    square_cost,
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
from titan_shampoo.functional.rounding import average_
from titan_shampoo.functional.rule import (
    BEYOND,
    Clock,
    State,
    StateShape,
    bias_correction,
    per_block,
    power,
    worst,
)
from titan_shampoo.functional.symmetric import unpack

TINY_NORM = 1e-19
"""Smallest norm of a block of float32, whose square is the smallest number of that."""

NUM_MEASURED = StateShape("num_measured", ())
"""How many gradients the factors of a block have taken, where that is not its number of steps."""


class ShampooRule:
    """The mathematics of Shampoo; options are read from the parameter group at every call."""

    name = "shampoo"
    rests_at_first = False

    def state_shapes(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[StateShape]:
        """Factors and roots of each dim, filtered gradient and grafting moments of a block."""
        shapes = factor_shapes(shape, options)
        for dim, name in active_factors(shape, options):
            matrix = StateShape("", (shape[dim], shape[dim]), dim, shape[dim])
            # Should the very first refresh of a block fail, its direction is the grafted gradient.
            matrix = matrix._replace(starts_as_identity=True)
            shapes.append(matrix._replace(name=f"{name}_root", dtype_option="root_dtype"))
            if options.get("root_method") == "qr":
                shapes.append(matrix._replace(name=f"{name}_basis"))
        if options.get("factor_frequency", 1) > 1:
            shapes.append(NUM_MEASURED)
        moment = StateShape("", shape, dtype_option="state_dtype")
        if options["betas"][0] > 0:
            shapes.append(moment._replace(name="exp_avg"))
        if options["grafting"] in ("adagrad", "rmsprop", "adam"):
            shapes.append(moment._replace(name="exp_avg_sq"))
        return shapes

    def cost(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[float, float]:
        """Floating-point operations (in every step, in a refresh) for one block."""
        dims = [dim for dim, _ in active_factors(shape, options)]
        factors = square_cost(shape, dims) / options.get("factor_frequency", 1)
        step = factors + product_cost(shape, dims) + 20.0 * math.prod(shape)
        return step, sum(25.0 * shape[dim] ** 3 for dim in dims)

    def accumulate_(
        self, state: State, grad: Tensor, clock: Clock, options: Mapping[str, Any]
    ) -> None:
        """Add the gradient to the factor of every dim.

        Args:
            state: Tensors named by :meth:`state_shapes`, ``(n, ...)`` each.
            grad: ``(n, *block)``.
            clock: Which blocks are measured.
            options: Parameter group.
        """
        accumulate_factors_(state, grad, clock, options)
        if NUM_MEASURED.name in state:
            count = state[NUM_MEASURED.name]
            new = measured(count, clock) + (1 if clock.taken is None else clock.taken)
            count[... if clock.measured is None else clock.measured] = new

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
        has_count = NUM_MEASURED.name in state
        count = state[NUM_MEASURED.name][due] if has_count else clock.step
        damping = {"eps": options["eps"], "eps_relative": options["eps_relative"]}
        new: State = {}
        conditions = []
        for dim, name in active_factors(shape, options):
            factor, exponent = unpack(state[name][due], shape[dim]), exponents[dim]
            if options["bias_correction"] and beta2 < 1:
                factor.div_(bias_correction(beta2, count, factor))
            if options["root_method"] == "qr":
                old = state[f"{name}_basis"][due]
                basis, _ = next_basis(factor, old, clock.ready, method="qr")
                values = tracked_eigenvalues(factor, basis)
                new[f"{name}_basis"] = basis
                root, condition = root_from_eigenvalues(values, basis, exponent, **damping)
            else:
                method = options["root_method"]
                root, condition = inverse_root(factor, exponent, method=method, **damping)
            new[f"{name}_root"] = root
            conditions.append(condition)
        return new | worst(conditions)

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
            grad: ``(n, *block)``; may become the direction.
            clock: Steps, and which blocks have roots.
            options: Parameter group.
        """
        average, scale = self._filtered(state, grad, clock, options)
        graft, graft_scale = self._graft(state, grad, average, scale, clock, options)
        if clock.ready is False:
            return self._matched(graft * graft_scale, options)
        dims = active_factors(grad.shape[1:], options)
        roots = [(dim, state[f"{name}_root"]) for dim, name in dims]
        # Symmetric: on the right the transpose of the transpose saves a slower kind of product.
        right = memory_order(grad.shape[1:])[-1]
        direction = contract(
            average, [(dim, root.mT if dim == right else root) for dim, root in roots]
        )
        if BEYOND in state:  # roots of another order: the direction may be a power of the gradient
            fits = _norms(direction).isfinite()
            state[BEYOND].logical_or_(~fits.flatten())
            direction = torch.where(fits, direction, 0.0)
        length = scale
        if options["grafting"] is not None:
            length = scale * (graft_scale * _norms(graft)) / (scale * _norms(direction) + TINY_NORM)
        if clock.ready is True:
            return self._matched(torch.mul(direction, length, out=grad), options)
        ready = per_block(clock.ready, grad)
        mixed = torch.where(ready, direction * length, graft * graft_scale)
        return self._matched(mixed, options)

    @staticmethod
    def _matched(direction: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Each block scaled to the root mean square that is asked for."""
        rms = options["match_rms"]
        if rms is None:
            return direction
        length = rms * math.sqrt(direction[0].numel())
        return direction * (length / (_norms(direction) + TINY_NORM))

    def _filtered(
        self, state: State, grad: Tensor, clock: Clock, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The gradient averaged by beta1 (and beta3), and the factor that corrects its bias.

        The factor is applied to the direction, which saves a pass over memory.
        """
        beta1, beta3 = options["betas"][0], options["beta3"]
        one = per_block(torch.ones_like(clock.step, dtype=grad.dtype), grad)
        if beta1 == 0:
            return grad, one
        if beta3 is None or beta3 == beta1:
            beta3 = beta1
            filtered = average_(state["exp_avg"], grad, clock.rate(beta1, grad), clock.step)
        else:
            filtered = torch.lerp(state["exp_avg"].to(grad.dtype), grad, 1 - beta3)
            average_(state["exp_avg"], grad, clock.rate(beta1, grad), clock.step)
        if not options["bias_correction"]:
            return filtered, one
        return filtered, 1 / (1 - beta3 * power(beta1, clock.step.clamp(min=1) - 1, grad))

    def _graft(
        self,
        state: State,
        grad: Tensor,
        filtered: Tensor,
        scale: Tensor,
        clock: Clock,
        options: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The grafted method's direction, without grafting the filtered gradient; its factor."""
        method = options["grafting"]
        if method is None:
            return filtered, scale
        beta2 = diagonal_beta2(options)
        squares = state.get("exp_avg_sq")
        if squares is not None:
            squares = accumulate_squares_(squares, grad, method, beta2, clock)
        correction = bias_correction(beta2, clock.step, grad)
        graft, factor = grafted_direction(
            filtered, squares, correction, method=method, eps=options["grafting_eps"]
        )
        return graft, scale * factor


def _norms(blocks: Tensor) -> Tensor:
    return torch.linalg.vector_norm(blocks, dim=tuple(range(1, blocks.ndim)), keepdim=True)
