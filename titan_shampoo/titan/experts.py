"""Mixtures of experts: torchtitan's Llama 4 transformer, on CPUs too, and its balancing.

torchtitan 0.2.2 counts the tokens of each expert by ``torch.histc``, which has no CPU kernel for
integers. It sorts the tokens of expert parallelism by a Triton kernel, and never uses its own CPU
version of that. Both are replaced if there is no accelerator. The model, the token exchange and the
sharding are torchtitan's.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components import optimizer as torchtitan_optimizer
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama4 import TransformerModelArgs, llama4_args
from torchtitan.models.moe import MoEArgs
from torchtitan.models.moe import moe as torchtitan_moe
from torchtitan.models.moe import utils as torchtitan_moe_utils
from torchtitan.tools.utils import device_type

from titan_shampoo.titan.optimizers import Members, OptimizersContainer, build_optimizers
from titan_shampoo.titan.replaced import replaced

MIXTURES = {
    # 0.71 M parameters, 0.38 M of them per token; all layers have experts.
    "byte_moe_debug": TransformerModelArgs(
        dim=96,
        n_layers=3,
        n_heads=4,
        vocab_size=256,
        multiple_of=32,
        interleave_moe_layer_step=1,
        moe_args=MoEArgs(num_experts=4, use_grouped_mm=False),
    ),
    **llama4_args,
}


def install_cpu_experts() -> None:
    """Make torchtitan's experts run without an accelerator; the second call does nothing."""
    if device_type != "cpu" or isinstance(torchtitan_moe.torch, _Torch):
        return
    torchtitan_moe.torch = _Torch("torch")
    torchtitan_moe_utils.generate_permute_indices = functools.partial(
        torchtitan_moe_utils.generate_permute_indices, use_cpu=True
    )


class _Torch(ModuleType):
    """``torch`` with a ``histc`` for integers."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever torch has)
        """Return the attribute of ``torch``."""
        return getattr(torch, name)

    def histc(
        self,
        values: Tensor,
        bins: int,
        min: int,
        max: int,
    ) -> Tensor:
        """Return the counts of 0 to ``bins - 1`` in ``values``, ``(bins,)``."""
        assert (min, max) == (0, bins), "only integers in bins of width 1 can be counted"
        return torch.bincount(values, minlength=bins)


def build_balanced_optimizers(
    model_parts: list[nn.Module],
    config: Any,  # noqa: ANN401 - merged dataclass
    parallel_dims: ParallelDims,
    whole_model: Members | None = None,
) -> OptimizersContainer:
    """Return the optimizers of a mixture; each step first moves the biases that balance experts.

    The biases take part in the choice of experts and have no gradient (Wang et al. 2024, arXiv
    2408.15664).
    """

    def build(**_: object) -> OptimizersContainer:
        return build_optimizers(model_parts, config, parallel_dims, whole_model)

    with replaced(torchtitan_optimizer, "build_optimizers", build):
        optimizers = torchtitan_optimizer.build_optimizers_with_moe_load_balancing(
            model_parts, config, parallel_dims
        )
    assert isinstance(optimizers, OptimizersContainer)
    return optimizers
