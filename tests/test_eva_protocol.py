"""Methods for layers are torch optimizers in every respect, and survive bad input unchanged."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.copied_state import assert_same
from tests.support.internals import rates_on_device, taps_of
from tests.support.layer_methods import (
    METHODS,
    advance,
    every_method,
    loss_of,
    make,
    states,
    values,
)
from tests.support.layer_models import Mixed, made
from tests.support.ranks import run_on_ranks
from titan_shampoo import Shampoo
from titan_shampoo.layers.optimizer import LayerOptimizer

TAPPED = [method for method in METHODS if method != "EvaS"]

AT_ONCE: dict[str, dict[str, Any]] = {
    method: {"refresh": "together"} if method in ("FOOF", "KFAC") else {} for method in METHODS
}
"""All inversions in the first step."""

every_tapped_method = pytest.mark.parametrize("method", TAPPED)


def trained(method: str, steps: int = 5, **options: Any) -> tuple[Any, LayerOptimizer]:
    model = made(Mixed)
    optimizer = make(method, model, **options)
    advance(optimizer, model, range(steps))
    return model, optimizer


def assert_only_time_passed(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """The schedule of refreshes goes on in every step."""
    for key in [key for key in after if "cursor" in key]:
        assert after.pop(key) == before.pop(key) + 1
    assert_same(after, before)


# Stepping


@every_method
def test_closure_is_called_once_with_gradients_enabled(method: str) -> None:
    model, twin = made(Mixed), made(Mixed)
    optimizer, other = make(method, model), make(method, twin)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    advance(other, twin, [0])
    assert_same(values(model), values(twin))


@every_method
def test_schedulers_set_the_rate_of_each_step(method: str) -> None:
    model, twin = made(Mixed), made(Mixed)
    scheduled, by_hand = make(method, model), make(method, twin)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 0.25 * (step + 1))
    for step in range(5):
        advance(scheduled, model, [step])
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.05 * (0.25 * (step + 1))
        advance(by_hand, twin, [step])
    assert_same(values(model), values(twin))


@every_method
def test_momentum_is_refused_where_there_is_no_memory_for_it(method: str) -> None:
    model, optimizer = trained(method, steps=1, momentum=0.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    before = values(model)
    with pytest.raises(ValueError, match=r"momentum: got 0\.9 in an optimizer that was"):
        advance(optimizer, model, [1])
    assert_same(values(model), before)


@every_method
@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_momentum_is_nothing_to_a_group_that_adamw_steps(method: str, fallback: str) -> None:
    moved = []
    for momentum in (0.0, 0.9):
        model = made(Mixed)
        norm = [(n, p) for n, p in model.named_parameters() if n.startswith("norm")]
        rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("norm")]
        groups = [{"params": rest}, {"params": norm, "momentum": 0.0}]
        optimizer = make(method, model, groups, fallback=fallback)
        optimizer.param_groups[1]["momentum"] = momentum
        if fallback == "sgd" and momentum:
            with pytest.raises(ValueError, match=r"momentum: got 0\.9"):
                advance(optimizer, model, [0])
            return
        advance(optimizer, model, range(3))
        moved.append(values(model))
    assert_same(*moved)


@every_method
@pytest.mark.parametrize("scaling", ["norm", None])
def test_rates_are_not_sent_to_the_device_where_no_scale_depends_on_them(
    method: str, scaling: str | None
) -> None:
    model, optimizer = trained(method, steps=1, scaling=scaling)
    known = rates_on_device(optimizer)
    for step in range(1, 4):
        optimizer.param_groups[0]["lr"] *= 0.5
        advance(optimizer, model, [step])
    assert rates_on_device(optimizer) == known


@every_method
def test_without_gradients_nothing_changes(method: str) -> None:
    model, optimizer = trained(method, 3, **AT_ONCE[method])
    before, state = values(model), states(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(values(model), before)
    assert_only_time_passed(states(optimizer), state)


@every_tapped_method
def test_zero_grad_forgets_what_was_measured(method: str) -> None:
    model, optimizer = trained(method, 2)
    twin, other = trained(method, 2)
    loss_of(model, 77).backward()
    advance(optimizer, model, [2])  # begins with zero_grad
    advance(other, twin, [2])
    assert_same(states(optimizer), states(other))


@every_method
def test_layer_without_gradient_rests_while_the_others_move(method: str) -> None:
    model, optimizer = trained(method, 2)
    before = values(model)
    state = {k: v.clone() for k, v in optimizer.state[model.wide.weight].items()}
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    model.wide.weight.grad = model.wide.bias.grad = None
    optimizer.step()
    after = values(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert "conv.weight" in moved
    assert not moved & {"wide.weight", "wide.bias"}
    for key in {"step", "momentum"} & state.keys():
        assert torch.equal(optimizer.state[model.wide.weight][key], state[key])


@every_method
def test_gradients_are_read_only(method: str) -> None:
    for kind in ("l2", "decoupled"):
        model = made(Mixed)
        optimizer = make(method, model, weight_decay_type=kind)
        loss_of(model, 0).backward()
        grads = {name: param.grad.clone() for name, param in model.named_parameters()}
        optimizer.step()
        assert_same({name: param.grad for name, param in model.named_parameters()}, grads)


@every_method
def test_memory_layout_does_not_change_iterates(method: str) -> None:
    model, twin = made(Mixed), made(Mixed).to(memory_format=torch.channels_last)
    optimizer, other = make(method, model), make(method, twin)
    assert not twin.conv.weight.is_contiguous()
    advance(optimizer, model, range(4))
    advance(other, twin, range(4))
    for name, value in values(model).items():
        assert torch.allclose(value, values(twin)[name], rtol=1e-11), name


@every_method
def test_half_precision_parameters_keep_float32_averages(method: str) -> None:
    model = made(Mixed).to(torch.bfloat16)
    optimizer = make(method, model)
    advance(optimizer, model, range(5))
    exact, _ = trained(method, 5)
    state = optimizer.state[model.wide.weight]
    assert state["momentum"].dtype == torch.bfloat16
    others = ("momentum", "cursor", "blocks")
    averages = {value.dtype for key, value in state.items() if key not in others}
    assert averages <= {torch.float32, torch.float64}
    for name, value in values(model).items():
        change = (values(exact)[name] - values(made(Mixed))[name]).norm()
        error = (value.double() - values(exact)[name]).norm()
        assert error < 0.05 * values(exact)[name].norm() + change, name
        assert value.isfinite().all()


# Groups, copies, saved state


@every_method
def test_groups_have_options_of_their_own(method: str) -> None:
    model = made(Mixed)
    named = dict(model.named_parameters())
    convs = [(n, p) for n, p in named.items() if "conv" in n]
    rest = [(n, p) for n, p in named.items() if "conv" not in n]
    optimizer = make(method, model, [{"params": convs, "lr": 0.0}, {"params": rest}])
    before = values(model)
    advance(optimizer, model, range(2))
    assert torch.equal(model.conv.weight, before["conv.weight"])
    assert not torch.equal(model.wide.weight, before["wide.weight"])


@every_method
def test_added_group_joins_and_keeps_the_state_of_the_others(method: str) -> None:
    model = made(Mixed)
    named = dict(model.named_parameters())
    late = {name: named.pop(name) for name in ("wide.weight", "wide.bias")}
    optimizer = make(method, model, named.items(), scaling=None)
    advance(optimizer, model, range(3))
    before = states(optimizer)
    optimizer.add_param_group({"params": list(late.items()), "lr": 0.01})
    after = states(optimizer)
    assert_same({key: after[key] for key in before}, before)
    start = late["wide.weight"].detach().clone()
    advance(optimizer, model, range(3, 5))
    assert not torch.equal(late["wide.weight"], start)
    assert optimizer.state[late["wide.weight"]].keys() & {"step", "cursor"}


def saved_by_hand(optimizer: LayerOptimizer, _: Path) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def saved_to_disk(optimizer: LayerOptimizer, folder: Path) -> dict[str, Any]:
    torch.save(optimizer.state_dict(), folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@every_method
@pytest.mark.parametrize("save", [saved_by_hand, saved_to_disk])
@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_loaded_state_continues_bit_equal(
    method: str,
    save: Callable[[LayerOptimizer, Path], dict[str, Any]],
    fallback: str,
    tmp_path: Path,
) -> None:
    model, optimizer = trained(method, fallback=fallback)
    state = save(optimizer, tmp_path)
    twin = made(Mixed, seed=1)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    loaded = make(method, twin, lr=0.7, fallback=fallback)
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["lr"] == 0.05
    advance(optimizer, model, range(5, 9))
    advance(loaded, twin, range(5, 9))
    assert_same(values(twin), values(model))
    assert_same(states(loaded), states(optimizer))


def by_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def by_torch_save(pair: Any) -> Any:
    memory = io.BytesIO()
    torch.save(pair, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@every_method
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_of_model_and_optimizer_continue_bit_equal(
    method: str, duplicate: Callable[[Any], Any]
) -> None:
    model, optimizer = trained(method)
    twin, other = duplicate((model, optimizer))
    advance(other, twin, range(5, 9))
    assert_same(values(model), values(trained(method)[0]))
    advance(optimizer, model, range(5, 9))
    assert_same(values(twin), values(model))
    assert_same(states(other), states(optimizer))


def test_taps_are_not_in_the_state_of_the_model() -> None:
    model, _ = trained("Eva", 1)
    assert model.state_dict().keys() == made(Mixed).state_dict().keys()
    assert len(list(model.parameters())) == len(list(made(Mixed).parameters()))


def assert_refused(optimizer: LayerOptimizer, state: dict[str, Any], message: str) -> None:
    """By a ValueError, and nothing is changed."""
    before, groups = states(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(states(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


@every_method
@pytest.mark.parametrize("other", [*METHODS, "Shampoo", "AdamW"])
def test_state_of_another_method_is_refused_by_name(method: str, other: str) -> None:
    if method == other:
        return
    _, optimizer = trained(method, 2)
    model = made(Mixed)
    makers: dict[str, Any] = {"Shampoo": Shampoo, "AdamW": torch.optim.AdamW}
    saved = makers[other](model.named_parameters()) if other in makers else make(other, model)
    got = (
        f"method '{other}'" if other != "AdamW" else "an optimizer that is not one of titan_shampoo"
    )
    assert_refused(optimizer, saved.state_dict(), f"(?i){got}, wanted '{method}'")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "separate"}, "bias: the state has 'separate', got 'joint'"),
    "factors": ({"max_factor_dim": 2}, "max_factor_dim: the state has 2, got None"),
    "exact damping": ({"factored_damping": False}, "factored_damping: the state has False"),
}
"""What gives state its shape; not every method has every option."""


@every_tapped_method
@pytest.mark.parametrize("case", REFUSED)
def test_state_of_another_shape_is_refused_by_name(method: str, case: str) -> None:
    options, message = REFUSED[case]
    _, optimizer = trained(method, 2)
    if not options.keys() <= optimizer.defaults.keys():
        return
    assert_refused(optimizer, make(method, made(Mixed), **options).state_dict(), message)


def test_state_takes_as_much_as_that_of_sgd_with_momentum_and_one_percent() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    for method in ("Eva", "EvaF", "EvaS"):
        optimizer = make(method, model, fallback="sgd")
        mine = sum(
            value.numel() * value.element_size()
            for state in optimizer.state_dict()["state"].values()
            for value in state.values()
        )
        assert mine <= 1.01 * sum(4 * param.numel() for param in model.parameters()), method


# Bad input


@every_method
@pytest.mark.parametrize("name", ["wide.weight", "norm.bias"])
def test_a_gradient_that_is_not_finite_changes_nothing(method: str, name: str) -> None:
    model, optimizer = trained(method, 3, **AT_ONCE[method])
    before, state = values(model), states(optimizer)
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    grad = model.get_parameter(name).grad
    assert grad is not None
    grad.view(-1)[1] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(values(model), before)
    assert_only_time_passed(states(optimizer), state)
    advance(optimizer, model, [3])
    assert_same(values(model), values(trained(method, 4, **AT_ONCE[method])[0]))


def test_a_statistic_that_is_not_finite_changes_nothing() -> None:
    model, optimizer = trained("Eva", 3)
    before, state = values(model), states(optimizer)
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    taps_of(optimizer)[0].input_sum[0] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(values(model), before)
    assert_same(states(optimizer), state)


@every_method
def test_too_many_steps_without_finite_gradients_end_the_run(method: str) -> None:
    model, optimizer = trained(method, 1, max_skipped=2)
    model.wide.weight.grad.fill_(torch.nan)
    optimizer.step()
    with pytest.raises(RuntimeError, match="2 steps in a row had a gradient that is not finite"):
        optimizer.step()


def skip_on_all(method: str, bad_rank: int) -> tuple[bool, bool, int]:
    """One rank's statistics are bad: parameters and averages unchanged, skipped steps."""
    model = made(Mixed)
    for module in model.children():
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = make(method, model, **AT_ONCE[method])
    advance(optimizer, model, range(2))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    before = [param.detach().to_local().clone() for param in model.parameters()]
    state = {k: v.to_local().clone() if hasattr(v, "to_local") else v.clone()
             for k, v in optimizer.state[model.wide.weight].items() if k != "cursor"}  # fmt: skip
    if dist.get_rank() == bad_rank:
        for tapped in taps_of(optimizer):
            tapped.input_sum.fill_(torch.nan)
        model.wide.weight.grad.to_local().fill_(torch.inf)
    optimizer.step()
    same = all(
        torch.equal(param.detach().to_local(), old)
        for param, old in zip(model.parameters(), before, strict=True)
    )
    after = optimizer.state[model.wide.weight]
    kept = all(
        torch.equal(after[k].to_local() if hasattr(after[k], "to_local") else after[k], old)
        for k, old in state.items()
    )
    return same, kept, optimizer.skipped_steps


@every_method
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_bad_batch_of_one_rank_is_skipped_by_all(method: str, bad_rank: int) -> None:
    assert run_on_ranks(2, skip_on_all, method, bad_rank) == [(True, True, 1)] * 2


@every_tapped_method
def test_layer_that_is_trained_unseen_is_named(method: str) -> None:
    model = made(Mixed)
    loss_of(model, 0).backward()
    optimizer = make(method, model)
    with pytest.raises(RuntimeError, match=r"conv\.weight: has a gradient, but its inputs"):
        optimizer.step()


@every_tapped_method
def test_grad_scaler_is_refused(method: str) -> None:
    model = made(Mixed)
    optimizer = make(method, model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


def test_eva_s_takes_a_grad_scaler() -> None:
    model, twin = made(Mixed), made(Mixed)
    optimizer, other = make("EvaS", model), make("EvaS", twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    advance(other, twin, [0])
    assert_same(values(model), values(twin))


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "damping": {"damping": 0.0},
    "statistics_decay": {"statistics_decay": 1.0},
    "kl_clip": {"kl_clip": -1.0},
    "kv_batch_size": {"kv_scale": "batch_mean"},
    "kv_scale": {"kv_scale": "sum"},
    "scaling": {"scaling": "clip"},
    "nesterov": {"nesterov": True, "momentum": 0.0},
    "betas": {"betas": (0.9, 1.0)},
    "fallback": {"fallback": "lion"},
    "bias": {"bias": "none"},
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_impossible_option_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        make("Eva", made(Mixed), **BAD_OPTIONS[name])


@pytest.mark.parametrize("method", ["FOOF", "KFAC"])
def test_a_scale_that_makes_up_for_evas_damping_is_refused_elsewhere(method: str) -> None:
    with pytest.raises(ValueError, match=r"^scaling: got 'kl_norm', wanted .* with (FOOF|KFAC)"):
        make(method, made(Mixed), scaling="kl_norm")


def test_groups_cannot_differ_in_what_scales_the_whole_step() -> None:
    model = made(Mixed)
    first, *rest = model.named_parameters()
    groups = [{"params": [first]}, {"params": rest, "kl_clip": 1.0}]
    with pytest.raises(ValueError, match=r"kl_clip: got 1\.0 in one group and 0\.001 in another"):
        make("Eva", model, groups)


@every_method
def test_parameters_without_names_are_named_by_the_model(method: str) -> None:
    model, twin = made(Mixed), made(Mixed)
    advance(make(method, twin), twin, range(3))
    if method == "EvaS":
        with pytest.warns(UserWarning, match="without names"):
            optimizer = make(method, model, model.parameters())
    else:
        optimizer = make(method, model, model.parameters())
        assert "wide.weight" in optimizer.sharded_state()
    advance(optimizer, model, range(3))
    assert_same(values(model), values(twin))
