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
    product_cost,
)
from titan_shampoo.functional.roots import next_basis
from titan_shampoo.functional.rule import Clock, State, StateShape, per_block


class SOAPRule:
    """The mathematics of SOAP; options are read from the parameter group at every call."""

    name = "soap"
    rests_at_first = True

    def state_shapes(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[StateShape]:
        """Factors, bases (the identity at first) and the two moments of a block."""
        shapes = [StateShape("exp_avg", shape), StateShape("exp_avg_sq", shape)]
        for dim, name in active_factors(shape, options):
            square = (shape[dim], shape[dim])
            shapes.append(StateShape(name, square, dim))
            shapes.append(StateShape(f"{name}_basis", square, dim, starts_as_identity=True))
        return shapes

    def cost(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[float, float]:
        """Floating-point operations (in every step, in a refresh) for one block."""
        dims = [dim for dim, _ in active_factors(shape, options)]
        step = 3 * product_cost(shape, dims) + 20.0 * math.prod(shape)
        refresh = sum(
            (25.0 if options["basis_method"] == "eigh" else 8.0) * shape[d] ** 3 for d in dims
        )
        return step, refresh + 2 * product_cost(shape, dims)

    def accumulate_(
        self, state: State, grad: Tensor, step: Tensor, options: Mapping[str, Any]
    ) -> None:
        """Add the gradient to the factor of every dim; see the rule of Shampoo."""
        accumulate_factors_(state, grad, options)

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
        ``U o U``: a change of basis mixes variances by the squares of its entries.
        """
        new: State = {name: state[name][due] for name in ("exp_avg", "exp_avg_sq")}
        for dim, name in active_factors(shape, options):
            old = state[f"{name}_basis"][due]
            basis = next_basis(state[name][due], old, clock.ready, method=options["basis_method"])
            turn = basis.mT @ old
            new[f"{name}_basis"] = basis
            new["exp_avg"] = contract(new["exp_avg"], turn, dim)
            new["exp_avg_sq"] = contract(new["exp_avg_sq"], turn.square(), dim)
        return new

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
        rotated = grad
        for dim, name in dims:
            rotated = contract(rotated, state[f"{name}_basis"].mT, dim)
        beta1, beta2 = options["betas"]
        age = clock.step - clock.starts_at_one.long()
        counts = per_block((age > 0).to(grad.dtype), grad)
        average = state["exp_avg"].lerp_(rotated, (1 - beta1) * counts)
        squares = state["exp_avg_sq"].lerp_(rotated.square(), (1 - beta2) * counts)
        denominator = (squares / _correction(beta2, age, grad)).sqrt_().add_(options["eps"])
        direction = average / _correction(beta1, age, grad) / denominator * counts
        for dim, name in dims:
            direction = contract(direction, state[f"{name}_basis"], dim)
        return direction


def _correction(beta: float, age: Tensor, like: Tensor) -> Tensor:
    """``1 - beta^age``, and 1 where nothing has been averaged yet."""
    correction = 1 - torch.pow(beta, age.clamp(min=1).double())
    return per_block(correction, like).to(like.dtype)
