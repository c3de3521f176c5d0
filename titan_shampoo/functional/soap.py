"""SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo's factors.

The moments live in the basis. Whenever it turns, they turn with it: the first moment exactly, the
second as the variances of uncorrelated entries do. A block whose basis is still to come uses Adam.
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
    factor_shapes,
    product_cost,
    square_cost,
)
from titan_shampoo.functional.roots import condition_number, lifted, next_basis
from titan_shampoo.functional.rounding import average_
from titan_shampoo.functional.rule import (
    Clock,
    State,
    StateShape,
    bias_correction,
    per_block,
    worst,
)
from titan_shampoo.functional.symmetric import unpack

ROUNDING = 1e-12
"""Entries of a gradient in the basis, relative to its length, that are rounding in float64."""


class SOAPRule:
    """The mathematics of SOAP; options are read from the parameter group at every call."""

    name = "soap"
    rests_at_first = True

    def state_shapes(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[StateShape]:
        """Factors, bases (the identity at first) and the two moments of a block."""
        moment = StateShape("exp_avg", shape, dtype_option="state_dtype")
        shapes = [moment, moment._replace(name="exp_avg_sq"), *factor_shapes(shape, options)]
        for dim, name in active_factors(shape, options):
            matrix = (shape[dim], shape[dim])
            basis = StateShape(f"{name}_basis", matrix, dim, shape[dim], starts_as_identity=True)
            shapes.append(basis._replace(dtype_option="basis_dtype"))
        return shapes

    def cost(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[float, float]:
        """Floating-point operations (in every step, in a refresh) for one block."""
        dims = [dim for dim, _ in active_factors(shape, options)]
        factors = square_cost(shape, dims) / options["factor_frequency"]
        step = factors + 2 * product_cost(shape, dims) + 20.0 * math.prod(shape)
        refresh = sum(
            (25.0 if options["basis_method"] == "eigh" else 8.0) * shape[d] ** 3 for d in dims
        )
        return step, refresh + 2 * product_cost(shape, dims)

    def accumulate_(
        self, state: State, grad: Tensor, clock: Clock, options: Mapping[str, Any]
    ) -> None:
        """Add the gradient to the factor of every dim; see the rule of Shampoo."""
        accumulate_factors_(state, grad, clock, options)

    def refresh(
        self,
        state: State,
        due: Tensor,
        clock: Clock,
        shape: tuple[int, ...],
        options: Mapping[str, Any],
    ) -> State:
        """New bases of the blocks that are due, with their moments turned into them.

        ``U = Q_new^T Q_old`` per dim; ``M <- M`` contracted with every ``U``, ``V <- V`` with every
        ``U o U``: a change of basis mixes variances by the squares of its entries. The condition
        number is that of a factor whose eigenvalues are lifted by the rounding of the largest:
        nothing is known of smaller ones, and SOAP has no damping of its own.
        """
        new: State = {}
        turns, conditions = [], []
        for dim, name in active_factors(shape, options):
            factor = unpack(state[name][due], shape[dim])
            old = state[f"{name}_basis"][due].to(factor.dtype)
            basis, values = next_basis(
                factor,
                old,
                clock.ready,
                method=options["basis_method"],
                degenerate=options["degenerate_basis"],
            )
            new[f"{name}_basis"] = basis
            conditions.append(condition_number(lifted(values)))
            turns.append((dim, basis.mT @ old))
        squared = [(dim, turn.square()) for dim, turn in turns]
        for name, matrices in (("exp_avg", turns), ("exp_avg_sq", squared)):
            new[name] = contract(state[name][due].to(turns[0][1].dtype), matrices)
        return new | worst(conditions)

    def direction(
        self, state: State, grad: Tensor, clock: Clock, options: Mapping[str, Any]
    ) -> Tensor:
        """``Q_L [ Mhat / (sqrt(Vhat) + eps) ] Q_R^T``, ``(n, *block)``.

        A block whose basis comes from its very first gradient takes no step with that gradient: in
        the basis that diagonalises it, all its variance lies in a few entries.

        Args:
            state: Moments are updated in place.
            grad: ``(n, *block)``.
            clock: Steps of the blocks.
            options: Parameter group.
        """
        dims = active_factors(grad.shape[1:], options)
        bases = [(dim, state[f"{name}_basis"]) for dim, name in dims]
        rotated = contract(grad, [(dim, basis.mT) for dim, basis in bases])
        beta1, beta2 = options["betas"]
        age = clock.step - clock.starts_at_one.long()
        counts = per_block((age > 0).to(grad.dtype), grad)
        step = clock.step
        average = average_(state["exp_avg"], rotated, clock.rate(beta1, grad) * counts, step)
        squares = average_(
            state["exp_avg_sq"], rotated.square(), clock.rate(beta2, grad) * counts, step
        )
        denominator = (squares / bias_correction(beta2, age, grad)).sqrt_().add_(options["eps"])
        direction = average / bias_correction(beta1, age, grad) / denominator * counts
        if options["degenerate_basis"] == "previous" and grad.dtype == torch.float64:
            direction = _without_rounding(direction, squares)
        return contract(direction, bases)


def _without_rounding(direction: Tensor, squares: Tensor) -> Tensor:
    """The direction, zero where a gradient never had more than the rounding of its length.

    In a null space that stays, Adam would divide rounding by its epsilon. In float64 nothing else
    is as small; in float32 rounding cannot be told from small entries.
    """
    whole = squares.flatten(1).sum(1).view(-1, *[1] * (squares.ndim - 1))
    return direction.where(squares > ROUNDING**2 * whole, 0.0)
