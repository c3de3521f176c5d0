"""Parameter groups that are misspelt, impossible or changed: refused before anything moves."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.all_methods import (
    METHODS,
    advance,
    assert_same,
    backward,
    everything,
    made,
    model,
)

every_method = pytest.mark.parametrize("method", METHODS)


def given(method: str, key: str, value: object) -> torch.optim.Optimizer:
    """An optimizer with one option in a parameter group."""
    net = model()
    return made(method, net, [{"params": list(net.named_parameters()), key: value}])


# Keys


@every_method
def test_a_misspelt_option_is_refused_with_the_nearest(method: str) -> None:
    named = "block_size" if method in ("Shampoo", "SOAP", "KLShampoo") else "statistics_decay"
    if method == "SOAP":
        named = "basis_method"
    for key in (named[:2] + named[3:], "weigth_decay", "fallbck"):
        with pytest.raises(ValueError, match=rf"^{key}: {method} has no such .*; did you mean '"):
            given(method, key, 8)
    net = model()
    optimizer = made(method, net, list(net[0].named_parameters(prefix="0")))
    late = {"params": list(net[2].named_parameters(prefix="2")), "weigth_decay": 0.1}
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        optimizer.add_param_group(late)
    assert len(optimizer.param_groups) == 1


@every_method
def test_options_of_other_optimizers_are_refused(method: str) -> None:
    for key in ("use_muon", "update_proj_gap", "rank", "ns_steps"):
        with pytest.raises(ValueError, match=rf"^{key}: {method} has no such option"):
            given(method, key, 5)
    with pytest.raises(ValueError, match=r"^method: got 'Muon' in a parameter group"):
        given(method, "method", "Muon")


@every_method
def test_keys_of_torch_and_other_libraries_are_let_through(method: str) -> None:
    keys: dict[str, Any] = {
        "initial_lr": 0.1, "max_lr": 0.2, "min_lr": 0.0, "base_momentum": 0.8, "max_momentum": 0.9,
        "swa_lr": 0.1, "name": "head", "group_name": "layer_0", "lr_scale": 0.5, "maximize": False,
        "amsgrad": False, "foreach": None, "fused": None, "capturable": False,
        "differentiable": False,
    }  # fmt: skip
    net = model()
    optimizer = made(method, net, [{"params": list(net.named_parameters()), **keys}])
    optimizer.param_groups[0]["my_own_note"] = object()
    advance(optimizer, net, range(2))


@every_method
@pytest.mark.parametrize("key", ["maximize", "amsgrad", "foreach", "fused", "capturable"])
def test_switches_of_torch_that_no_method_has_must_be_off(method: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: got True, wanted False or None: "):
        given(method, key, True)


# Values

STRANGE: tuple[Any, ...] = (
    "0.1", "yes", None, True, -1, -0.5, math.nan, math.inf, 10**400, 1j, (), (0.9,), (0.1, 0.2, 3),
    ("a", "b"), [], {}, object(), torch.zeros(2), torch.ones(2, 2), torch.tensor(math.nan),
    torch.float16, int,
)  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow) if m in ("SOAP", "KLShampoo") else m for m in METHODS],
)
def test_every_option_is_refused_in_one_line_or_trained_with(method: str) -> None:
    options = [key for key in made(method, model()).defaults if key != "method"]
    refusals = [
        refusal for key in options for value in STRANGE for refusal in refused(method, key, value)
    ]
    assert len(refusals) > 15 * len(options)


def refused(method: str, key: str, value: object) -> list[str]:
    """The refusal of a value, if it is refused; else it is trained with."""
    net = model()
    try:
        optimizer = made(method, net, [{"params": list(net.named_parameters()), key: value}])
    except ValueError as error:
        refusal = str(error)
    else:
        advance(optimizer, net, range(2))
        assert all(param.isfinite().all() for param in net.parameters()), (key, value)
        return []
    assert key in refusal, (key, value)
    assert "\n" not in refusal, (key, value)
    assert len(refusal) < 200, (key, value)
    return [refusal]


@every_method
@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), 0.9, "ab", (0.9, "x"), None])
def test_betas_are_two_numbers(method: str, betas: object) -> None:
    with pytest.raises(ValueError, match=r"^betas: got .*, wanted two numbers"):
        given(method, "betas", betas)


# Rates that are tensors


@every_method
@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01]), torch.tensor([[0.01]])])
def test_a_tensor_is_a_rate_like_its_number(method: str, lr: Tensor) -> None:
    nets, optimizers = [], []
    for rate in (lr.double(), float(lr.double())):
        net = model()
        optimizer = made(method, net, lr=rate, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            advance(optimizer, net, range(step, step + 1))
            scheduler.step()
        nets.append(everything(optimizer, net))
        optimizers.append(optimizer)
    assert_same(*nets)
    assert isinstance(optimizers[0].param_groups[0]["lr"], Tensor)
    assert float(optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.01 * 0.5**4)


@every_method
@pytest.mark.parametrize("lr", [torch.ones(2), torch.tensor(1j), torch.empty(0)])
def test_a_tensor_of_several_numbers_is_no_rate(method: str, lr: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^lr: got .*tensor.*, wanted at least 0"):
        made(method, model(), lr=lr)
    with pytest.raises(ValueError, match=r"^lr: got .*tensor"):
        made(method, model(), lr=torch.empty((), device="meta"))


# Live groups

LATE: dict[str, tuple[Any, str]] = {
    "lr": (-0.1, "^lr: got -0.1"),
    "lr of two": (torch.ones(2), r"^lr: got a tensor of shape \(2,\)"),
    "lr as text": ("0.1", "^lr: got '0.1'"),
    "betas": ((0.9,), "^betas: got"),
    "betas as text": ("fast", "^betas: got 'fast'"),
    "eps": (0.0, "^eps: got 0.0"),
    "weight_decay": (None, "^weight_decay: got None"),
    "weight_decay_type": ("L2", "^weight_decay_type: got 'L2'"),
    "momentum": (1.0, "^momentum: got 1.0"),
    "dampening": (math.nan, "^dampening: got nan"),
    "nesterov": ("no", "^nesterov: got 'no'"),
    "fallback": ("lion", "^fallback: got 'lion'"),
    "method": ("Adam", "^method: got 'Adam' in an optimizer that was made with"),
    "max_skipped": (0, "^max_skipped: got 0"),
    "batch_dims": (1, "^batch_dims: "),
    "block_size": (4, "^block_size: got 4 in an optimizer that was made with 1024"),
    "merge": ("none", "^merge: got 'none' in an optimizer that was made with 'matrix'"),
    "bias": ("separate", "^bias: got 'separate' in an optimizer that was made with 'joint'"),
    "state_dtype": (torch.bfloat16, "^state_dtype: got torch.bfloat16 in an optimizer"),
    "compile": (True, "^compile: got True in an optimizer that was made with False"),
    "exponent": ((0.5,), r"^0\.weight: exponent has 1 numbers"),
    "root_method": ("qr", r"^0\.weight: options that were set.*need the state .*left_basis"),
    "factored_damping": (False, "^factored_damping: got False in an optimizer"),
    "damping": (0, "^damping: got 0"),
    "scaling": ("both", "^scaling: got 'both'"),
    "fallback_lr": ("fast", "^fallback_lr: got 'fast'"),
    "factor_frequency": (0, "^factor_frequency: got 0"),
    "precondition_frequency": (0, "^precondition_frequency: got 0"),
    "max_lr": ("fast", "^max_lr: got 'fast'"),
    "peak_lr": (None, "^peak_lr: got None"),
}


def late_cases() -> Iterator[Any]:
    for method in METHODS:
        known = {*made(method, model()).param_groups[0], "max_lr"}
        for case in LATE:
            if case.split()[0] in known:
                yield pytest.param(method, case, id=f"{method}-{case}")


@pytest.mark.parametrize(("method", "case"), list(late_cases()))
def test_what_is_set_in_a_live_group_is_checked_before_anything_moves(
    method: str, case: str
) -> None:
    value, message = LATE[case]
    key = case.split()[0]
    if method in ("FOOF", "KFAC") and key == "batch_dims":
        pytest.skip("has no stacks")
    net = model()
    optimizer = made(method, net)
    advance(optimizer, net, range(3))
    before, group = everything(optimizer, net), optimizer.param_groups[0]
    was = dict(group)
    backward(net, 3)
    group[key] = value
    for _ in range(2):  # again: an error is not forgotten
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert_same(everything(optimizer, net), before)
    group.clear()
    group.update(was)
    optimizer.step()  # with what was measured before
    advance(optimizer, net, range(4, 5))
    twin = model()
    other = made(method, twin)
    advance(other, twin, range(5))
    assert_same(everything(optimizer, net), everything(other, twin))


@pytest.mark.parametrize("method", ["Shampoo", "KLShampoo"])
def test_a_first_moment_that_was_not_made_is_asked_for_before_anything_moves(method: str) -> None:
    net = model()
    optimizer = made(method, net, betas=(0.0, 0.99))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    before = everything(optimizer, net)
    backward(net)
    with pytest.raises(ValueError, match=r"^0\.weight: options .* need the state exp_avg, which"):
        optimizer.step()
    assert_same(everything(optimizer, net), before)


@every_method
def test_an_option_that_is_taken_out_is_asked_for_before_anything_moves(method: str) -> None:
    net = model()
    optimizer = made(method, net)
    advance(optimizer, net, range(1))
    group, before = optimizer.param_groups[0], everything(optimizer, net)
    backward(net)
    for key in ("lr", "peak_lr", *optimizer.defaults):
        value = group.pop(key)
        with pytest.raises(ValueError, match=f"^{key}: was taken out of a parameter group"):
            optimizer.step()
        group[key] = value
    assert_same(everything(optimizer, net), before)
    advance(optimizer, net, range(1, 2))


@every_method
def test_options_of_the_whole_step_stay_alike_in_all_groups(method: str) -> None:
    net = model()
    groups = [{"params": list(part.named_parameters(prefix=str(n)))} for n, part in enumerate(net)]
    optimizer = made(method, net, groups)
    advance(optimizer, net, range(1))
    optimizer.param_groups[0]["eps"] = 1e-3
    weight_decay = optimizer.param_groups[2].pop("weight_decay")
    with pytest.raises(ValueError, match=r"^weight_decay: was taken out"):
        advance(optimizer, net, range(1, 2))
    optimizer.param_groups[2]["weight_decay"] = weight_decay
    optimizer.param_groups[1]["max_skipped"] = 3
    with pytest.raises(ValueError, match=r"^max_skipped: got 3 in one group"):
        advance(optimizer, net, range(1, 2))
    for group in optimizer.param_groups:
        group["max_skipped"] = 3
    advance(optimizer, net, range(1, 2))


@every_method
def test_a_loaded_state_does_not_count_as_a_late_change(method: str) -> None:
    net = model()
    optimizer = made(method, net, lr=0.02)
    advance(optimizer, net, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    other = made(method, net, lr=0.5, weight_decay=0.3)
    other.load_state_dict(state)
    advance(other, net, range(2, 4))
    assert other.param_groups[0]["weight_decay"] == 0.0
