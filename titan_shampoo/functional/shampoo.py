"""Blocked Shampoo (Gupta et al. 2018; Shi et al. 2023, arXiv 2309.06497) on stacks of equal blocks.

Each dim of a block has a factor, the running sum of squares of the gradient unfolded along that
dim; the direction is the filtered gradient contracted with an inverse root of every factor.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from titan_shampoo.functional.grafting import accumulate_squares_, grafted_direction
from titan_shampoo.functional.roots import inverse_root
from titan_shampoo.functional.rule import State, StateShape, bias_correction, per_block, power

TINY_NORM = 1e-16


class ShampooRule:
    """The mathematics of Shampoo; options are read from the parameter group at every call."""

    name = "shampoo"

    def state_shapes(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[StateShape]:
        """Factors and roots of each dim, filtered gradient and grafting moments of a block."""
        shapes = []
        for dim, name in active_factors(shape, options):
            square = (shape[dim], shape[dim])
            shapes += [StateShape(name, square, dim), StateShape(f"{name}_root", square, dim)]
        if options["betas"][0] > 0:
            shapes.append(StateShape("exp_avg", shape))
        if options["grafting"] in ("adagrad", "rmsprop", "adam"):
            shapes.append(StateShape("exp_avg_sq", shape))
        return shapes

    def cost(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[float, float]:
        """Floating-point operations (in every step, in a refresh) for one block."""
        dims = [dim for dim, _ in active_factors(shape, options)]
        step = sum(4.0 * math.prod(shape) * shape[dim] for dim in dims) + 20.0 * math.prod(shape)
        return step, sum(25.0 * shape[dim] ** 3 for dim in dims)

    def accumulate_(
        self, state: State, grad: Tensor, step: Tensor, options: Mapping[str, Any]
    ) -> None:
        """``L_k <- beta2 L_k + (1 - beta2) unfold_k(G) unfold_k(G)^T`` for every dim ``k``.

        Args:
            state: Tensors named by :meth:`state_shapes`, ``(n, ...)`` each.
            grad: ``(n, *block)``.
            step: Step of each block, counted from 1, ``(n,)`` int64.
            options: Parameter group.
        """
        beta2 = options["betas"][1]
        weight = 1.0 if beta2 == 1.0 else 1.0 - beta2
        for dim, name in active_factors(grad.shape[1:], options):
            unfolded = unfold(grad, dim).to(state[name].dtype)
            state[name].baddbmm_(unfolded, unfolded.mT, beta=beta2, alpha=weight)

    def refresh(
        self,
        state: State,
        due: Tensor,
        step: Tensor,
        shape: tuple[int, ...],
        options: Mapping[str, Any],
    ) -> State:
        """New inverse roots ``(L_k / bc2 + eps I)^(-exponent)`` of the blocks that are due.

        Args:
            state: As for :meth:`accumulate_`.
            due: Positions of the blocks in the stack, ``(k,)`` int64.
            step: Their steps, ``(k,)`` int64.
            shape: Shape of a block.
            options: Parameter group.
        """
        beta2 = options["betas"][1]
        exponents = root_exponents(shape, options)
        roots = {}
        for dim, name in active_factors(shape, options):
            factor = state[name][due]
            if options["bias_correction"] and beta2 < 1:
                factor = factor / bias_correction(beta2, step, factor)
            roots[f"{name}_root"] = inverse_root(
                factor,
                exponents[dim],
                eps=options["eps"],
                eps_relative=options["eps_relative"],
                method=options["root_method"],
            )
        return roots

    def direction(
        self,
        state: State,
        grad: Tensor,
        step: Tensor,
        ready: Tensor | bool,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Preconditioned, grafted direction ``(n, *block)``; the grafted method's until ``ready``.

        Args:
            state: As for :meth:`accumulate_`; filtered gradient and moments are updated in place.
            grad: ``(n, *block)``.
            step: ``(n,)`` int64.
            ready: Which blocks have roots, ``(n,)`` bool, or one answer for all.
            options: Parameter group.
        """
        filtered = self._filtered(state, grad, step, options)
        graft = self._graft(state, grad, filtered, step, options)
        if ready is False:
            return filtered if graft is None else graft
        direction = filtered
        for dim, name in active_factors(grad.shape[1:], options):
            direction = contract(direction, state[f"{name}_root"], dim)
        if graft is not None:
            direction = direction * (_norms(graft) / (_norms(direction) + TINY_NORM))
        if ready is True:
            return direction
        return torch.where(per_block(ready, grad), direction, filtered if graft is None else graft)

    def _filtered(
        self, state: State, grad: Tensor, step: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """``Gbar``: the gradient averaged by beta1 (and beta3), bias-corrected."""
        beta1, beta3 = options["betas"][0], options["beta3"]
        if beta1 == 0:
            return grad
        average = state["exp_avg"]
        if beta3 is None or beta3 == beta1:
            beta3 = beta1
            filtered = average.mul_(beta1).add_(grad, alpha=1 - beta1)
        else:
            filtered = (average * beta3).add_(grad, alpha=1 - beta3)
            average.mul_(beta1).add_(grad, alpha=1 - beta1)
        if not options["bias_correction"]:
            return filtered
        return filtered / (1 - beta3 * power(beta1, step - 1, grad))

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
        beta2 = options["grafting_beta2"]
        beta2 = options["betas"][1] if beta2 is None else beta2
        squares = state.get("exp_avg_sq")
        if squares is not None:
            accumulate_squares_(squares, grad, method, beta2)
        correction = bias_correction(beta2, step, grad)
        return grafted_direction(
            filtered, squares, correction, method=method, eps=options["grafting_eps"]
        )


def active_factors(shape: Sequence[int], options: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Pairs (dim, name of its factor) of the dims that are preconditioned."""
    exponents = root_exponents(shape, options)
    names = ("left", "right") if len(shape) <= 2 else [f"factor{dim}" for dim in range(len(shape))]
    return [(dim, name) for dim, (name, e) in enumerate(zip(names, exponents, strict=False)) if e]


def root_exponents(shape: Sequence[int], options: Mapping[str, Any]) -> list[float]:
    """Positive power of the inverse root for each dim: ``1 / (2 order)`` unless overridden."""
    exponent = options["exponent"]
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
    """Each block multiplied by its symmetric matrix along ``dim``: ``(n, *block)``.

    Args:
        blocks: ``(n, *block)``.
        matrices: ``(n, d_dim, d_dim)``, symmetric.
        dim: Dim of the block.
    """
    matrices = matrices.to(blocks.dtype)
    if blocks.ndim == 3 and dim == 1:
        return blocks @ matrices
    product = matrices @ unfold(blocks, dim)
    rest = [size for d, size in enumerate(blocks.shape[1:]) if d != dim]
    return product.reshape(*product.shape[:2], *rest).movedim(1, dim + 1)


def _norms(blocks: Tensor) -> Tensor:
    return torch.linalg.vector_norm(blocks, dim=tuple(range(1, blocks.ndim)), keepdim=True)
