"""A loaded state is used as it is, whatever the optimizer was made with, or refused by name."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo
from titan_shampoo.saved_state import bare_names

BLOCKS: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo}
KRONECKER: dict[str, Any] = {"FOOF": FOOF, "KFAC": KFAC}
METHODS = BLOCKS | KRONECKER | {"Eva": Eva, "EvaF": EvaF, "EvaS": EvaS}
every_method = pytest.mark.parametrize("method", METHODS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 16)
    )


def make(method: str, model: nn.Module, wrapped: nn.Module | None = None, **options: Any) -> Any:
    own = {"block_size": 8} if method in BLOCKS else {"model": wrapped or model}
    own = {} if method == "EvaS" else own
    return METHODS[method]((wrapped or model).named_parameters(), lr=1e-2, **own, **options)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(inputs) - inputs).square().mean().backward()
        optimizer.step()


def go_on_elsewhere(method: str, saved_with: dict[str, Any], made_with: dict[str, Any]) -> None:
    """Ten steps of an optimizer and of another one that its state was loaded into are the same."""
    model, other = network(), network()
    optimizer, loaded = make(method, model, **saved_with), make(method, other, **made_with)
    train(model, optimizer, range(10))
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in saved_with.items():
        assert loaded.param_groups[0][key] == value
    train(model, optimizer, range(10, 20))
    train(other, loaded, range(10, 20))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


PLANNED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"precondition_frequency": 3}, {"precondition_frequency": 5}),
    ({"precondition_frequency": 5}, {"precondition_frequency": 3}),
    ({"refresh": "staggered"}, {"refresh": "together"}),
    ({"factor_frequency": 2}, {"factor_frequency": 1}),
]


@pytest.mark.parametrize("method", BLOCKS | KRONECKER)
@pytest.mark.parametrize(("saved_with", "made_with"), PLANNED)
def test_a_loaded_period_is_used(method: str, saved_with: Any, made_with: Any) -> None:
    go_on_elsewhere(method, saved_with, made_with)


@pytest.mark.parametrize("method", ["Shampoo", "SOAP"])
def test_a_loaded_dtype_is_used(method: str) -> None:
    go_on_elsewhere(method, {"state_dtype": torch.bfloat16}, {})


@every_method
def test_loaded_momentum_is_used(method: str) -> None:
    go_on_elsewhere(method, {"momentum": 0.9}, {"momentum": 0.0})
    go_on_elsewhere(method, {"momentum": 0.0}, {"momentum": 0.5})


class Wrapper(nn.Module):
    """A model under a name of its own, as DDP and torch.compile put it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, model)


@every_method
@pytest.mark.parametrize("wrapper", ["module", "_orig_mod"])
def test_state_of_a_wrapped_model_loads_into_the_bare_one_and_back(
    method: str, wrapper: str
) -> None:
    model = network()
    optimizer = make(method, model)
    train(model, optimizer, range(4))
    wrapped = make(method, model, Wrapper(model, wrapper))
    wrapped.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(wrapped.state_dict())
    assert wrapped.sharded_state().keys() == optimizer.sharded_state().keys()


def test_names_of_wrappers_are_left_out() -> None:
    assert bare_names(["module.a", "module._orig_mod.b"]) == ["a", "b"]
    assert bare_names(["a._checkpoint_wrapped_module.b", "module.c"]) == ["a.b", "module.c"]


def refused(optimizer: Any, state: dict[str, Any]) -> str:
    before = copy.deepcopy(optimizer.local_state_dict())
    with pytest.raises(ValueError, match=r".") as found:
        optimizer.load_state_dict(state)
    after = optimizer.local_state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, state_of in before["state"].items():
        for key, value in state_of.items():
            assert torch.equal(after["state"][number][key], value)
    return str(found.value)


@every_method
def test_a_saved_group_without_an_option_or_with_an_impossible_one_is_refused(method: str) -> None:
    model = network()
    optimizer = make(method, model)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    if optimizer.shape_options:
        key = optimizer.shape_options[0]
        del state["param_groups"][0][key]
        assert refused(optimizer, state).startswith(f"{key}: missing in a parameter group")
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = torch.tensor([0.1, 0.2])
    assert refused(optimizer, state).startswith("lr: ")


@every_method
def test_counters_may_be_saved_as_numbers(method: str) -> None:
    model = network()
    optimizer = make(method, model)
    train(model, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry.update({k: v.item() for k, v in entry.items() if k in ("step", "cursor")})
    other = network()
    loaded = make(method, other)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(state)
    train(model, optimizer, range(4, 8))
    train(other, loaded, range(4, 8))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@every_method
def test_keys_of_others_in_the_state_are_kept(method: str) -> None:
    model = network()
    optimizer = make(method, model)
    optimizer.state["mine"] = 1
    train(model, optimizer, range(2))
    assert optimizer.state_dict()["state"]["mine"] == 1
    _, copied = copy.deepcopy((model, optimizer))
    assert copied.state["mine"] == 1
    loaded = make(method, model)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state["mine"] == 1


@every_method
def test_hooks_before_a_load_do_not_change_the_callers_state(method: str) -> None:
    optimizer = make(method, network())
    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, given: given.update(extra=1))
    optimizer.load_state_dict(state)
    assert "extra" not in state


@every_method
def test_a_saved_state_has_the_numbers_of_its_step(method: str) -> None:
    model = network()
    optimizer = make(method, model)
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    train(model, optimizer, range(3, 6))
    for number, entry in kept["state"].items():
        for key, value in entry.items():
            assert torch.equal(state["state"][number][key], value), key


@every_method
def test_states_of_equal_optimizers_have_the_same_entries_before_and_after_a_load(
    method: str,
) -> None:
    model = network()
    optimizer = make(method, model, fallback="sgd", momentum=0.0) if method in (
        KRONECKER | {"Eva": 1, "EvaF": 1, "EvaS": 1}) else make(method, model)  # fmt: skip
    before = {number: set(state) for number, state in optimizer.state_dict()["state"].items()}
    optimizer.load_state_dict(optimizer.state_dict())
    after = {number: set(state) for number, state in optimizer.state_dict()["state"].items()}
    assert before == after
    assert len(before) == len(list(model.parameters()))


@every_method
def test_what_is_no_state_of_an_optimizer_is_refused(method: str) -> None:
    optimizer = make(method, network())
    assert "has no 'state'" in refused(optimizer, {"param_groups": []})
    assert "has no 'param_groups'" in refused(optimizer, {"state": {}})


class Hollow(nn.Module):
    """A layer without elements beside one with some."""

    def __init__(self) -> None:
        super().__init__()
        self.empty, self.full = nn.Linear(16, 0), nn.Linear(16, 16)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.full(inputs) + self.empty(inputs).sum()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@every_method
@pytest.mark.parametrize("form", ["state_dict", "local_state_dict"])
def test_weights_without_elements_are_no_obstacle(method: str, form: str) -> None:
    torch.manual_seed(0)
    model = Hollow()
    optimizer = make(method, model)
    train(model, optimizer, range(3))
    kept, weights = copy.deepcopy(getattr(optimizer, form)()), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3, 6))
    expected = [param.clone() for param in model.parameters()]
    optimizer.load_state_dict(kept)
    model.load_state_dict(weights)
    train(model, optimizer, range(3, 6))
    for param, other in zip(model.parameters(), expected, strict=True):
        assert torch.equal(param, other)
