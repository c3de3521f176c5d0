"""AdamW for the parameters that are not preconditioned, on the local shards.

The arithmetic is torch's own; it is element-wise, so shards need no communication.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from titan_shampoo.distributed.layout import local_tensor
from titan_shampoo.functional.descent import coupled_gradient, decoupled_decay
from titan_shampoo.functional.grafting import diagonal_beta2
from titan_shampoo.recognition import VECTOR, Kind, reason_not_multiplied


def reason_to_fall_back(
    name: str, param: Tensor, options: Mapping[str, Any], kind: Kind | None = None
) -> str | None:
    """Why a parameter is left to the diagonal method; None if it is preconditioned.

    Args:
        name: Of the parameter.
        param: Its shape counts.
        options: Its parameter group.
        kind: What its module is, where a model is known.
    """
    if options["fallback"] is None:
        return None
    is_matrix = sum(size != 1 for size in param.shape[options.get("batch_dims", 0) :]) >= 2
    return reason_not_multiplied(name, param, options, kind) if is_matrix else VECTOR


def falls_back(
    name: str, param: Tensor, options: Mapping[str, Any], kind: Kind | None = None
) -> bool:
    """Whether a parameter is left to the diagonal method: vectors, embeddings, heads, routers."""
    return reason_to_fall_back(name, param, options, kind) is not None


def empty_state(param: Tensor) -> dict[str, Tensor]:
    """Moments like the parameter, and the number of steps taken."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    options: Mapping[str, Any],
    taken: Tensor | None = None,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019), with weight decay of the kind that matrices have.

    Args:
        params: Parameters with a gradient.
        grads: This rank's part of the gradient of each.
        states: What :func:`empty_state` made for each.
        options: Parameter group; ``grafting_eps`` is AdamW's epsilon, or ``eps`` without grafting.
        taken: Whether anything is to change, 0-dim bool on the device; None where the host knows.
    """
    on_device = taken is not None
    local = [local_tensor(param) for param in params]
    beta1, beta2 = options["betas"][0], diagonal_beta2(options)
    # Of another dtype where a parameter's grad_dtype says so, which torch's kernels refuse.
    grads = [grad.to(own.dtype) for grad, own in zip(grads, local, strict=True)]
    adamw(
        local,
        [coupled_gradient(grad, own, options) for grad, own in zip(grads, local, strict=True)],
        [local_tensor(state["exp_avg"]) for state in states],
        [local_tensor(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        foreach=not on_device,
        fused=on_device,  # torch's only kernel that asks the device whether the step is taken
        found_inf=None if taken is None else (~taken).float(),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=float(options["lr"]),  # torch's foreach takes no tensor
        weight_decay=decoupled_decay(options),
        eps=options.get("grafting_eps", options.get("eps")),
        maximize=False,
    )
