"""Refusals of models and schedules whose layers a tap would miss without an error."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.parametrize import ParametrizationList

from titan_shampoo.statistics.layers import (
    TappedLayer,
    is_transposed,
    uncalled_layers,
    unwrapped_name,
)

SPLIT_BACKWARD_SCHEDULES = frozenset({"interleavedzerobubble", "zbvzerobubble", "dualpipev"})
"""Pipeline schedules with separate backward passes for weights, which skip the leaves of taps."""

TAPPED = "nn.Linear, nn.Conv2d and the Conv1D of transformers"
"""Layers that can be tapped, for messages."""


def check_schedule(schedule: object) -> None:
    """Refuse pipeline schedules whose backward passes skip the taps.

    Args:
        schedule: A schedule, its class or its name.

    Raises:
        ValueError: If it is one of ``SPLIT_BACKWARD_SCHEDULES``.
    """
    if not isinstance(schedule, str):
        schedule = (schedule if isinstance(schedule, type) else type(schedule)).__name__
    if schedule.lower().removeprefix("schedule") in SPLIT_BACKWARD_SCHEDULES:
        raise ValueError(
            f"pipeline schedule {schedule}: its split backward passes skip the statistics of "
            "layers; use 1F1B or Interleaved1F1B"
        )


def check_counts(
    layers: Sequence[TappedLayer],
    counts: Sequence[float] | None = None,
    expected_rows: Mapping[str, int] | None = None,
) -> None:
    """Refuse layers whose tap missed rows; reads from the device, so for the first step only.

    Args:
        layers: Result of ``tap``.
        counts: Number of rows of each layer, added up over the ranks. Without it, this rank's own
            numbers are checked, and one rank can raise where another does not.
        expected_rows: Number of rows that layers should have seen, by name.

    Raises:
        RuntimeError: If a tap saw no rows although its weight has a gradient, or saw another
            number of rows than expected.
    """
    if counts is None:
        counts = torch.stack([layer.input_sum[..., -1].sum().cpu() for layer in layers]).tolist()
    for layer, count in zip(layers, counts, strict=True):
        if count == 0 and layer.weight.grad is not None:
            raise RuntimeError(
                f"{layer.name}: its weight has a gradient, but its tap saw no rows; tap the model "
                "before its first forward pass, and skip layers whose weight is used without a "
                "call of the layer, as in F.linear(x, layer.weight)"
            )
        wanted = count if expected_rows is None else expected_rows.get(layer.name, count)
        if count != wanted:
            raise RuntimeError(f"{layer.name}: its tap saw {count:.0f} rows, want {wanted}")


def untapped(model: nn.Module, layers: Sequence[TappedLayer]) -> dict[str, str]:
    """Reason for each trained parameter of two or more dims that is no weight of a tapped layer.

    Args:
        model: The tapped model.
        layers: Result of ``tap``.

    Returns:
        A clause for each such parameter, by its name, to complete "... has no statistics: it".
    """
    uncalled = uncalled_layers(model)
    tapped = {(id(layer.module), layer.weight_name) for layer in layers}
    users = Counter(id(param) for module in model.modules() for param in _own(module).values())
    reasons = {}
    for prefix, module in model.named_modules():
        for name, param in _own(module).items():
            if param.dim() < 2 or not param.requires_grad:
                continue
            if (id(module), name) in tapped:
                continue
            path = f"{prefix}.{name}" if prefix else name
            is_uncalled = module in uncalled or isinstance(module, nn.MultiheadAttention)
            reasons[unwrapped_name(path, model)] = (
                f"is shared by {users[id(param)]} modules" if users[id(param)] > 1
                else "is multiplied inside nn.MultiheadAttention, which calls no layer for it"
                if is_uncalled else _reason(module, name, param)
            )  # fmt: skip
    return reasons


def _reason(module: nn.Module, name: str, param: nn.Parameter) -> str:
    # FSDP2 wraps modules in classes of its own.
    kind = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
    is_layer = issubclass(kind, nn.Linear | nn.Conv2d)
    if issubclass(kind, ParametrizationList) or (is_layer and name != "weight"):
        return "is not a weight itself: a parametrization (as weight norm) forms one from it"
    if is_layer or is_transposed(module):
        return "was skipped"
    of_torch = kind.__module__.startswith("torch.nn.")
    called = f"nn.{kind.__name__}" if of_torch else kind.__name__
    if hasattr(nn, kind.__name__) and not of_torch:
        called = f"{kind.__module__}.{kind.__name__}"
    reason = f"belongs to {called}, and only {TAPPED} can be tapped"
    if param.dim() == 3 and not of_torch:
        reason += ("; if it is a stack of matrices (n, d_out, d_in), Eva, EvaF and EvaS take each "
                   "of them in a parameter group with batch_dims = 1")  # fmt: skip
    return reason


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in module._parameters.items() if param is not None}
