"""Every method is a torch.optim.Optimizer in every respect, and survives bad input unchanged."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.block_methods import (
    METHODS,
    OPTIONS,
    SHAPES,
    Params,
    advance,
    every_method,
    make,
    parameters,
    states,
    tensors,
    values,
)
from tests.support.block_views import of_blocks
from tests.support.copied_state import assert_same
from tests.support.internals import is_compiled, read_late
from tests.support.ranks import run_on_ranks
from titan_shampoo.blocks.optimizer import BlockOptimizer
from titan_shampoo.functional import kl_shampoo, shampoo, soap


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(method: str, steps: int = 6, **options: Any) -> tuple[Params, BlockOptimizer]:
    params = parameters()
    optimizer = make(method, params, **options)
    advance(optimizer, params, range(steps))
    return params, optimizer


# Stepping


@every_method
def test_closure_is_called_once_with_gradients_enabled(method: str) -> None:
    params, plain = parameters(), parameters()
    optimizer, other = make(method, params), make(method, plain)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((param**2).sum() for param in params.values())
        assert isinstance(loss, Tensor)
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    for param in plain.values():
        param.grad = 2 * param.detach()
    assert other.step() is None
    assert_same(values(params), values(plain))


@every_method
def test_step_hooks_run_before_and_after(method: str) -> None:
    params = parameters()
    optimizer = make(method, params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    advance(optimizer, params, range(2))
    assert seen == ["before", "after"] * 2


@every_method
def test_state_dict_hooks_run(method: str) -> None:
    _, optimizer = trained(method, 1)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "saved", "load", "loaded"]


@every_method
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_forgets_gradients(method: str, set_to_none: bool) -> None:
    params, optimizer = trained(method, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in params.values():
        assert param.grad is None if set_to_none else not param.grad.any()  # type: ignore[union-attr]


@every_method
def test_without_gradients_nothing_changes(method: str) -> None:
    params, optimizer = trained(method, 3)
    before, state = values(params), states(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(values(params), before)
    assert_same(states(optimizer), state)


@every_method
@pytest.mark.parametrize("kind", ["decoupled", "corrected", "independent"])
def test_schedulers_set_the_rate_of_each_step(method: str, kind: str) -> None:
    params, other = parameters(), parameters()
    scheduled = make(method, params, weight_decay_type=kind)
    by_hand = make(method, other, weight_decay_type=kind)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 0.25 * (step + 1))
    for step in range(6):
        advance(scheduled, params, [step])
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.1 * (0.25 * (step + 1))
        advance(by_hand, other, [step])
    assert_same(values(params), values(other))


@every_method
def test_one_cycle_schedule_may_change_betas(method: str) -> None:
    params = parameters()
    optimizer = make(method, params, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    for step in range(7):
        advance(optimizer, params, [step])
        scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] != OPTIONS.get("betas", (0.9,))[0]
    assert all(param.isfinite().all() for param in params.values())


@every_method
def test_grad_scaler_scales_back_and_skips_overflow(method: str) -> None:
    params, plain = parameters(), parameters()
    optimizer, other = make(method, params), make(method, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for step in range(5):
        targets = tensors(1000 * step)
        overflows = step == 2
        losses = []
        for group in (params, plain):
            for param in group.values():
                param.grad = None
            losses.append(torch.stack([(p * targets[n]).sum() for n, p in group.items()]).sum())
        before = values(params), states(optimizer)
        scaler.scale(losses[0] * (torch.inf if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert_same(values(params), before[0])
            assert_same(states(optimizer), before[1])
        else:
            losses[1].backward()
            other.step()
    assert_same(values(params), values(plain))


# Parameters of every kind


@every_method
def test_memory_layout_does_not_change_iterates(method: str) -> None:
    """Channels last, transposed, sliced and expanded parameters and gradients."""
    shapes = {"conv": (6, 4, 3, 3), "matrix": (9, 5), "sliced": (6, 5)}
    start = tensors(0, shapes)
    plain = {name: torch.nn.Parameter(tensor) for name, tensor in start.items()}
    strided = {
        "conv": torch.nn.Parameter(start["conv"].clone(memory_format=torch.channels_last)),
        "matrix": torch.nn.Parameter(start["matrix"].T.contiguous().T),
        "sliced": torch.nn.Parameter(torch.zeros(6, 10)[:, ::2].copy_(start["sliced"])),
    }
    assert not any(param.is_contiguous() for param in strided.values())
    optimizers = make(method, plain), make(method, strided)
    for step in range(1, 7):
        grads = tensors(step, shapes)
        grads["sliced"] = grads["sliced"][:, :1].expand(6, 5)
        for name, grad in grads.items():
            plain[name].grad = grad.clone(memory_format=torch.contiguous_format)
        strided["conv"].grad = grads["conv"].contiguous(memory_format=torch.channels_last)
        strided["matrix"].grad = grads["matrix"].T.contiguous().T
        strided["sliced"].grad = grads["sliced"]
        for optimizer in optimizers:
            optimizer.step()
    assert_same(values(strided), values(plain))


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_keep_float32_statistics(method: str, dtype: torch.dtype) -> None:
    params = parameters(["a", "conv"], dtype)
    optimizer = make(method, params)
    advance(optimizer, params, range(6))
    exact = parameters(["a", "conv"])
    advance(make(method, exact), exact, range(6))
    for name, param in params.items():
        assert param.dtype == dtype
        kept = {k: v.dtype for k, v in optimizer.state[param].items() if "." in k}
        assert kept
        assert set(kept.values()) == {torch.float32}
        error = (param.float() - exact[name]).norm() / (exact[name] - tensors(0)[name]).norm()
        assert error < 0.05


@every_method
def test_dtypes_may_be_mixed(method: str) -> None:
    dtypes = {"a": torch.float64, "b": torch.bfloat16, "bias": torch.float16, "conv": torch.float32}
    params = {name: parameters([name], dtype)[name] for name, dtype in dtypes.items()}
    advance(make(method, params, refresh="together"), params, range(6))
    for name, dtype in dtypes.items():
        alone = parameters([name], dtype)
        advance(make(method, alone, refresh="together"), alone, range(6))
        assert params[name].dtype == dtype
        assert_same({name: params[name]}, alone)


@every_method
@pytest.mark.parametrize("kind", ["l2", "decoupled"])
def test_gradients_are_read_only(method: str, kind: str) -> None:
    params = parameters()
    optimizer = make(method, params, weight_decay_type=kind)
    for step in range(4):
        grads = tensors(step)
        for name, param in params.items():
            param.grad = grads[name].clone()
        given = {name: param.grad for name, param in params.items()}
        optimizer.step()
        assert all(params[name].grad is grad for name, grad in given.items())
        assert_same({name: grad for name, grad in given.items() if grad is not None}, grads)


@every_method
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_does_not_depend_on_the_rate(method: str, nesterov: bool) -> None:
    buffers = []
    for lr in (0.0, 0.1):
        params, optimizer = trained(method, lr=lr, nesterov=nesterov, weight_decay=0.0)
        buffers.append({n: optimizer.state[params[n]]["momentum"] for n in ("a", "b", "conv")})
    assert_same(*buffers)


@every_method
def test_momentum_is_refused_where_there_is_no_memory_for_it(method: str) -> None:
    params, optimizer = trained(method, momentum=0.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    before = values(params)
    with pytest.raises(ValueError, match=r"momentum: got 0\.9 in an optimizer that was"):
        advance(optimizer, params, [5])
    assert_same(values(params), before)


@every_method
def test_momentum_is_nothing_to_a_group_that_adamw_steps(method: str) -> None:
    moved = []
    for momentum in (0.0, 0.9):
        params = parameters(["bias"])
        optimizer = make(method, params, momentum=0.0)
        optimizer.param_groups[0]["momentum"] = momentum
        advance(optimizer, params, range(3))
        moved.append(values(params))
    assert_same(*moved)


@every_method
@pytest.mark.parametrize("replace", [False, True], ids=["in place", "other memory"])
def test_parameters_may_be_changed_between_steps(method: str, replace: bool) -> None:
    moved, still = parameters(), parameters()
    options = {"weight_decay": 0.0}
    optimizers = make(method, moved, **options), make(method, still, **options)
    advance(optimizers[0], moved, range(3))
    advance(optimizers[1], still, range(3))
    for param in moved.values():
        if replace:
            param.data = torch.zeros_like(param)
        else:
            param.detach().zero_()
    before = values(still)
    advance(optimizers[0], moved, [3])
    advance(optimizers[1], still, [3])
    for name, param in moved.items():
        assert torch.allclose(param, still[name] - before[name], atol=1e-6), name


@every_method
def test_empty_list_of_parameters_is_refused_as_by_adamw(method: str) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.AdamW([])
    with pytest.raises(ValueError, match="empty parameter list"):
        METHODS[method]([])


@every_method
def test_parameter_given_twice_is_refused_as_by_adamw(method: str) -> None:
    weight = parameters(["a"])["a"]
    for make_one in (torch.optim.AdamW, METHODS[method]):
        with pytest.raises(ValueError, match="more than one parameter group"):
            make_one([{"params": [("a", weight)]}, {"params": [("b", weight)]}])


@every_method
def test_group_without_parameters_is_taken_as_by_adamw(method: str) -> None:
    params, plain = parameters(), parameters()
    options = OPTIONS | {"fallback": None}
    groups = [{"params": []}, {"params": list(params.values())}]
    advance(METHODS[method](groups, **options), params, range(3))
    advance(METHODS[method](plain.values(), **options), plain, range(3))
    assert_same(values(params), values(plain))


@every_method
def test_frozen_and_empty_parameters_are_left_alone(method: str) -> None:
    params: Params = parameters()
    extra = {
        "frozen": torch.nn.Parameter(torch.ones(4, 4), requires_grad=False),
        "no_rows": torch.nn.Parameter(torch.zeros(0, 4)),
    }
    optimizer = make(method, params | extra, refresh="together")
    extra["no_rows"].grad = torch.zeros(0, 4)
    advance(optimizer, params, range(3))
    assert torch.equal(extra["frozen"], torch.ones(4, 4))
    plain, _ = trained(method, 3, refresh="together")
    assert_same(values(params), values(plain))


@every_method
def test_only_vectors_are_stepped_by_adamw(method: str) -> None:
    params, plain = parameters(["bias"]), parameters(["bias"])
    optimizer = METHODS[method](params.items(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
    adamw = torch.optim.AdamW(
        plain.values(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, foreach=True
    )
    advance(optimizer, params, range(5))
    advance(adamw, plain, range(5))
    assert_same(values(params), values(plain))


# Groups, copies, saved state


@every_method
@pytest.mark.parametrize("refresh", ["together", "staggered"])
def test_added_group_does_not_disturb_the_others(method: str, refresh: str) -> None:
    options = {"refresh": refresh, "precondition_frequency": 3}
    alone = parameters(["a", "bias"])
    advance(make(method, alone, **options), alone, range(10))
    params = parameters(["a", "bias"])
    optimizer = make(method, params, **options)
    advance(optimizer, params, range(5))
    before = states(optimizer)
    added = parameters(["b", "conv"])
    optimizer.add_param_group({"params": list(added.items()), "lr": 0.01})
    after = states(optimizer)
    assert_same({key: after[key] for key in before}, before)
    advance(optimizer, params | added, range(5, 10))
    assert_same(values(params), values(alone))
    assert not torch.equal(added["b"], parameters()["b"])


@every_method
def test_groups_cannot_differ_in_what_the_whole_step_obeys(method: str) -> None:
    first, *rest = parameters().items()
    others: dict[str, Any] = {"max_skipped": 7, "max_failures": 1, "compile": True}
    for key, other in others.items():
        groups: list[dict[str, Any]] = [{"params": [first]}, {"params": rest, key: other}]
        with pytest.raises(ValueError, match=f"{key}: got {other} in one group and"):
            METHODS[method](groups, **OPTIONS)
        alike = METHODS[method]([group | {key: other} for group in groups], **OPTIONS)
        assert is_compiled(alike) == (key == "compile")


@every_method
def test_an_added_group_that_is_refused_leaves_all_as_it_was(method: str) -> None:
    twin, other = trained(method, 5, refresh="staggered")
    params, optimizer = trained(method, 5, refresh="staggered")
    before = states(optimizer)
    added = torch.nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="batch_dims is 2"):
        optimizer.add_param_group({"params": [("added", added)], "batch_dims": 2, "fallback": None})
    assert len(optimizer.param_groups) == 1
    assert_same(states(optimizer), before)
    advance(optimizer, params, range(5, 10))
    advance(other, twin, range(5, 10))
    assert_same(values(params), values(twin))


def saved_by_hand(optimizer: BlockOptimizer, _: Path) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def saved_to_disk(optimizer: BlockOptimizer, folder: Path) -> dict[str, Any]:
    torch.save(optimizer.state_dict(), folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@every_method
@pytest.mark.parametrize("save", [saved_by_hand, saved_to_disk])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_loaded_state_continues_bit_equal(
    method: str, save: Callable[[BlockOptimizer, Path], dict[str, Any]], steps: int, tmp_path: Path
) -> None:
    params, optimizer = trained(method, steps)
    state = save(optimizer, tmp_path)
    others = {name: torch.nn.Parameter(param.detach().clone()) for name, param in params.items()}
    loaded = make(method, others, lr=0.7)
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["lr"] == 0.1
    assert_same(states(loaded), states(optimizer))
    advance(optimizer, params, range(steps, steps + 5))
    advance(loaded, others, range(steps, steps + 5))
    assert_same(values(others), values(params))
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
def test_copies_continue_bit_equal(method: str, duplicate: Callable[[Any], Any]) -> None:
    params, optimizer = trained(method, 5)
    others, twin = duplicate((params, optimizer))
    advance(twin, others, range(5, 10))
    at_five, _ = trained(method, 5)
    assert_same(values(params), values(at_five))
    advance(optimizer, params, range(5, 10))
    assert_same(values(others), values(params))
    assert_same(states(twin), states(optimizer))


def copied_in_groups_of_one() -> None:
    """Ranks that have nothing to do with each other, as they say, and gradients of their own."""
    torch.set_num_threads(1)
    rank = dist.get_rank()
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    params = parameters()
    optimizer = make("Shampoo", params, process_group=alone)
    advance(optimizer, params, range(10 * rank, 10 * rank + 5))
    others, twin = copy.deepcopy((params, optimizer))
    with pytest.raises(ValueError, match="process_group, pipeline_group: a group stays in its"):
        pickle.dumps(optimizer)
    for one, moved in ((optimizer, params), (twin, others)):
        advance(one, moved, range(10 * rank + 5, 10 * rank + 10))
    assert_same(values(others), values(params))
    assert_same(states(twin), states(optimizer))


def test_copies_share_the_process_group_which_cannot_be_pickled() -> None:
    run_on_ranks(2, copied_in_groups_of_one)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "block size": ({"block_size": 3}, "block_size: the state has 3, got 4; set block_size = 3"),
    "merge": ({"merge": "none"}, "merge: the state has 'none', got 'matrix'; set merge = 'none'"),
    "dims of stacks": ({"batch_dims": 1}, "batch_dims: the state has 1, got 0"),
}


def assert_refused(optimizer: BlockOptimizer, state: dict[str, Any], message: str) -> None:
    """By a ValueError, and nothing is changed."""
    before, groups = states(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(states(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


@every_method
@pytest.mark.parametrize("case", REFUSED)
def test_state_of_another_shape_is_refused_by_name(method: str, case: str) -> None:
    options, message = REFUSED[case]
    _, optimizer = trained(method, 3)
    _, other = trained(method, 2, **options)
    assert_refused(optimizer, other.state_dict(), message)


@every_method
@pytest.mark.parametrize("other", METHODS)
def test_state_of_another_method_is_refused_by_name(method: str, other: str) -> None:
    if method != other:
        _, optimizer = trained(method, 3)
        saved = trained(other, 2)[1].state_dict()
        wanted, got = METHODS[method].rule.name, METHODS[other].rule.name
        assert_refused(optimizer, saved, f"method '{got}', wanted '{wanted}'")


@every_method
def test_state_of_torchs_adamw_is_refused_by_name(method: str) -> None:
    _, optimizer = trained(method, 3)
    params = parameters()
    adamw = torch.optim.AdamW(params.values())
    advance(adamw, params, range(2))
    assert_refused(optimizer, adamw.state_dict(), "not one of titan_shampoo, wanted")


OTHER_PARAMETERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "fewer": ({"a": (7, 5), "b": (5, 5)}, r"the state has \[2\] parameters, wanted \[4\]"),
    "another shape": (SHAPES | {"b": (5, 9)}, "b: "),
    "a smaller shape": (SHAPES | {"b": (5, 4)}, "b: "),
    "another vector": (SHAPES | {"bias": (3,)}, "bias: "),
    "other order": ({n: SHAPES[n] for n in ("b", "a", "bias", "conv")}, "a: "),
    "other name": ({"a": (7, 5), "c": (5, 5), "bias": (6,), "conv": (4, 3, 2, 2)}, "'?c'?"),
}


@every_method
@pytest.mark.parametrize("case", OTHER_PARAMETERS)
def test_state_of_other_parameters_is_refused_by_name(method: str, case: str) -> None:
    shapes, message = OTHER_PARAMETERS[case]
    _, optimizer = trained(method, 3)
    others = {name: torch.nn.Parameter(t) for name, t in tensors(0, shapes).items()}
    assert_refused(optimizer, make(method, others).state_dict(), message)


# Bad input


FULL_RANK: dict[str, tuple[int, ...]] = {"square": (8, 8), "bias": (6,), "conv": (4, 2, 2, 1)}
"""Blocks whose factors have no null space, in which a basis would be a matter of rounding."""


def spoil(params: Params, name: str, value: float) -> None:
    """Gradients of which one element is not finite."""
    shapes = {other: tuple(param.shape) for other, param in params.items()}
    for other, grad in tensors(7, shapes).items():
        params[other].grad = grad.to(params[other].dtype)
    params[name].grad.view(-1)[3] = value  # type: ignore[union-attr]


def states_but_schedule(optimizer: BlockOptimizer) -> dict[str, Tensor]:
    """All state but the host's place in the schedule, which goes on whatever happens."""
    return {key: value for key, value in states(optimizer).items() if "cursor" not in key}


@every_method
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["a", "bias"])
@pytest.mark.parametrize("step", [0, 4])
def test_a_gradient_that_is_not_finite_changes_nothing(
    method: str, value: float, name: str, step: int
) -> None:
    params, optimizer = trained(method, step)
    before, state = values(params), states_but_schedule(optimizer)
    spoil(params, name, value)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(values(params), before)
    assert_same(states_but_schedule(optimizer), state)
    advance(optimizer, params, range(step, step + 3))
    assert optimizer.skipped_steps == 1
    assert not torch.equal(params[name], before[name])


@every_method
@pytest.mark.parametrize("extra", [
    {},
    {"weight_decay_type": "l2", "nesterov": True, "precondition_frequency": 3},
    {"state_dtype": torch.bfloat16, "start_step": 2, "factor_frequency": 2},
])  # fmt: skip
def test_a_device_that_decides_for_itself_skips_the_same_steps(
    method: str, extra: dict[str, Any]
) -> None:
    """What accelerators do, on a CPU: the host learns of a skipped step in the next one."""
    results = []
    for late in (False, True):
        start = tensors(0, FULL_RANK)
        params = {name: torch.nn.Parameter(value.double()) for name, value in start.items()}
        optimizer = make(method, params, **extra)
        read_late(optimizer, late)
        known = []
        for step in range(8):
            if step in (0, 3, 4):
                spoil(params, "square", torch.nan)
                optimizer.step()
                assert all(param.isfinite().all() for param in params.values())
                known.append(optimizer.skipped_steps)
            for name, grad in tensors(1000 * step, FULL_RANK).items():
                params[name].grad = grad.double()
            optimizer.step()
        assert known == ([0, 1, 2] if late else [1, 2, 3])
        assert optimizer.skipped_steps == 3
        results.append(values(params) | states(optimizer))
    for key, expected in results[0].items():
        assert torch.allclose(results[1][key], expected, rtol=1e-5, atol=1e-8), key


@every_method
def test_a_skipped_first_refresh_leaves_bounded_steps(method: str) -> None:
    params = {"w": torch.nn.Parameter(tensors(0, {"w": (8, 8)})["w"])}
    extra: dict[str, Any] = {"basis_method": "qr"} if method == "SOAP" else {}
    optimizer = make(method, params, start_step=1, refresh="together", momentum=0.0, **extra)
    params["w"].grad = torch.full((8, 8), torch.nan)
    optimizer.step()
    for step in range(1, 10):
        before = params["w"].detach().clone()
        params["w"].grad = tensors(step, {"w": (8, 8)})["w"]
        optimizer.step()
        assert float((params["w"].detach() - before).abs().max()) < 20 * OPTIONS["lr"]


REFRESHES: dict[str, tuple[Any, str]] = {
    "Shampoo": (shampoo, "inverse_root"),
    "SOAP": (soap, "next_basis"),
    "KLShampoo": (kl_shampoo, "floored_inverse_root"),
}
LAST = {"Shampoo": "left_root", "SOAP": "left_basis", "KLShampoo": "left_root"}


def break_first_block(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshes give NaN for the first block of every stack."""
    module, name = REFRESHES[method]
    working = getattr(module, name)

    def broken(matrices: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found, beside = working(matrices, *args, **kwargs)
        found[0] = torch.nan
        return found, beside

    monkeypatch.setattr(module, name, broken)


def halves(method: str) -> tuple[Params, BlockOptimizer]:
    """One parameter of two blocks, refreshed in steps 2, 4, ..."""
    params = {"w": torch.nn.Parameter(tensors(0, {"w": (8, 4)})["w"])}
    options = {"start_step": 2, "refresh": "together", "momentum": 0.0}
    return params, make(method, params, **options)


def step_halves(optimizer: BlockOptimizer, params: Params, step: int) -> None:
    params["w"].grad = tensors(step, {"w": (8, 4)})["w"]
    optimizer.step()


@every_method
def test_a_failing_refresh_keeps_the_last_good_one(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = halves(method)
    twins, twin = halves(method)
    for step in range(1, 4):
        step_halves(optimizer, params, step)
        step_halves(twin, twins, step)
    state = {key: value.clone() for key, value in optimizer.state[params["w"]].items()}
    # The twin is not refreshed in step 4.
    twin.param_groups[0]["precondition_frequency"] = 100
    step_halves(twin, twins, 4)
    break_first_block(method, monkeypatch)
    step_halves(optimizer, params, 4)
    assert optimizer.failed_refreshes == 1
    after = optimizer.state[params["w"]]
    first, second = (of_blocks(some, LAST[method]) for some in (after, state))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert torch.allclose(params["w"][:4], twins["w"][:4], atol=1e-6)
    assert params["w"].isfinite().all()


@every_method
def test_a_failing_first_refresh_leaves_the_identity_and_bounded_steps(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = halves(method)
    step_halves(optimizer, params, 1)
    with monkeypatch.context() as patch:
        break_first_block(method, patch)
        step_halves(optimizer, params, 2)
        step_halves(optimizer, params, 3)
    assert optimizer.failed_refreshes == 1
    kept = of_blocks(optimizer.state[params["w"]], LAST[method])[0]
    assert torch.equal(kept, kept[0, 0] * torch.eye(4))  # KL-Shampoo's, in units of the gradient
    assert kept[0, 0] == 1 or method == "KLShampoo"
    for step in range(4, 12):
        before = params["w"].detach().clone()
        step_halves(optimizer, params, step)
        assert float((params["w"].detach() - before).abs().max()) < 20 * OPTIONS["lr"]
    assert not torch.equal(of_blocks(optimizer.state[params["w"]], LAST[method])[0], torch.eye(4))
    assert optimizer.failed_refreshes == 1


@every_method
@pytest.mark.parametrize("start_step", [1, 2])
def test_an_all_zero_block_stays_and_does_not_disturb_its_neighbour(
    method: str, start_step: int
) -> None:
    options: dict[str, Any] = {"weight_decay": 0.0, "start_step": start_step, "refresh": "together"}
    both = {"w": torch.nn.Parameter(tensors(0, {"w": (8, 4)})["w"])}
    lone = {"w": torch.nn.Parameter(both["w"].detach()[4:].clone())}
    start = both["w"].detach().clone()
    optimizers = make(method, both, **options), make(method, lone, **options)
    for step in range(8):
        grad = tensors(step + 1, {"w": (8, 4)})["w"]
        grad[:4] = 0
        both["w"].grad, lone["w"].grad = grad, grad[4:]
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(both["w"][:4], start[:4])
    assert torch.allclose(both["w"][4:], lone["w"], atol=1e-5)
    assert not torch.equal(lone["w"], start[4:])
    assert optimizers[0].failed_refreshes == 0
