"""The tap: an identity around a layer's operation whose backward pass adds up statistics.

The backward pass returns sums over the rows of the layer's input, and of the gradient at its
output, as the gradients of *leaves*: tensors of zeros that are neither parameters nor buffers.
Autograd then does all book-keeping. Sums accumulate over microbatches and over calls of a shared
module. Forward passes that are repeated (activation checkpointing) or never differentiated
(evaluation) count nothing. Compilers see an ordinary differentiable function. Hooks on modules or
tensors fail in one of these cases. The layer keeps its input for its weight gradient anyway, so a
tap costs no memory.
"""

import copy
from collections.abc import Callable
from types import MethodType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from titan_shampoo.statistics.sums import (
    Patches,
    input_moment,
    input_sum,
    num_rows,
    output_moment,
    output_sum,
)

LEAVES = "curvature_leaves"
"""Attribute of a tapped module with its leaves; for stacks, a mapping from parameter names."""


class Leaves:
    """Zeros whose gradients are the sums of one layer; of a stack, with one row per expert.

    Leaves of moments are zeros of one element, expanded, and take no memory.

    Args:
        name: Name of the layer, for errors.
        patches: Patches of a convolution; None for a linear layer.
    """

    input: Tensor
    """``(d_in + 1,)``, for the part of the input on this rank."""
    output: Tensor | None
    """``(d_out,)``, for the part of the output on this rank; None if it is not collected."""
    input_moment: Tensor | None
    """``(d_in, d_in)``, or ``(d_in + 1, d_in + 1)`` with a bias; for the whole input."""
    output_moment: Tensor | None
    """``(d_out, d_out)``; for the whole output."""

    def __init__(self, name: str, patches: Patches | None) -> None:
        self.name = name
        self.patches = patches
        self.has_bias = False
        self.collects_moments = False

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle as None: a pickled model is not tapped, and loads without this package."""
        return NoneType, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Leaves":
        """Leaves of a copied module, with the sums so far."""
        twin = memo[id(self)] = object.__new__(Leaves)
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


def attach(module: nn.Module, leaves: Leaves) -> None:
    """Tap ``module`` from its next forward pass on.

    The forward is replaced on the instance by a method of one function that all layers share.
    torch.compile guards on exactly that: a model that was compiled before is compiled again, and
    one graph serves all equal layers. Copies of the module have their own taps.

    Raises:
        ValueError: If the forward was replaced before.
    """
    if not is_tapped(module):
        replace_forward(module, forward, leaves.name)
        setattr(module, LEAVES, leaves)


def replace_forward(module: nn.Module, tapped: Callable[..., Any], name: str) -> None:
    """Make ``tapped``, a function named ``forward``, the forward of ``module``.

    Raises:
        ValueError: If the forward was replaced before.
    """
    replaced = module.__dict__.get("forward")
    # A tapped module that was pickled and loaded has the forward of its class on the instance.
    if replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward:
        raise ValueError(
            f"{name}: its forward was replaced on the instance, so it cannot be tapped; "
            "replace the forward after the optimizer is made, or leave the weight to the fallback "
            "in a parameter group with precondition = False"
        )
    module.forward = MethodType(tapped, module)


def is_tapped(module: nn.Module) -> bool:
    """True if the forward of ``module`` is tapped."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is forward


def is_measured() -> bool:
    """True if this forward pass is measured; False for export and tracing.

    An exported or traced program would keep the taps, with nobody to read them.
    """
    return torch.is_grad_enabled() and not (torch.compiler.is_exporting() or torch.jit.is_tracing())


def forward(module: nn.Module, input: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The result of ``module``'s own forward, tapped.

    The name makes a module that is pickled and loaded find its own forward again.
    """
    if not is_measured() or not _is_trained(module):
        return type(module).forward(module, input, *args, **kwargs)
    leaves: Leaves = getattr(module, LEAVES)
    _check_fit(input, leaves)
    moments = (leaves.input_moment, leaves.output_moment)
    input_zeros, output_zeros = moments if leaves.collects_moments else (None, None)
    count = _InputTap.apply(input, leaves, leaves.input, input_zeros)  # type: ignore[no-untyped-call]
    output = type(module).forward(module, input, *args, **kwargs)
    return _OutputTap.apply(output, count, leaves, leaves.output, output_zeros)  # type: ignore[no-untyped-call]


def _is_trained(module: nn.Module) -> bool:
    """True if a layer has trained parameters: otherwise a tap would add a backward pass for it."""
    weight, bias = module.weight, module.bias
    return bool(weight.requires_grad or (bias is not None and bias.requires_grad))


class _InputTap(torch.autograd.Function):
    """Keeps the input until ``_OutputTap`` sends back the number of rows.

    The input is saved before the layer's operation, not after it. Activation checkpointing stops
    to recompute at the last saved tensor: otherwise the last product of a region would be
    recomputed for the tap alone.
    """

    @staticmethod
    def forward(input: Tensor, leaves: Leaves, zeros: Tensor, moment: Tensor | None) -> Tensor:
        return zeros.detach()[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        input, ctx.leaves, _, moment = inputs
        ctx.save_for_backward(input)
        ctx.wants_moment = moment is not None

    @staticmethod
    def backward(ctx: Any, num_rows: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (input,) = ctx.saved_tensors
        leaves: Leaves = ctx.leaves
        sums = input_sum(_local(input), num_rows, leaves.patches)
        moment = None
        if ctx.wants_moment:
            whole = _whole(input)
            moment = input_moment(whole, sums.dtype, leaves.patches, with_bias=leaves.has_bias)
        return None, None, sums, moment


class _OutputTap(torch.autograd.Function):
    """The identity on the output of a layer."""

    @staticmethod
    def forward(
        output: Tensor, count: Tensor, leaves: Leaves, zeros: Tensor | None, moment: Tensor | None
    ) -> Tensor:
        # Without detach it would be a view, which relu(inplace=True) must not change.
        return output.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        _, count, ctx.leaves, zeros, moment = inputs
        ctx.dtype = count.dtype
        ctx.placements = _grad_placements(output)
        ctx.wants_sum, ctx.wants_moment = zeros is not None, moment is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        patches, dtype = ctx.leaves.patches, ctx.dtype
        local = _local(grad, ctx.placements if ctx.wants_sum else None)
        sums = output_sum(local, dtype, patches) if ctx.wants_sum else None
        count = local.new_full((), num_rows(local, patches), dtype=dtype)
        moment = output_moment(_whole(grad), dtype, patches) if ctx.wants_moment else None
        return grad, count, None, sums, moment


def check_device(input: Tensor, leaves: Leaves) -> None:
    """Raise RuntimeError if a layer computes on another device than when it was tapped."""
    if input.device != leaves.input.device:
        raise RuntimeError(
            f"{leaves.name}: tapped on {leaves.input.device}, called on {input.device}; tap the "
            "model (again) after its last move: construct the optimizer after to_empty()"
        )


def _check_fit(input: Tensor, leaves: Leaves) -> None:
    check_device(input, leaves)
    if isinstance(input, DTensor) and not _rows_are_whole(input):
        raise ValueError(
            f"{leaves.name}: its input is placed as {input.placements}, want whole rows: Replicate "
            "or a cut of the last dim; gather it before the layer, or leave its weight to the "
            "fallback in a parameter group with precondition = False"
        )


def _rows_are_whole(input: DTensor) -> bool:
    """True if the ranks of a tensor-parallel group see the same rows."""
    allowed = (Replicate(), Shard(input.dim() - 1))
    return all(placement in allowed for placement in input.placements)


def _grad_placements(output: Tensor) -> list[Placement] | None:
    """Placement for the gradient at ``output``: cut like the output, and not partial."""
    if not isinstance(output, DTensor):
        return None
    last = Shard(output.dim() - 1)
    return [last if placement == last else Replicate() for placement in output.placements]


def _local(tensor: Tensor, placements: list[Placement] | None = None) -> Tensor:
    """The part of ``tensor`` on this rank, after redistribution to ``placements``."""
    if not isinstance(tensor, DTensor):
        return tensor
    if placements is not None and tensor.placements != tuple(placements):
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def _whole(tensor: Tensor) -> Tensor:
    """The whole of ``tensor``, gathered from the ranks that share its rows."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim).to_local()
