"""K-FAC (Martens & Grosse 2015) and FOOF (Benzing 2022): curvature that is a Kronecker product.

With ``A`` the second moment of a layer's inputs, ``B`` that of the gradients at its output, and
``pi^2 = (tr A / i) / (tr B / o)``

    FOOF              P = G (A + y I)^-1
    K-FAC, factored   P = (B + sqrt(y) / pi I)^-1 G (A + sqrt(y) pi I)^-1
    K-FAC, exact      P = Q_B [(Q_B^T G Q_A) / (d_B d_A^T + y)] Q_A^T

All functions work on stacks ``(n, ...)`` of blocks of equal shape. A factor cut into diagonal
blocks preconditions each block of the matrix by the two that belong to it.
"""

from typing import Literal

import torch
from torch import Tensor

from titan_shampoo.functional.roots import SMALLEST_DAMPING, eigh, not_nothing

State = dict[str, Tensor]
Damping = Literal["factored", "exact"]


def state_shapes(shape: tuple[int, int], kind: Damping | None) -> dict[str, tuple[int, ...]]:
    """Shapes of what :func:`refreshed` gives for one block; kind None for FOOF."""
    rows, columns = shape
    if kind is None:
        return {"right_inverse": (columns, columns)}
    if kind == "factored":
        return {"left_inverse": (rows, rows), "right_inverse": (columns, columns)}
    return {
        "left_basis": (rows, rows),
        "left_values": (rows,),
        "right_basis": (columns, columns),
        "right_values": (columns,),
        "damping": (),
    }


def refreshed(
    left: Tensor | None, right: Tensor, damping: Tensor, kind: Damping, *, is_relative: bool
) -> State:
    """What :func:`direction` needs of the factors; not finite where they cannot be inverted.

    Args:
        left: ``B``, ``(n, o, o)``; None for FOOF.
        right: ``A``, ``(n, i, i)``.
        damping: Greater than zero, ``(n,)``.
        is_relative: Whether ``y`` is the damping times the mean eigenvalue of the curvature.
        kind: How K-FAC is damped.
    """
    shares = None if left is None else _shares(damping, left, right, is_relative=is_relative)
    damping = _absolute(damping, left, right) if is_relative else damping
    if left is None or shares is None:
        return {"right_inverse": damped_inverse(right, damping)}
    if kind == "exact":
        left_values, left_basis = eigh(left)
        right_values, right_basis = eigh(right)
        return {
            "left_basis": left_basis,
            "left_values": left_values.clamp(min=0),
            "right_basis": right_basis,
            "right_values": right_values.clamp(min=0),
            "damping": damping,
        }
    return {
        "left_inverse": damped_inverse(left, shares[0]),
        "right_inverse": damped_inverse(right, shares[1]),
    }


def bounded(
    left: Tensor | None, right: Tensor, damping: Tensor, kind: Damping, *, is_relative: bool
) -> State:
    """The same if each factor were its trace times the identity; inverts nothing.

    A factor is at most that, so that no direction becomes longer than by its inverse: for blocks
    that wait for their first refresh. Arguments as for :func:`refreshed`.
    """
    shares = None if left is None else _shares(damping, left, right, is_relative=is_relative)
    damping = _absolute(damping, left, right) if is_relative else damping
    over = right.diagonal(dim1=-2, dim2=-1).sum(-1)
    if left is None or shares is None:
        return {"right_inverse": _scaled_identity(right, 1 / (over + damping))}
    under = left.diagonal(dim1=-2, dim2=-1).sum(-1)
    if kind == "exact":
        return {
            "left_basis": _scaled_identity(left, torch.ones_like(under)),
            "left_values": under.unsqueeze(-1).expand(left.shape[:-1]),
            "right_basis": _scaled_identity(right, torch.ones_like(over)),
            "right_values": over.unsqueeze(-1).expand(right.shape[:-1]),
            "damping": damping,
        }
    return {
        "left_inverse": _scaled_identity(left, 1 / (under + shares[0])),
        "right_inverse": _scaled_identity(right, 1 / (over + shares[1])),
    }


def direction(state: State, grad: Tensor) -> Tensor:
    """Preconditioned gradients, ``(n, o, i)``.

    Args:
        state: From :func:`refreshed`.
        grad: ``(n, o, i)``.
    """
    if "left_basis" in state:
        left, right = state["left_basis"], state["right_basis"]
        spectrum = state["left_values"].unsqueeze(2) * state["right_values"].unsqueeze(1)
        rotated = left.mT @ grad @ right / (spectrum + state["damping"].view(-1, 1, 1))
        return left @ rotated @ right.mT
    preconditioned = grad @ state["right_inverse"]
    return state["left_inverse"] @ preconditioned if "left_inverse" in state else preconditioned


def damped_inverse(factor: Tensor, damping: Tensor) -> Tensor:
    """``(F + y I)^-1`` by Cholesky; NaN where that is not positive definite.

    Args:
        factor: Symmetric, ``(n, d, d)``.
        damping: Greater than zero, ``(n,)``.
    """
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    triangle, failed = torch.linalg.cholesky_ex(damped)
    sound = (failed == 0).view(-1, 1, 1)
    # Of a triangle with a zero on its diagonal, the inverse is an error and no NaN.
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.cholesky_inverse(torch.where(sound, triangle, identity))
    return torch.where(sound, inverse, torch.nan)


def _absolute(damping: Tensor, left: Tensor | None, right: Tensor) -> Tensor:
    """``y`` of a damping relative to the mean eigenvalue of the curvature, ``(n,)``."""
    scale = _mean_eigenvalue(right)
    scale = scale if left is None else scale * _mean_eigenvalue(left)
    return not_nothing(damping * scale)


def _shares(
    damping: Tensor, left: Tensor, right: Tensor, *, is_relative: bool
) -> tuple[Tensor, Tensor]:
    """Damping of both factors: ``sqrt(y) / pi`` and ``sqrt(y) pi``, with pi 1 if a trace is 0.

    Under relative damping that is ``sqrt(damping)`` times the mean eigenvalue of each, so that a
    trace of 0 takes no damping from the other factor.
    """
    over, under = _mean_eigenvalue(right), _mean_eigenvalue(left)
    if is_relative:
        root, smallest = damping.sqrt(), SMALLEST_DAMPING**0.5
        return not_nothing(root * under, smallest), not_nothing(root * over, smallest)
    usable = (over > 0) & (under > 0)
    ratio = torch.where(usable, over / torch.where(usable, under, 1.0), 1.0).sqrt()
    root = damping.sqrt()
    return root / ratio, root * ratio


def _scaled_identity(like: Tensor, scale: Tensor) -> Tensor:
    """``(n, d, d)`` like ``like``, with ``scale``, ``(n,)``, on the diagonal."""
    return torch.diag_embed(scale.unsqueeze(-1).expand(like.shape[:-1]))


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)
