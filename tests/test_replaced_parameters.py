"""Optimizers whose parameters were replaced, cast, moved or left without gradients say so."""

import logging
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.all_methods import (
    METHODS,
    TAPPED,
    advance,
    assert_same,
    everything,
    made,
    model,
    sharded_step,
    whole,
)
from tests.support.internals import read_late
from tests.support.ranks import run_on_ranks

every_method = pytest.mark.parametrize("method", METHODS)
every_tapped_method = pytest.mark.parametrize("method", TAPPED)
late_or_not = pytest.mark.parametrize("late", [False, True])

WITHOUT_MODEL = [method for method in METHODS if method not in TAPPED]


def idle_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if "had a gradient in" in r.message]


def replace_all(net: nn.Module) -> None:
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)


@pytest.mark.parametrize("method", WITHOUT_MODEL)
@late_or_not
def test_replaced_parameters_are_warned_of_once_by_name(
    method: str, late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    net = model()
    optimizer: Any = made(method, net)
    read_late(optimizer, late)
    replace_all(net)
    advance(optimizer, net, range(2))
    assert not idle_warnings(caplog)
    advance(optimizer, net, range(2, 9))
    (warning,) = idle_warnings(caplog)
    assert "(0.weight and 5 more) had a gradient in 3 steps in a row: nothing is trained" in warning
    assert "make the optimizer after them" in warning


@every_tapped_method
@late_or_not
def test_a_model_that_has_replaced_all_parameters_ends_the_run(method: str, late: bool) -> None:
    for steps_before in (0, 2):
        net = model()
        optimizer: Any = made(method, net)
        read_late(optimizer, late)
        advance(optimizer, net, range(steps_before))
        replace_all(net)
        with pytest.raises(RuntimeError, match=r"^0\.weight and 5 more: the model has other param"):
            advance(optimizer, net, range(2))


@every_tapped_method
def test_a_layer_that_was_replaced_is_named_once_and_the_others_train(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = model()
    optimizer = made(method, net)
    advance(optimizer, net, range(1))
    net[2] = nn.Linear(3, 2).double()
    before = everything(optimizer, net)
    advance(optimizer, net, range(1, 5))
    told = [r.message for r in caplog.records if "the model has other parameters" in r.message]
    assert len(told) == 1
    assert told[0].startswith("2.weight and 1 more: the model has other parameters by now")
    after = everything(optimizer, net)
    assert not torch.equal(after["0.weight"], before["0.weight"])


@every_method
def test_steps_without_gradients_are_warned_of_and_harm_nothing(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = model()
    optimizer = made(method, net)
    advance(optimizer, net, range(2))
    weight = net[0].weight.detach().clone()
    for _ in range(6):
        optimizer.zero_grad()
        optimizer.step()
    assert len(idle_warnings(caplog)) == 1
    assert torch.equal(net[0].weight, weight)
    advance(optimizer, net, range(2, 4))
    assert not torch.equal(net[0].weight, weight)


@every_method
def test_two_optimizers_in_turn_and_evaluations_are_nothing_to_warn_of(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    nets = [model(), model()]
    optimizers = [made(method, net) for net in nets]
    rows = torch.ones(2, 4, dtype=torch.float64)
    for step in range(6):
        turn = step % 2
        for optimizer in optimizers:
            optimizer.zero_grad()
        nets[turn](rows).square().mean().backward()
        for optimizer in optimizers:  # as some trainers do, in each iteration
            optimizer.step()
        with torch.no_grad():
            nets[0](rows)
        nets[1](rows)
    assert not caplog.records


# Cast and moved


@every_method
@pytest.mark.parametrize("begun", [False, True])
def test_a_model_that_is_cast_is_refused_before_anything_moves(method: str, begun: bool) -> None:
    net = model()
    optimizer = made(method, net)
    advance(optimizer, net, range(2 if begun else 0))
    net.float()
    before = everything(optimizer, net)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    for _ in range(2):
        wanted = r"^0\.weight: is torch\.float32 on cpu, was torch\.float64 on cpu when the opt"
        with pytest.raises(RuntimeError, match=wanted):
            optimizer.step()
    assert_same(everything(optimizer, net), before)
    net.double()
    advance(optimizer, net, range(2, 4))


@every_method
def test_a_parameter_that_is_moved_is_refused_by_name(method: str) -> None:
    net = model()
    optimizer = made(method, net)
    moved = nn.Parameter(torch.empty_like(net[1].weight, device="meta"))
    torch.utils.swap_tensors(net[1].weight, moved)
    with pytest.raises(RuntimeError, match=r"^1\.weight: is torch\.float64 on meta, was"):
        optimizer.step()


# Under FSDP2


def sharded(net: nn.Module, parts: Iterable[nn.Module] = ()) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for part in (*parts, net):
        fully_shard(part, mesh=mesh)


def shard_too_late(method: str) -> tuple[str, list[str]]:
    """What is raised, and what is warned of."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titan_shampoo").addHandler(handler)
    net = model()
    optimizer = made(method, net)
    sharded(net)
    try:
        for step in range(5):
            sharded_step(optimizer, net, step)
    except RuntimeError as error:
        return str(error), told
    return "", told


@every_method
def test_sharding_after_the_optimizer_is_said_on_all_ranks(method: str) -> None:
    for raised, told in run_on_ranks(2, shard_too_late, method):
        if method in TAPPED:
            assert raised.startswith("0.weight and 5 more: the model has other parameters by now")
        else:
            assert not raised
            assert len([line for line in told if "nothing is trained" in line]) == 1


def swap_before_the_first_step(method: str) -> bool:
    """As accelerate does for FSDP2: sharded parameters are put into the groups."""
    nets = [model(), model()]
    optimizer = made(method, nets[0])
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["params"] = [torch.empty(1) for _ in group["params"]]
    for net in nets:
        sharded(net)
    params = iter(nets[0].parameters())
    for group in optimizer.param_groups:
        group["params"] = [next(params) for _ in group["params"]]
    other = made(method, nets[1])
    for step in range(3):
        sharded_step(optimizer, nets[0], step)
        sharded_step(other, nets[1], step)
    found, wanted = map(whole, nets)
    assert not torch.equal(found["0.weight"], model()[0].weight)
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


@every_method
def test_parameters_that_are_put_into_the_groups_before_the_first_step_are_trained(
    method: str,
) -> None:
    assert all(run_on_ranks(2, swap_before_the_first_step, method))


@every_method
def test_parameters_that_are_put_into_the_groups_later_are_refused(method: str) -> None:
    net = model()
    optimizer = made(method, net)
    advance(optimizer, net, range(1))
    loaded = made(method, model())
    loaded.load_state_dict(optimizer.state_dict())
    for one in (optimizer, loaded):
        one.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(3, 4).double())
        with pytest.raises(RuntimeError, match=r"^params: a parameter group has other"):
            one.step()
