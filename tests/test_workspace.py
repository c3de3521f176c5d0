"""What a step need not do anew: allocate on a CPU, and ask how gradients are placed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.internals import kept_tensors, stacks_of
from tests.support.layer_methods import advance, make
from tests.support.layer_models import Mixed, made, normal
from titan_shampoo import Shampoo
from titan_shampoo.distributed import gradient_pattern
from titan_shampoo.distributed.gradients import placement_code
from titan_shampoo.functional.rule import State
from titan_shampoo.functional.shampoo import ShampooRule
from titan_shampoo.workspace import Workspace


def test_tensors_are_kept_as_long_as_they_fit() -> None:
    workspace = Workspace(torch.device("cpu"))
    sizes = [(torch.Size((2, 3)), torch.float32), (torch.Size((4,)), torch.float64)]
    first = workspace.tensors("stack", sizes)
    assert [(tensor.shape, tensor.dtype) for tensor in first] == sizes
    again = workspace.tensors("stack", iter(sizes))
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert workspace.tensors("direction", sizes)[0] is not first[0]
    assert workspace.tensors("stack", sizes[:1])[0].shape == (2, 3)


@pytest.mark.parametrize("method", ["FOOF", "KFAC"])
def test_steps_of_layers_use_the_same_stacks_and_directions(method: str) -> None:
    model = made(Mixed)
    optimizer: Any = make(method, model)
    places = []
    for step in range(3):
        advance(optimizer, model, [step])
        kept = kept_tensors(optimizer)
        places.append([tensor.data_ptr() for use in sorted(kept) for tensor in kept[use]])
    assert places[0]
    assert places[0] == places[1] == places[2]


def test_a_step_asks_once_how_each_gradient_is_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(param: torch.Tensor) -> int:
        asked.append(param)
        return placement_code(param)

    monkeypatch.setattr(gradient_pattern, "placement_code", counted)
    model = made(Mixed)
    optimizer = make("EvaS", model)
    advance(optimizer, model, range(3))
    assert len(asked) == 3 * len(list(model.parameters()))


def test_a_parameter_without_a_gradient_does_not_have_the_state_of_its_stack_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its neighbours are worked on in place, on both sides of it, as if they were alone."""
    weights = {name: torch.nn.Parameter(torch.ones(4, 3)) for name in "abcd"}
    alone = {name: torch.nn.Parameter(torch.ones(4, 3)) for name in "acd"}
    optimizer, other = Shampoo(weights.items(), lr=0.1), Shampoo(alone.items(), lr=0.1)
    places = {tensor.untyped_storage().data_ptr()
              for stack in stacks_of(optimizer) for tensor in stack.values()}  # fmt: skip
    sound = ShampooRule.direction
    seen = []

    def watched(self: Any, state: State, grad: Tensor, *args: Any) -> Tensor:
        seen.append((len(grad), {v.untyped_storage().data_ptr() for v in state.values()} <= places))
        return sound(self, state, grad, *args)

    for step in range(3):
        for params in (weights, alone):
            for name in alone:
                params[name].grad = normal(step + ord(name), 4, 3).float()
        with monkeypatch.context() as patch:
            patch.setattr(ShampooRule, "direction", watched)
            optimizer.step()
        other.step()
    assert seen == [(1, True), (2, True)] * 3
    assert torch.equal(weights["b"], torch.ones(4, 3))
    for name, param in alone.items():
        torch.testing.assert_close(weights[name], param)
