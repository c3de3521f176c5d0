"""Layers that are frozen when the optimizer is made are preconditioned once they are trained."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.all_methods import (
    TAPPED,
    advance,
    backward,
    local_rows,
    made,
    model,
    sharded_step,
    whole,
)
from tests.support.block_views import of_blocks
from tests.support.internals import taps_of
from tests.support.ranks import run_on_ranks

every_tapped_method = pytest.mark.parametrize("method", TAPPED)

AT_ONCE: dict[str, dict[str, Any]] = {
    method: {"precondition_frequency": 1} if method in ("FOOF", "KFAC") else {} for method in TAPPED
}


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-12, msg=name)


@every_tapped_method
def test_a_thawed_layer_is_stepped_like_one_that_was_added(method: str) -> None:
    net, twin = model(), model()
    net[0].requires_grad_(False)
    optimizer: Any = made(method, net, **AT_ONCE[method])
    rest = [(n, p) for n, p in twin.named_parameters() if not n.startswith("0.")]
    other: Any = made(method, twin, rest, **AT_ONCE[method])
    start = weights(net)
    advance(optimizer, net, range(3))
    twin[0].requires_grad_(False)
    advance(other, twin, range(3))
    assert torch.equal(net[0].weight, start["0.weight"])
    assert_close(weights(net), weights(twin))
    for part in (net, twin):
        part[0].requires_grad_(True)
    other.add_param_group({"params": list(twin[0].named_parameters(prefix="0"))})
    assert optimizer.preconditions(net[0].weight)
    assert optimizer.preconditions(net[0].bias)
    advance(optimizer, net, range(3, 6))
    advance(other, twin, range(3, 6))
    assert not torch.equal(net[0].weight, start["0.weight"])
    assert_close(weights(net), weights(twin))


@every_tapped_method
def test_groups_that_are_added_without_names_are_layers(method: str) -> None:
    """As Lightning's BaseFinetuning adds the backbone when it is thawed."""
    net = model()
    net[0].requires_grad_(False)
    trained = [param for param in net.parameters() if param.requires_grad]
    optimizer: Any = made(method, net, trained)
    advance(optimizer, net, range(2))
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.01})
    before = weights(net)
    advance(optimizer, net, range(2, 4))
    assert optimizer.preconditions(net[0].weight)
    assert not torch.equal(net[0].weight, before["0.weight"])


@every_tapped_method
def test_a_bias_that_is_trained_alone_moves(method: str) -> None:
    """By the fallback if the weight was frozen first, by the step of its layer if it is later."""
    for frozen_first in (True, False):
        net = model()
        net[0].weight.requires_grad_(not frozen_first)
        optimizer: Any = made(method, net, **AT_ONCE[method])
        net[0].weight.requires_grad_(False)
        assert optimizer.preconditions(net[0].bias) == (not frozen_first)
        before = weights(net)
        advance(optimizer, net, range(3))
        after = weights(net)
        assert torch.equal(after["0.weight"], before["0.weight"])
        assert not torch.equal(after["0.bias"], before["0.bias"])


@every_tapped_method
def test_a_bias_alone_moves_as_if_the_gradient_of_its_weight_were_zero(method: str) -> None:
    net, twin = model(), model()
    optimizer = made(method, net, **AT_ONCE[method])
    other = made(method, twin, **AT_ONCE[method])
    advance(optimizer, net, range(2))
    advance(other, twin, range(2))
    for part in (net, twin):
        part.zero_grad()
    optimizer.zero_grad()
    other.zero_grad()
    backward(net, 7)
    backward(twin, 7)
    net[0].weight.grad = None
    twin[0].weight.grad.zero_()
    kept = net[0].weight.detach().clone()
    optimizer.step()
    other.step()
    assert torch.equal(net[0].weight, kept)
    assert_close({"bias": net[0].bias.detach()}, {"bias": twin[0].bias.detach()})


@pytest.mark.parametrize("method", ["FOOF", "KFAC"])
def test_moments_and_inverses_of_frozen_layers_are_not_formed(method: str) -> None:
    net = model()
    net[0].requires_grad_(False)
    optimizer: Any = made(method, net, precondition_frequency=1)
    advance(optimizer, net, range(3))
    frozen, trained = taps_of(optimizer)
    assert (frozen.collects_moments, trained.collects_moments) == (False, True)
    assert of_blocks(optimizer.state[net[0].weight], "refreshes")[0] == 0
    assert of_blocks(optimizer.state[net[2].weight], "refreshes")[0] > 0


def thaw_on_ranks(method: str) -> dict[str, Tensor]:
    net = model()
    net[0].requires_grad_(False)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = made(method, net, **AT_ONCE[method])
    for step in range(4):
        if step == 2:
            net[0].requires_grad_(True)
        sharded_step(optimizer, net, step)
    return whole(net)


@every_tapped_method
def test_thawed_layers_are_those_of_one_process_under_fsdp2(method: str) -> None:
    net = model()
    net[0].requires_grad_(False)
    optimizer = made(method, net, **AT_ONCE[method])
    for step in range(4):
        if step == 2:
            net[0].requires_grad_(True)
        optimizer.zero_grad()
        net(torch.cat([local_rows(step, 0), local_rows(step, 1)])).square().mean().backward()
        optimizer.step()
    for found in run_on_ranks(2, thaw_on_ranks, method):
        assert_close(found, weights(net))
