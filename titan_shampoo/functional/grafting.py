"""Grafting: the direction of the preconditioner with the length of a diagonal method's step.

Anil et al. 2020 (arXiv 2002.09018), per block as in Shi et al. 2023 (arXiv 2309.06497, section
2.4).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from titan_shampoo.functional.rounding import average_, store_
from titan_shampoo.functional.rule import Clock

Grafting = Literal["sgd", "adagrad", "rmsprop", "adam"]


def diagonal_beta2(options: Mapping[str, Any]) -> float:
    """Decay of element-wise second moments: ``grafting_beta2``, or that of the factors."""
    beta2 = options.get("grafting_beta2")
    return float(options["betas"][1] if beta2 is None else beta2)


def accumulate_squares_(
    squares: Tensor, grad: Tensor, method: Grafting, beta2: float, clock: Clock
) -> Tensor:
    """Second moments of the grafted method, in place; returned in the precision of ``grad``.

    Args:
        squares: ``(n, *block)``.
        grad: ``(n, *block)``; zero in a step that is not taken.
        method: Not ``"sgd"``, which has none.
        beta2: Decay; AdaGrad sums and ignores it.
        clock: Steps, and whether this one is taken.
    """
    if method != "adagrad":
        return average_(squares, grad.square(), clock.rate(beta2, grad), clock.step)
    if squares.dtype == grad.dtype:
        return squares.addcmul_(grad, grad)
    wide = torch.promote_types(squares.dtype, grad.dtype)
    total = torch.addcmul(squares.to(wide), grad.to(wide), grad.to(wide))
    return store_(squares, total, clock.step).to(grad.dtype)


def grafted_direction(
    filtered: Tensor,
    squares: Tensor | None,
    correction: Tensor,
    *,
    method: Grafting,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Direction of the grafted method, ``(n, *block)``, but for a factor, ``(n, 1, ...)``.

    Args:
        filtered: Filtered gradient, ``(n, *block)``.
        squares: Second moments, ``(n, *block)``; None for ``"sgd"``.
        correction: ``1 - beta2^t`` of each block, ``(n, 1, ...)``; only Adam uses it.
        method: Whose direction.
        eps: Added to the root of the second moments.
    """
    one = torch.ones_like(correction)
    if squares is None:
        return filtered, one
    factor = correction.sqrt() if method == "adam" else one
    denominator = squares.sqrt().add_(eps * factor)
    return torch.div(filtered, denominator, out=denominator), factor
