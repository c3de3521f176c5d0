"""The tail of a step on lists of local tensors: weight decay, heavy ball, and the move.

Rates are numbers, or 0-dim tensors where the host must not know them: a compiled step would be
compiled anew for every number, and an accelerator alone knows whether a step is taken.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rates(NamedTuple):
    """What a step multiplies by; a step that is not taken has 0, 0 and 1."""

    lr: float | Tensor
    decay: float | Tensor
    """Factor ``a`` of ``P <- P + a W``."""
    momentum: float | Tensor


def rates(options: Mapping[str, Any], *, rests: bool) -> Rates:
    """Rates of a parameter group.

    Args:
        options: Parameter group.
        rests: Whether this step leaves out weight decay.
    """
    decay = 0.0 if rests else decoupled_decay(options)
    return Rates(float(options["lr"]), decay, float(options["momentum"]))


def as_tensors(rates: Rates, taken: Tensor | None, like: Tensor) -> Rates:
    """The same as 0-dim tensors; those of a step that moves nothing if it is not ``taken``."""
    lr, decay, momentum = (like.new_full((), float(rate)) for rate in rates)
    if taken is None:
        return Rates(lr, decay, momentum)
    return Rates(lr * taken, decay * taken, torch.where(taken, momentum, 1.0))


def decoupled_decay(options: Mapping[str, Any]) -> float:
    """Factor ``a`` of ``P <- P + a W`` (Loshchilov & Hutter 2019, and two variants)."""
    decay, kind = float(options["weight_decay"]), options["weight_decay_type"]
    if kind == "decoupled":
        return decay
    peak = peak_rate(options)
    if kind == "l2" or not peak:  # a schedule that stays at zero moves nothing
        return 0.0
    return decay * float(options["lr"]) / peak if kind == "corrected" else decay / peak


def peak_rate(options: Mapping[str, Any]) -> float:
    """Largest learning rate of a group's schedule, and never less than the one it has now.

    ``max_lr`` where a scheduler (OneCycleLR) has left it in the group, else ``peak_lr``: the rate
    that the group was made with, or the largest one it has been stepped by.
    """
    return max(float(options.get("max_lr", options["peak_lr"])), float(options["lr"]))


def coupled_gradient(grad: Tensor, weight: Tensor, options: Mapping[str, Any]) -> Tensor:
    """``G + wd W`` for ``"l2"`` decay, never in place; else the gradient itself."""
    if options["weight_decay_type"] != "l2" or not options["weight_decay"]:
        return grad
    return torch.add(grad, weight, alpha=options["weight_decay"])


def descend_(
    params: list[Tensor],
    directions: list[Tensor],
    buffers: list[Tensor],
    rates: Rates,
    *,
    dampening: float,
    nesterov: bool,
) -> None:
    """``P <- P + a W``; ``B <- mu B + (1 - d) P``; ``W <- W - lr B``, in place.

    Args:
        params: ``W``.
        directions: ``P``, of the shapes of ``params``; overwritten.
        buffers: Heavy-ball momentum ``B`` of the same shapes; empty without momentum.
        rates: ``lr``, ``a`` and ``mu``.
        dampening: ``d``, in [0, 1].
        nesterov: Whether to move along ``(1 - d) P + mu B`` instead of ``B``.
    """
    if not isinstance(rates.decay, float) or rates.decay:
        add_scaled_(directions, params, rates.decay)
    if buffers:
        torch._foreach_mul_(buffers, rates.momentum)
        torch._foreach_add_(buffers, directions, alpha=1 - dampening)
        if nesterov:
            torch._foreach_mul_(directions, 1 - dampening)
            add_scaled_(directions, buffers, rates.momentum)
        else:
            directions = buffers
    add_scaled_(params, directions, -rates.lr)


def add_scaled_(targets: list[Tensor], sources: list[Tensor], scale: float | Tensor) -> None:
    """``targets + scale * sources``, in place; one pass where the scale is a number."""
    if isinstance(scale, float):
        torch._foreach_add_(targets, sources, alpha=scale)
    else:
        torch._foreach_add_(targets, torch._foreach_mul(sources, scale))
