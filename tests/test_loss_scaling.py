"""GradScaler and gradient clipping: who skips a step, what changes in it, and who counts it.

``late`` is what accelerators do: the host learns of a skipped step in the next one.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tests.support.copied_state import assert_same
from tests.support.internals import read_late
from tests.support.ranks import run_on_ranks
from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo

BLOCKS: dict[str, Any] = {
    "block_size": 8, "precondition_frequency": 2, "start_step": 1, "weight_decay": 0.1,
    "momentum": 0.5,
}  # fmt: skip
SCALED: dict[str, tuple[Any, dict[str, Any]]] = {
    "Shampoo": (Shampoo, BLOCKS),
    "SOAP": (SOAP, BLOCKS),
    "KLShampoo": (KLShampoo, BLOCKS),
    "EvaS": (EvaS, {"weight_decay": 0.1}),
}
TAPPED: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "FOOF": FOOF, "KFAC": KFAC}

every_scaled_method = pytest.mark.parametrize("method", SCALED)
late_or_not = pytest.mark.parametrize("late", [False, True])


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10), nn.Linear(10, 4, bias=False)
    return nn.Sequential(*layers).to(dtype)


def made(method: str, model: nn.Module, late: bool) -> Any:
    kind, options = SCALED[method]
    optimizer = kind(model.named_parameters(), lr=0.01, **options)
    read_late(optimizer, late)
    return optimizer


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    dtype = next(model.parameters()).dtype
    output: Tensor = model(inputs.to(dtype))
    return output.square().mean()


def backward(model: nn.Module, step: int, times: float = 1.0) -> None:
    """The gradients of one step, ``times`` what they are; infinite for infinity."""
    model.zero_grad()
    loss_of(model, step).backward()
    for param in model.parameters():
        assert param.grad is not None
        param.grad.mul_(times)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and state, copied."""
    found = {name: param.detach().clone() for name, param in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": value.clone() for key, value in state.items()}
    return found


def scaler_of(scale: float = 2.0**10) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


# A scaler


@every_scaled_method
@late_or_not
def test_a_step_that_a_scaler_skips_changes_nothing_and_is_not_counted(
    method: str, late: bool
) -> None:
    """Not even the schedule of refreshes: the optimizer is not called."""
    model, twin = network(), network()
    optimizer, plain = made(method, model, late), made(method, twin, late)
    scaler = scaler_of()
    for step in range(6):
        is_bad = step in (0, 2, 3)
        before = everything(model, optimizer)
        model.zero_grad()
        scaler.scale(loss_of(model, step) * (torch.inf if is_bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if is_bad:
            assert_same(everything(model, optimizer), before)
        else:
            backward(twin, step)
            plain.step()
    assert scaler.get_scale() == 2.0**7
    assert optimizer.skipped_steps == 0
    assert_same(everything(model, optimizer), everything(twin, plain))


@every_scaled_method
def test_a_scale_that_is_too_large_to_begin_with_does_not_end_the_run(method: str) -> None:
    """Float16, as autocast has it: more than 20 steps in a row overflow, which is max_skipped."""
    model = network()
    optimizer = made(method, model, late=False)
    scaler = scaler_of(2.0**40)
    skipped, losses = 0, []
    for step in range(50):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, step % 2)
        losses.append(float(loss.detach()))
        before = everything(model, optimizer)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        skipped += torch.equal(before["0.weight"], everything(model, optimizer)["0.weight"])
    assert skipped > 20
    assert optimizer.skipped_steps == 0
    assert losses[-1] < 0.9 * losses[1]


@every_scaled_method
@late_or_not
def test_unscaling_clipping_and_stepping_is_clipping_and_stepping(method: str, late: bool) -> None:
    """The order of Trainer, accelerate and Lightning."""
    model, twin = network(), network()
    optimizer, plain = made(method, model, late), made(method, twin, late)
    scaler = scaler_of()
    for step in range(5):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1e-2)
        scaler.step(optimizer)
        scaler.update()
        backward(twin, step)
        clip_grad_norm_(twin.parameters(), 1e-2)
        plain.step()
    assert_same(everything(model, optimizer), everything(twin, plain))


@every_scaled_method
def test_a_scaler_that_skips_puts_off_the_news_of_a_step_skipped_by_the_device(
    method: str,
) -> None:
    """The optimizer is not called in these, and reads in the next step that it takes."""
    model = network()
    optimizer = made(method, model, late=True)
    scaler = scaler_of()
    known = []
    for step, spoilt in enumerate(["", "after unscaling", "before", "before", "", ""]):
        model.zero_grad()
        scaler.scale(loss_of(model, step) * (torch.inf if spoilt == "before" else 1.0)).backward()
        scaler.unscale_(optimizer)
        if spoilt == "after unscaling":  # as a hook of somebody else may do
            next(model.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        known.append(optimizer.skipped_steps)
    assert known == [0, 0, 0, 0, 1, 1]
    assert all(param.isfinite().all() for param in model.parameters())


def scaled_on_shards(method: str, bad_rank: int) -> list[Any]:
    """Whether a step moved this rank's shards, with an infinite gradient on one rank in step 1."""
    model = network()
    for layer in model.children():
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = made(method, model, late=False)
    scaler = scaler_of()
    moved = []
    for step in range(3):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        params = [param for param in model.parameters() if param.to_local().numel()]  # type: ignore[attr-defined]
        if step == 1 and dist.get_rank() == bad_rank:
            params[0].grad.to_local().view(-1)[0] = torch.inf  # type: ignore[union-attr]
        before = [param.detach().to_local().clone() for param in params]  # type: ignore[attr-defined]
        scaler.step(optimizer)
        scaler.update()
        pairs = zip(params, before, strict=True)
        moved.append(not all(torch.equal(p.detach().to_local(), old) for p, old in pairs))  # type: ignore[attr-defined]
    return [moved, scaler.get_scale(), optimizer.skipped_steps]


@pytest.mark.parametrize("method", ["Shampoo", "EvaS"])
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_overflow_on_one_shard_is_skipped_by_the_scalers_of_all(
    method: str, bad_rank: int
) -> None:
    """FSDP2: no rank enters the step alone, and waits there for the others."""
    results = run_on_ranks(2, scaled_on_shards, method, bad_rank)
    assert results == [[[True, False, True], 2.0**9, 0]] * 2


# A scaler and taps


@pytest.mark.parametrize("method", TAPPED)
@pytest.mark.parametrize("clips", [False, True])
def test_tapped_methods_refuse_a_scaler_by_name_in_every_step(method: str, clips: bool) -> None:
    model = network()
    optimizer = TAPPED[method](model.named_parameters(), lr=0.01, model=model)
    before = everything(model, optimizer)
    for step in range(2):
        scaler = scaler_of()
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if clips:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(RuntimeError, match=r"^GradScaler: .* train in bfloat16 without one$"):
            scaler.step(optimizer)
        assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("method", TAPPED)
def test_tapped_methods_take_a_scaler_that_is_switched_off(method: str) -> None:
    """As one training loop for several precisions has it."""
    results = []
    for is_scaled in (False, True):
        model = network()
        optimizer = TAPPED[method](model.named_parameters(), lr=0.01, model=model)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer) if is_scaled else optimizer.step()
            scaler.update()
        results.append(everything(model, optimizer))
    assert_same(*results)


# Clipping


def by_norm(params: Any) -> None:
    clip_grad_norm_(params, 1.0)


def by_value(params: Any) -> None:
    clip_grad_value_(params, 1.0)


@every_scaled_method
@late_or_not
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_clipping_by_norm_does_not_hide_a_bad_gradient(
    method: str, late: bool, value: float
) -> None:
    """Infinity times the zero that it is clipped by is no number."""
    model, twin = network(), network()
    optimizer, plain = made(method, model, late), made(method, twin, late)
    known = []
    for step in range(4):
        for some, each in ((model, optimizer), (twin, plain)):
            backward(some, step)
            if step == 1:
                next(some.parameters()).grad.view(-1)[3] = value  # type: ignore[union-attr]
            if some is model:
                clip_grad_norm_(some.parameters(), 1e9)
            each.step()
        known.append(optimizer.skipped_steps)
    assert known == ([0, 0, 1, 1] if late else [0, 1, 1, 1])
    assert_same(everything(model, optimizer), everything(twin, plain))


@every_scaled_method
@late_or_not
def test_clipping_by_value_takes_infinity_for_its_bound(method: str, late: bool) -> None:
    """The step is taken, as by any optimizer, and not counted: it sees finite gradients."""
    model = network()
    optimizer = made(method, model, late)
    backward(model, 0)
    weight = next(model.parameters())
    assert weight.grad is not None
    weight.grad[0, 0] = torch.inf
    before = weight.detach().clone()
    clip_grad_value_(model.parameters(), 1.0)
    assert weight.grad[0, 0] == 1.0
    optimizer.step()
    backward(model, 1)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not torch.equal(weight, before)


@every_scaled_method
@late_or_not
@pytest.mark.parametrize(("clip", "skipped"), [(None, 1), (by_norm, 0), (by_value, 0)])
def test_a_norm_that_overflows_is_skipped_unless_clipping_makes_zeros_of_it(
    method: str, late: bool, clip: Callable[[Any], None] | None, skipped: int
) -> None:
    """Finite gradients whose squares are not: torch clips them to zero, and the step is taken."""
    model = network()
    optimizer = made(method, model, late)
    backward(model, 0, times=1e30)
    if clip is not None:
        clip(model.parameters())
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    assert any(grad.any() for grad in grads) == (clip is not by_norm)
    optimizer.step()
    backward(model, 1)
    optimizer.step()
    assert optimizer.skipped_steps == skipped
    assert all(param.isfinite().all() for param in model.parameters())


@every_scaled_method
def test_clipping_that_raises_leaves_all_to_the_next_step(method: str) -> None:
    model, twin = network(), network()
    optimizer, plain = made(method, model, late=False), made(method, twin, late=False)
    for step in range(3):
        backward(model, step, times=torch.inf if step == 1 else 1.0)
        if step == 1:
            with pytest.raises(RuntimeError, match="non-finite"):
                clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            continue
        optimizer.step()
        backward(twin, step)
        plain.step()
    assert optimizer.skipped_steps == 0
    assert_same(everything(model, optimizer), everything(twin, plain))
