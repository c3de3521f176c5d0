"""Gradients with another placement than their parameter, and their redistribution.

Under tensor parallelism a gradient can be partial (each rank has one term of the sum for a norm's
weight) or cut in another way. Redistribution takes all ranks of the mesh, including those without
a gradient. The placement is therefore coded as a number on which ranks can agree by an all-reduce.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, zeros

from titan_shampoo.distributed.layout import local_tensor

Grads = Mapping[Tensor, Tensor]
"""Local part of each gradient, by parameter."""

ABSENT = 0
"""Code: no gradient."""
IN_PLACE = 1
"""Code: placed like the parameter."""

_KINDS: tuple[Placement, ...] = (
    Replicate(), Partial("sum"), Partial("avg"), *(Shard(dim) for dim in range(13))
)  # fmt: skip
"""Digits of all other codes, one per mesh axis, lowest first; the code is 2 plus the number."""


def placement_code(param: Tensor) -> int:
    """Code of the placement of the gradient of ``param``; equal codes mean the same on all ranks.

    Raises:
        ValueError: If the placement has no code.
    """
    grad = param.grad
    if grad is None:
        return ABSENT
    if not isinstance(param, DTensor) or not isinstance(grad, DTensor):
        return IN_PLACE
    if grad.placements == param.placements:
        return IN_PLACE
    unknown = [placement for placement in grad.placements if placement not in _KINDS]
    if unknown:
        raise ValueError(f"a gradient of shape {tuple(grad.shape)} is placed by {unknown[0]}, its "
                         f"parameter by {param.placements}; wanted the same placements, or any of "
                         "Replicate, Shard and Partial")  # fmt: skip
    digits = (_KINDS.index(p) * len(_KINDS) ** axis for axis, p in enumerate(grad.placements))
    return 2 + sum(digits)


def gradient_here(param: Tensor) -> Tensor | None:
    """Local part of the gradient of ``param`` in its present placement; None without a gradient."""
    return None if param.grad is None else local_tensor(param.grad)


def num_terms(param: Tensor, here: int) -> int:
    """Largest number of ranks whose terms make up the gradient of ``param`` with code ``here``."""
    return param.device_mesh.size() if here > IN_PLACE else 1  # type: ignore[attr-defined]


def gradient_in_place(param: Tensor, code: int, here: int) -> Tensor:
    """Local part of the gradient, in the placement of the parameter.

    A gradient whose code differs from ``code`` counts as zero. Codes above ``IN_PLACE`` take a
    redistribution, by all ranks of the mesh.

    Args:
        param: The parameter.
        code: Placement on which the ranks agreed; not ``ABSENT``.
        here: Code on this rank.
    """
    grad = param.grad if here == code else None
    if code == IN_PLACE:
        return torch.zeros_like(local_tensor(param)) if grad is None else local_tensor(grad)
    assert isinstance(param, DTensor), "only a DTensor's gradient can be placed unlike it"
    if grad is None:
        grad = _zeros(param, _placements(code, param.device_mesh.ndim))
    assert isinstance(grad, DTensor)
    return grad.redistribute(param.device_mesh, param.placements).to_local()


def _placements(code: int, num_axes: int) -> list[Placement]:
    digits = code - 2
    return [_KINDS[digits // len(_KINDS) ** axis % len(_KINDS)] for axis in range(num_axes)]


def _zeros(param: DTensor, placements: list[Placement]) -> DTensor:
    """Zeros of the shape of ``param``, placed by ``placements``; no communication."""
    held = [Replicate() if p.is_partial() else p for p in placements]
    local = zeros(
        param.shape, dtype=param.dtype, device_mesh=param.device_mesh, placements=held
    ).to_local()
    return DTensor.from_local(
        local, param.device_mesh, placements,
        run_check=False, shape=param.shape, stride=param.stride(),
    )  # fmt: skip
