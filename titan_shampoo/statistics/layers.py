"""Tapped layers and their statistics.

``layers = tap(model)``, once, before the first forward pass; then any number of backward passes;
then ``layers[0].input_sum`` is the sum over the rows that this rank has seen, and
``layers[0].reset()`` clears it.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from titan_shampoo.recognition import without_wrappers
from titan_shampoo.statistics import stacks
from titan_shampoo.statistics.sharding import (
    NO_DATA_PARALLELISM,
    DataParallelism,
    LayerSharding,
    compute_device,
    data_parallelism,
    layer_sharding,
    local_size,
)
from titan_shampoo.statistics.sums import patches_of
from titan_shampoo.statistics.tap import LEAVES, Leaves, attach

Moments = Literal["none", "input", "both"]

_TRANSPOSED = frozenset(
    {("transformers.pytorch_utils", "Conv1D"), ("transformers.modeling_utils", "Conv1D")}
)
"""Linear layers with a weight ``(d_in, d_out)``, of packages that may not be installed."""

# Parts of names that torch.compile and activation checkpointing add.


class TappedLayer:
    """The statistics of one layer: sums over the rows that this rank has seen since ``reset``.

    A row is one application of the weight: a token of a linear layer, one position of one sample of
    a convolution. All sums are float32, or float64 for float64 parameters. ``output_sum`` is the
    gradient at the bias, even for a layer without bias. It belongs to the loss that *this rank
    differentiates*: later changes of gradients (``sharding.gradient_divisor``, unscaling) must be
    applied to it as well.

    The matrix of a convolution is ``(d_out, channels_in / groups * kernel height * kernel width)``.
    With groups, its input statistics are the mean over the groups, so that they fit the weight.

    Under tensor parallelism ``input_sum`` and ``output_sum`` describe the part of the weight on
    this rank (see ``sharding``); the moments always describe the whole input and output.
    """

    name: str
    """Name of the module, without the wrappers of compilation and checkpointing."""
    module: nn.Module
    weight_name: str = "weight"
    """Name of the parameter in the module."""
    batch_dims: int = 0
    """Leading dims of the weight that stack matrices."""
    is_transposed: bool
    """True if the weight is ``(d_in, d_out)``."""
    sharding: LayerSharding
    """Mesh axes of ``weight`` that cut rows, inputs and outputs."""

    def __init__(self, name: str, module: nn.Module, data: Mapping[str, DataParallelism]) -> None:
        self.name = name
        self.module = module
        self._data = data
        stored = data[self.weight_name]
        self.is_transposed = is_transposed(module)
        self.sharding = layer_sharding(
            self.weight, stored, batch_dims=self.batch_dims, is_transposed=self.is_transposed
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {tuple(self.weight.shape)})"

    @property
    def weight(self) -> nn.Parameter:
        """The module's present weight in the form that ranks store; FSDP2 replaces it."""
        weight = self._stored(self.weight_name)
        assert weight is not None
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The module's present bias in the form that ranks store."""
        return self._stored("bias")

    def _stored(self, name: str) -> nn.Parameter | None:
        param = self.module._parameters[name]
        return param if param is None else self._data[name].stored(param)

    @property
    def leaves(self) -> Leaves:
        """The tensors whose gradients are the sums."""
        return self._present(self.module.__dict__.get(LEAVES))

    def _present(self, leaves: object) -> Leaves:
        if not isinstance(leaves, Leaves):
            raise RuntimeError(f"{self.name}: its tap was removed; give untap a copy of the "
                               "model, or construct the optimizer again")  # fmt: skip
        return leaves

    @property
    def input_sum(self) -> Tensor:
        """``[sum of the inputs; number of rows]``, ``(d_in + 1,)``."""
        return _sum_of(self.leaves.input)

    @property
    def output_sum(self) -> Tensor:
        """Sum of the gradients at the output, ``(d_out,)``.

        Raises:
            ValueError: If the model was tapped without output sums.
        """
        leaf = self.leaves.output
        if leaf is None:
            raise ValueError(f"{self.name}: tapped without sums of output gradients; "
                             "call tap(model, output_sums=True)")  # fmt: skip
        return _sum_of(leaf)

    @property
    def input_moment(self) -> Tensor | None:
        """Sum of ``x x^T``, ``(d_in, d_in)``; with a bias of ``[x; 1] [x; 1]^T``, one row larger.

        None while moments are not collected.
        """
        return self._moment(self.leaves.input_moment)

    @property
    def output_moment(self) -> Tensor | None:
        """Sum of ``g g^T`` over the gradients at the output, ``(d_out, d_out)``; None likewise."""
        return self._moment(self.leaves.output_moment)

    @property
    def collects_moments(self) -> bool:
        """True if backward passes form the requested moments; False at first.

        Set it between a backward pass and the next forward pass. A compiled model has one graph
        for each value, compiled at its first use and kept.
        """
        return self.leaves.collects_moments

    @collects_moments.setter
    def collects_moments(self, value: bool) -> None:
        if value and self.leaves.input_moment is None:
            raise ValueError(
                f'{self.name}: tapped without moments; call tap(model, moments="input" or "both")'
            )
        self.leaves.collects_moments = value

    def reset(self) -> None:
        """Clear the sums, and free the moments."""
        leaves = self.leaves
        for leaf in (leaves.input, leaves.output, leaves.input_moment, leaves.output_moment):
            if leaf is not None:
                leaf.grad = None

    def _moment(self, leaf: Tensor | None) -> Tensor | None:
        if leaf is None or not self.collects_moments:
            return None
        return _sum_of(leaf)


class TappedStack(TappedLayer):
    """The statistics of a stack of matrices ``(experts, d_out, d_in)``, each treated as a layer.

    Like those of a linear layer, with one row for each matrix: ``input_sum`` is ``(experts, d_in +
    1)`` and ``output_sum`` ``(experts, d_out)``. Rows of zeros are padding and not counted. Under
    expert parallelism, both describe the experts on this rank.
    """

    batch_dims = 1

    def __init__(
        self, name: str, module: nn.Module, weight_name: str, data: DataParallelism
    ) -> None:
        self.weight_name = weight_name
        super().__init__(name, module, {weight_name: data})

    @property
    def bias(self) -> None:
        """None: modules of experts add their biases themselves."""

    @property
    def leaves(self) -> Leaves:
        """The tensors whose gradients are the sums."""
        return self._present(self.module.__dict__.get(LEAVES, {}).get(self.weight_name))


def tap(
    model: nn.Module,
    *,
    moments: Moments = "none",
    output_sums: bool = True,
    skip: Callable[[str], bool] | None = None,
    is_stack: Callable[[str], bool] | None = None,
) -> list[TappedLayer]:
    """Tap every linear layer and 2-D convolution; return them in model order.

    Linear layers are those of torch and their subclasses, and the ``Conv1D`` of transformers, whose
    weight is transposed.

    Call it once the model is sharded and on its device, before its first forward pass. A second
    call keeps the taps and adapts them to changes of the model. Layers that share their weight with
    another module (tied) are left out. A frozen layer is tapped, and measured once it is trained; a
    frozen layer that cannot be tapped is left out without an error.

    Args:
        model: The whole model, or a part of a pipeline.
        moments: Second moments that can be collected beside the sums (``collects_moments``).
        output_sums: True to sum gradients at the outputs, which reads them once more.
        skip: Takes a module's name; True leaves it out.
        is_stack: Takes a parameter's name; True if it is a stack of matrices ``(experts, d_out,
            d_in)`` to tap, by which the forward of its module multiplies. Stacks have no moments,
            and always both sums.

    Raises:
        ValueError: If a layer cannot be tapped (a forward replaced on the instance, a convolution
            under tensor parallelism), or if ``moments`` has an unknown value.
    """
    if moments not in get_args(Moments):
        raise ValueError(f"moments: got {moments!r}, want one of {', '.join(get_args(Moments))}")
    data = data_parallelism(model)
    uncalled = uncalled_layers(model)
    users = Counter(id(param) for module in model.modules() for param in _own_parameters(module))
    layers: list[TappedLayer] = []
    for name, module in model.named_modules():
        prefix = unwrapped_name(name, model)
        for key, param in module._parameters.items():
            if param is None or users[id(param)] > 1 or not param.is_floating_point():
                continue
            found = data.get((id(module), key), NO_DATA_PARALLELISM)
            path = f"{prefix}.{key}" if prefix else key
            if is_stack is not None and is_stack(path):
                layers.append(TappedStack(path, module, key, found))
            elif _is_layer(module, key, uncalled) and not (skip and skip(prefix)):
                bias = data.get((id(module), "bias"), NO_DATA_PARALLELISM)
                layers.append(TappedLayer(prefix, module, {"weight": found, "bias": bias}))
    return [layer for layer in layers if _is_tapped(layer, moments, output_sums)]


def _is_tapped(layer: TappedLayer, moments: Moments, output_sums: bool) -> bool:
    """Tap a layer; False if it cannot be tapped, which is no error while it is frozen."""
    try:
        _tap_layer(layer, moments, output_sums)
    except ValueError:
        if layer.weight.requires_grad:
            raise
        return False
    return True


def untap(model: nn.Module) -> None:
    """Restore the original forward of the layers of ``model``.

    For a copy that is scripted or transformed by ``torch.func``; a model in training needs its
    taps.
    """
    for module in model.modules():
        if module.__dict__.pop(LEAVES, None) is not None:
            del module.forward


def _is_layer(module: nn.Module, name: str, uncalled: set[nn.Module]) -> bool:
    """True if parameter ``name`` of ``module`` is the weight of a layer that can be tapped."""
    is_linear = isinstance(module, nn.Linear) or is_transposed(module)
    return (
        name == "weight"
        and (is_linear or isinstance(module, nn.Conv2d))
        and (module not in uncalled)
    )


def is_transposed(module: nn.Module) -> bool:
    """True if ``module`` is a linear layer whose weight is ``(d_in, d_out)``."""
    return any((kind.__module__, kind.__name__) in _TRANSPOSED for kind in type(module).__mro__)


def uncalled_layers(model: nn.Module) -> set[nn.Module]:
    """Linear layers of ``model`` whose weight is used although their forward is not called.

    Those of ``nn.MultiheadAttention``, unless a subclass has its own forward.
    """
    return {
        module.out_proj
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
    }


def unwrapped_name(name: str, model: nn.Module) -> str:
    """Name of a module of ``model`` without the parts added by compilation, checkpointing, DDP."""
    if isinstance(model, DistributedDataParallel):
        name = "" if name == "module" else name.removeprefix("module.")
    return without_wrappers(name)


def _tap_layer(layer: TappedLayer, moments: Moments, output_sums: bool) -> None:
    """Attach leaves to ``layer``, or adapt its present leaves to its weight."""
    leaves = _attached(layer)
    leaves.has_bias = layer.bias is not None
    shapes = _leaf_shapes(layer, moments)
    if not output_sums and not layer.batch_dims:
        del shapes["output"]
    for name in ("input", "output", "input_moment", "output_moment"):
        leaf = getattr(leaves, name, None)
        setattr(leaves, name, _fitting(leaf, shapes.get(name), layer.weight))


def _attached(layer: TappedLayer) -> Leaves:
    """The leaves of ``layer``, attached now if it has none."""
    module, sharding = layer.module, layer.sharding
    if isinstance(layer, TappedStack):
        if not (stacks.is_tapped(module) and layer.weight_name in getattr(module, LEAVES)):
            stacks.attach(module, layer.weight_name, Leaves(layer.name, None))
        return layer.leaves
    patches = None
    is_convolution = isinstance(module, nn.Conv2d)
    if (is_convolution or layer.is_transposed) and (sharding.input_axes or sharding.output_axes):
        kind = "a convolution" if is_convolution else "a transposed linear layer"
        raise ValueError(
            f"{layer.name}: {kind} under tensor parallelism cannot be tapped; shard it with FSDP2 "
            "only, or leave it to the fallback in a parameter group with precondition = False"
        )
    if isinstance(module, nn.Conv2d):
        patches = patches_of(module)
    attach(module, Leaves(layer.name, patches))
    return layer.leaves


def _leaf_shapes(layer: TappedLayer, moments: Moments) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves of ``layer`` on this rank."""
    weight, sharding, batch_dims = layer.weight, layer.sharding, layer.batch_dims
    experts = tuple(
        local_size(size, weight, sharding.expert_axes) for size in weight.shape[:batch_dims]
    )
    shape = weight.shape[::-1] if layer.is_transposed else weight.shape
    d_out, d_in = shape[batch_dims], math.prod(shape[batch_dims + 1 :])
    shapes: dict[str, tuple[int, ...]] = {
        "input": (*experts, local_size(d_in, weight, sharding.input_axes) + 1),
        "output": (*experts, local_size(d_out, weight, sharding.output_axes)),
    }
    if moments != "none" and not batch_dims:
        d_row = d_in if layer.bias is None else d_in + 1
        shapes["input_moment"] = (d_row, d_row)
        if moments == "both":
            shapes["output_moment"] = (d_out, d_out)
    return shapes


def _fitting(leaf: Tensor | None, shape: tuple[int, ...] | None, weight: Tensor) -> Tensor | None:
    """``leaf`` if it fits, else a new one: zeros of one element, of ``shape``."""
    if shape is None:
        return None
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = compute_device(weight)
    if leaf is not None and (leaf.shape, leaf.dtype, leaf.device) == (shape, dtype, device):
        return leaf
    return torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()


def _sum_of(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        leaf.grad = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
    return leaf.grad


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [param for param in module._parameters.values() if param is not None]
