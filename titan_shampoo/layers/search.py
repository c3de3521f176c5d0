"""Which parameters a method for layers preconditions, and what it needs to know of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_shampoo.distributed.tiles import tile_of, vector_tile
from titan_shampoo.fallback import falls_back
from titan_shampoo.layers.layer import Layer
from titan_shampoo.recognition import Kind, reason_not_multiplied
from titan_shampoo.statistics import TappedLayer, tap, untapped
from titan_shampoo.statistics.layers import Moments, unwrapped_name


@dataclass(frozen=True, slots=True)
class LayerSearch:
    """Finds the layers of an optimizer's parameters.

    Args:
        names: Name of every parameter of the optimizer.
        groups: Parameter group of each.
        kinds: What modules say of some parameters.
        replicas: Ranks that hold plain tensors as replicas; None for one process.
    """

    names: Mapping[Tensor, str]
    groups: Mapping[Tensor, dict[str, Any]]
    kinds: Mapping[Tensor, Kind]
    replicas: dist.ProcessGroup | None

    def tapped(
        self, models: Sequence[nn.Module], moments: Moments, *, output_sums: bool
    ) -> list[Layer]:
        """The layers of ``models`` whose inputs and outputs can be seen; taps them.

        Args:
            models: Parts of the model on this rank.
            moments: Second moments that shall be collected.
            output_sums: Whether gradients at outputs shall be summed.
        """
        layers = []
        for model in models:
            modules = dict(model.named_modules())
            others = {
                unwrapped_name(name, model)
                for name, module in modules.items()
                if not self._is_layer(module._parameters.get("weight"))
            }
            stacks = {
                unwrapped_name(f"{prefix}.{name}" if prefix else name, model)
                for prefix, module in modules.items()
                for name, param in module._parameters.items()
                if self._is_stack(param)
            }
            found = tap(
                model,
                moments=moments,
                output_sums=output_sums,
                skip=others.__contains__,
                is_stack=stacks.__contains__,
            )
            layers += [self._layer(tapped.weight, tapped) for tapped in found]
        return layers

    def plain(self) -> list[Layer]:
        """Every matrix that is multiplied, for methods that need gradients only."""
        return [
            self._layer(param, None)
            for param, name in self.names.items()
            if param.numel()
            and not falls_back(name, param, self.groups[param], self.kinds.get(param))
        ]

    def _is_multiplied(self, param: Tensor | None) -> bool:
        """Whether a parameter is a matrix of ours, or in a group of stacks one of them.

        And not one that is looked up in or chosen from, that its group leaves alone, or that has no
        elements.
        """
        name = None if param is None else self.names.get(param)
        if param is None or name is None:
            return False
        options, kind = self.groups[param], self.kinds.get(param)
        if reason_not_multiplied(name, param, options, kind) is not None:
            return False
        if not param.numel():
            return False
        return param.ndim >= 2 + self._batch_dims(param)

    def _is_layer(self, param: Tensor | None) -> bool:
        """Whether a parameter can be the weight of one layer."""
        return param is not None and self._is_multiplied(param) and not self._batch_dims(param)

    def _is_stack(self, param: Tensor | None) -> bool:
        """Whether a parameter can stack the weights of layers, ``(layers, d_out, d_in)``."""
        if param is None or not self._is_multiplied(param):
            return False
        return self._batch_dims(param) == 1 and param.ndim == 3

    def _batch_dims(self, param: Tensor) -> int:
        """How many leading dims of a parameter of ours stack matrices."""
        return int(self.groups[param].get("batch_dims", 0))

    def left_out(self, models: Sequence[nn.Module], layers: Sequence[Layer]) -> dict[Tensor, str]:
        """Why some of our matrices have no statistics: clauses, to complete "it ..."."""
        tapped = [layer.tapped for layer in layers if layer.tapped is not None]
        elsewhere = "is not a parameter of the model; give the model that it is in, as it is now"
        reasons = dict.fromkeys(self.names, elsewhere)
        for model in models:
            by_name = untapped(model, tapped)
            for path, param in model.named_parameters():
                reasons[param] = by_name.get(unwrapped_name(path, model), "")
        return {param: why for param, why in reasons.items() if why and self._is_multiplied(param)}

    def _layer(self, weight: Tensor, tapped: TappedLayer | None) -> Layer:
        """What is to be known of the layer of ``weight``."""
        name, options = self.names[weight], self.groups[weight]
        row_axes = () if tapped is None else tapped.sharding.row_axes
        stacked = self._batch_dims(weight)
        tile = tile_of(weight, self.replicas, name, row_axes=row_axes, batch_dims=stacked)
        is_transposed = tapped is not None and tapped.is_transposed
        if is_transposed:
            tile = tile.transposed()
        # DDP may be wrapped around the model that we know.
        divisor = 1.0 if tile.token_group is None else float(tile.token_group.size())
        if tapped is not None and isinstance(weight, DTensor):
            divisor = tapped.sharding.gradient_divisor
        bias = None if tapped is None or options["bias"] == "separate" else tapped.bias
        if bias is not None and bias.requires_grad and not weight.requires_grad:
            bias = None  # the fallback trains it while the layer is frozen, and goes on when not
        if bias is None or self.groups.get(bias) is not options:
            return Layer(name, weight, None, options, tile, tapped=tapped, gradient_divisor=divisor,
                         batch_dims=stacked)  # fmt: skip
        place = vector_tile(bias, weight, name, dim=int(is_transposed))
        if place is None:
            raise ValueError(f"{name}: its bias is stored on other ranks than the weight; "
                             "set bias='separate'")  # fmt: skip
        return Layer(name, weight, bias, options, tile, *place, tapped, divisor)
