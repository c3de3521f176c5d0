"""FSDP2 gradients are sums over the ranks: the trainer has divided the loss already."""

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


def sum_gradients(model: nn.Module) -> None:
    """Make every FSDP2 unit of ``model`` reduce gradients by a plain sum.

    A divide factor of 1 is not enough: it selects a scaled sum, which gloo lacks, and the first
    backward pass would raise.
    """
    plain_sum_only = dist.get_backend() == "gloo"
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            if plain_sum_only:
                module.set_force_sum_reduction_for_comms(True)
