"""By what the ranks' gradients are divided when they are reduced: DDP and FSDP2 average by default.

Sums over tokens that a rank forms in its own backward pass must be divided likewise, or a damped
method would depend on the number of ranks.
"""

from torch import nn
from torch.distributed.fsdp import FSDPModule


def divide_factors(model: nn.Module) -> dict[int, float]:
    """What FSDP2 was told to divide by, by identity of the parameter; the others are averaged.

    ``set_gradient_divide_factor`` cannot be asked back in public.
    """
    factors: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            # One group per unit until torch 2.12, several since.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in filter(None, groups):
                if group.gradient_divide_factor is not None:
                    factors |= {
                        id(param.sharded_param): group.gradient_divide_factor
                        for param in group.fsdp_params
                    }
    return factors
