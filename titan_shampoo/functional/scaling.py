"""One length for the whole step: how far the directions of all layers are scaled together.

Preconditioning by a damped inverse changes the length of a step by orders of magnitude; these
bring it back (Zhang et al. 2023, and its extension, arXiv 2308.02123). With ``nu`` the factor of
all directions P, sums over all layers and ``y`` the damping:

    kl_clip    nu = min(1, sqrt(kappa / sum lr^2 <P, G>))    the step moves predictions by kappa
    norm       nu = sqrt(sum |G|^2 / sum |P|^2)              as long as the gradient
    kl_norm    nu = y / sqrt(sum y <P, G>)                   y P, which does not grow as y shrinks

Results stay on the device; a sum of zero in a denominator gives 1.
"""

from typing import Literal

import torch
from torch import Tensor

Scaling = Literal["kl_clip", "norm", "kl_norm"]


def scaling_sums(
    scaling: Scaling,
    inner: Tensor,
    direction_square: Tensor,
    grad_square: Tensor,
    damping: Tensor,
    lr: Tensor | None,
    kl_clip: float,
) -> Tensor:
    """Numerator and denominator of ``nu^2``, ``(2,)``; denominators add up over pipeline stages.

    Args:
        scaling: Which one.
        inner: ``<P, G>`` of each layer, ``(layers,)`` as all others.
        direction_square: ``|P|^2``.
        grad_square: ``|G|^2``.
        damping: ``y``.
        lr: The scheduled learning rates; None but for ``"kl_clip"``.
        kl_clip: ``kappa``, greater than zero.
    """
    if scaling == "norm":
        return torch.stack([grad_square.sum(), direction_square.sum()])
    if scaling == "kl_clip":
        assert lr is not None, "steps are clipped by what they move"
        weight, constant = lr.square(), kl_clip
    else:
        weight, constant = damping, 1.0
    denominator = (weight * inner).sum()
    return torch.stack([torch.full_like(denominator, constant), denominator])


def global_scale(scaling: Scaling, sums: Tensor) -> Tensor:
    """``nu`` without its factor ``y``, 0-dim; ``sums`` from :func:`scaling_sums`."""
    numerator, denominator = sums
    tiny = torch.finfo(sums.dtype).tiny
    root = (numerator / denominator.clamp(min=tiny)).sqrt()
    scale = torch.where(denominator > tiny, root, 1.0)
    return scale.clamp(max=1.0) if scaling == "kl_clip" else scale
