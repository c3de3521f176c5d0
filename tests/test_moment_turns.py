"""Second moments are formed in turns: every step costs the same, and a part of a network is one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tests.support.internals import layers_of, moment_turns_of, taps_of, turns_of
from titan_shampoo import FOOF, KFAC
from titan_shampoo.layers.optimizer import LayerOptimizer

METHODS: dict[str, Any] = {"FOOF": FOOF, "KFAC": KFAC}


class Pair(nn.Module):
    """Two layers that are one numbered part of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.down(torch.relu(self.up(tokens)))


class Network(nn.Module):
    """Parts with numbers and a layer without one."""

    def __init__(self, num_parts: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Pair() for _ in range(num_parts))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.first(tokens)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


def measured_in(
    optimizer: LayerOptimizer, network: nn.Module, steps: int, lose: Callable[[int], bool]
) -> list[set[str]]:
    """The layers of which each step forms moments."""
    found = []
    for number in range(steps):
        optimizer.zero_grad()
        loss = network(torch.ones(3, 4) + number).square().mean()
        (loss * torch.nan if lose(number) else loss).backward()
        tapped = [(layer.name, layer.tapped) for layer in layers_of(optimizer)]
        found.append({n for n, one in tapped if one is not None and one.input_moment is not None})
        optimizer.step()
    return found


def names_of(network: nn.Module) -> set[str]:
    return {name for name, param in network.named_parameters() if param.ndim == 2}


@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_after_the_first_step_each_layer_is_measured_once_in_so_many(
    method: str, loses: bool
) -> None:
    network = Network()
    optimizer = METHODS[method](network.named_parameters(), model=network, factor_frequency=3)
    everything = names_of(network)
    first, *others = measured_in(optimizer, network, 7, lambda number: loses and number in (1, 5))
    assert first == everything
    assert others[:3] == others[3:], "steps that are left out count, too"
    assert set.union(*others[:3]) == everything
    assert sum(map(len, others[:3])) == len(everything)
    for some in others[:3]:
        parts = [name.split(".")[1] for name in some if name.startswith("layers.")]
        assert len(parts) == 2 * len(set(parts)) == 4, "two of six parts, both layers of each"


def test_together_measures_all_in_one_step() -> None:
    network = Network()
    options: dict[str, Any] = {"factor_frequency": 3, "refresh": "together"}
    optimizer = FOOF(network.named_parameters(), model=network, **options)
    found = measured_in(optimizer, network, 7, lambda _: False)
    everything = names_of(network)
    assert found == [everything, set(), set(), everything, set(), set(), everything]


def test_a_period_changed_in_mid_run_measures_each_layer_in_it() -> None:
    network = Network()
    optimizer = FOOF(network.named_parameters(), model=network, factor_frequency=3)
    measured_in(optimizer, network, 3, lambda _: False)
    optimizer.param_groups[0]["factor_frequency"] = 2
    found = measured_in(optimizer, network, 4, lambda _: False)
    assert found[:2] == found[2:]
    assert found[0] | found[1] == names_of(network)


# What torch's compiler says while it traces any autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_part_has_one_graph_with_moments_and_one_without() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    network = Network()
    for layer in network.layers:
        layer.compile(backend=counter, fullgraph=True)
    optimizer = FOOF(network.named_parameters(), model=network, factor_frequency=6)
    measured_in(optimizer, network, 13, lambda _: False)
    torch._dynamo.reset()
    assert counter.frame_count == 2


class WithExperts(Network):
    """Beside its layers, what is none: a stack of experts, positions and a lone matrix."""

    def __init__(self) -> None:
        super().__init__()
        for number, shape in enumerate([(3, 30, 20), (1, 40, 4), (40, 4)]):
            self.register_parameter(f"layers_{number}", nn.Parameter(torch.ones(shape)))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_layer_takes_no_turn_from_layers_of_other_stages(method: str) -> None:
    """As all there are, and as those that a stage has of a model that it knows by shapes."""
    turns = []
    for whole in (None, WithExperts().named_parameters()):
        network = WithExperts()
        params = network.named_parameters()
        options = {"factor_frequency": 3, "precondition_frequency": 5, "refresh": "staggered"}
        optimizer = METHODS[method](params, model=network, all_params=whole, **options)
        turns.append((moment_turns_of(optimizer), turns_of(optimizer)))
    assert turns[0] == turns[1]


@pytest.mark.parametrize("method", METHODS)
def test_copies_measure_each_layer_in_its_turn(method: str) -> None:
    network = Network()
    optimizer = METHODS[method](network.named_parameters(), model=network, factor_frequency=3)
    measured_in(optimizer, network, 2, lambda _: False)
    copied, twin = copy.deepcopy((optimizer, network))
    twin(torch.ones(3, 4)).sum().backward()
    network(torch.ones(3, 4)).sum().backward()
    for mine, other in zip(taps_of(copied), taps_of(optimizer), strict=True):
        assert (mine.input_moment is None) == (other.input_moment is None)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_added_before_a_step_leaves_what_was_measured_for_it(method: str) -> None:
    found = []
    for adds in (True, False):
        torch.manual_seed(0)
        network = Network()
        optimizer = METHODS[method](network.named_parameters(), model=network, factor_frequency=3)
        for number in range(5):
            optimizer.zero_grad()
            network(torch.ones(3, 4) + number).square().mean().backward()
            if adds and number == 2:
                optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(3)))]})
            optimizer.step()
        found.append([param.detach() for param in network.parameters()])
    assert all(map(torch.equal, *found))
