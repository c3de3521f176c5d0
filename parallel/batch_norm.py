"""Batch norm with the statistics of all ranks' images, on CPUs as well as on GPUs.

torch's ``SyncBatchNorm`` has no CPU kernel. This one gathers every rank's mean and variance, two
numbers per channel; their gradients are summed over the ranks, and autograd does the rest. All
ranks hold equally many images, which the loaders of this project guarantee.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titan_shampoo.models.resnet import BatchNorm2d


class SynchronisedBatchNorm2d(BatchNorm2d):
    """``BatchNorm2d`` of the batch of all ranks of ``mesh``.

    Args:
        like: Batch norm with the size, epsilon and momentum.
        mesh: One-dimensional mesh of the ranks that read different images.
    """

    def __init__(self, like: nn.BatchNorm2d, mesh: DeviceMesh) -> None:
        """Create parameters and buffers, not filled yet."""
        super().__init__(like.num_features, like.eps, like.momentum)
        self._group = mesh.get_group()
        self._num_ranks = mesh.size()
        self._rank = mesh.get_local_rank()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, ``(n, channels, h, w)``; running statistics when not in training."""
        if not self.training:
            return super().forward(x)
        values = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        moments = _Gathered.apply(  # type: ignore[no-untyped-call]  # torch's
            torch.stack([mean, var]), self._group, self._num_ranks, self._rank
        )
        means, variances = moments.unbind(1)
        mean = means.mean(0)
        # Variance within the ranks, and between them.
        var = variances.mean(0) + means.var(0, correction=0)
        self._track(mean.detach(), var.detach(), x.numel() // x.shape[1] * self._num_ranks)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)

    def _track(self, mean: Tensor, var: Tensor, num_values: int) -> None:
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (num_values / max(num_values - 1, 1)), self.momentum)
        self.num_batches_tracked += 1


class _Gathered(torch.autograd.Function):
    """``(num_ranks, ...)``: every rank's tensor, the same on all of them."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (autograd's)
        own: Tensor,
        group: dist.ProcessGroup,
        num_ranks: int,
        rank: int,
    ) -> Tensor:
        """Gather ``own``."""
        ctx.group, ctx.rank = group, rank
        gathered = own.new_empty(num_ranks, *own.shape)
        dist.all_gather(list(gathered.unbind()), own, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        """Return this rank's part of the gradients, summed over the ranks."""
        total = grad.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.rank], None, None, None


def synchronise_batch_norm(model: nn.Module, mesh: DeviceMesh) -> None:
    """Replace every ``nn.BatchNorm2d`` of ``model``, which is not filled yet."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, attribute = name.rpartition(".")
            with torch.device(module.weight.device):
                replacement = SynchronisedBatchNorm2d(module, mesh)
            setattr(model.get_submodule(parent), attribute, replacement)
