"""A stage of a pipeline that has no layers, only a norm and a head, steps with the others."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.layer_models import normal
from tests.support.ranks import run_on_ranks
from titan_shampoo import FOOF, KFAC, Eva, EvaF, EvaS

METHODS: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "EvaS": EvaS, "FOOF": FOOF, "KFAC": KFAC}
STEPS = 3

Values = dict[str, Tensor]


def stages() -> list[nn.Module]:
    """Layers, and then a norm and a head, which AdamW steps; in float64 only where layers are."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))
    head = OrderedDict(norm=nn.LayerNorm(5), output=nn.Linear(5, 4))
    return [layers.double(), nn.Sequential(head)]


def train(method: str, held: Iterable[int], options: dict[str, Any]) -> Values:
    """The weights of the stages in ``held`` after some steps of an optimizer of those alone.

    Every rank computes the gradients of the whole, and takes the new weights from their stage.
    """
    parts = stages()
    model = nn.Sequential(*[parts[number] for number in held])
    names = {
        p: f"{n}.{name}" for n, part in enumerate(parts) for name, p in part.named_parameters()
    }
    params = [(names[param], param) for param in model.parameters()]
    own = {} if method == "EvaS" else {"model": model}
    optimizer = METHODS[method](params, lr=0.05, damping=0.1, **own, **options)
    for step in range(STEPS):
        for part in parts:
            part.zero_grad()
        optimizer.zero_grad()
        hidden = parts[0](normal(step, 12, 6))
        (parts[1](hidden.float()) - normal(9, 12, 4).float()).square().mean().backward()
        optimizer.step()
        if dist.is_initialized():
            for param, name in names.items():
                dist.broadcast(param.data, int(name[0]))
    return {name: param.detach() for name, param in params}


def train_stage(options: dict[str, Any]) -> dict[str, Values]:
    stage = dist.get_rank()
    lone = [dist.new_group([rank]) for rank in range(2)][stage]
    groups = {"process_group": lone, "pipeline_group": dist.group.WORLD}
    return {method: train(method, [stage], options | groups) for method in METHODS}


@pytest.mark.parametrize("options", [{}, {"scaling": "norm"}, {"scaling": None}], ids=str)
def test_a_stage_without_layers_steps_with_the_others(options: dict[str, Any]) -> None:
    first, second = run_on_ranks(2, train_stage, options)
    for method in METHODS:
        expected = train(method, range(2), options)
        for name, tensor in (first[method] | second[method]).items():
            # How float32 is summed depends on how many threads there are, and ranks have one.
            bound = 1e-12 if tensor.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(tensor, expected[name], rtol=bound, atol=bound)
