"""Methods for layers fail as those for blocks do: alike on all ranks, named, mended in time."""

import itertools
import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.block_views import of_blocks
from tests.support.internals import read_late, repair
from tests.support.layer_methods import advance, every_method, loss_of, make, states, values
from tests.support.layer_models import Mixed, made
from tests.support.ranks import run_on_ranks
from titan_shampoo import FOOF, KFAC
from titan_shampoo.functional import kfac

inverted = pytest.mark.parametrize("method", ["FOOF", "KFAC"])
EVERY_STEP: dict[str, Any] = {"precondition_frequency": 1}


def spoil_first_inverse(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
    """The first matrix of every call in one of ``dtypes`` has no inverse."""
    sound = kfac.damped_inverse

    def spoiled(factor: Tensor, damping: Tensor) -> Tensor:
        inverse = sound(factor, damping)
        if factor.dtype in dtypes and len(inverse):
            inverse[0] = math.nan
        return inverse

    monkeypatch.setattr(kfac, "damped_inverse", spoiled)


@inverted
def test_failed_refresh_is_named_once_and_mended_in_float64(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = made(Mixed).float()
    optimizer = make(method, model, **EVERY_STEP)
    spoil_first_inverse(monkeypatch, torch.float32)
    advance(optimizer, model, [0])
    failed = [key for key, value in states(optimizer).items() if "failures" in key and value]
    assert len(failed) == optimizer.failed_refreshes > 0
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        advance(optimizer, model, [1, 2])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(failed)
    assert all("a refresh failed and is repeated in float64" in line for line in messages)
    assert messages[0].startswith(("conv.weight, block 0", "wide.weight, block 0"))
    assert not any(value for key, value in states(optimizer).items() if "failures" in key)


@inverted
def test_repetition_in_float64_gives_the_inverses_of_the_failed_step(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = made(Mixed).float(), made(Mixed).float()
    optimizer, sound = make(method, model, **EVERY_STEP), make(method, twin, **EVERY_STEP)
    with monkeypatch.context() as patch:
        spoil_first_inverse(patch, torch.float32)
        advance(optimizer, model, [0])
    advance(sound, twin, [0])
    repair(optimizer)
    mended, expected = states(optimizer), states(sound)
    for key in [key for key in expected if "inverse" in key]:
        assert torch.allclose(mended[key], expected[key], rtol=1e-3, atol=1e-4), key


@inverted
def test_a_repetition_that_is_finite_in_float64_alone_is_not_taken(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(Mixed).float()
    optimizer = make(method, model, **EVERY_STEP)
    spoil_first_inverse(monkeypatch, torch.float32)
    advance(optimizer, model, [0])
    failed = [key for key, value in states(optimizer).items() if "failures" in key and value]
    sound = kfac.damped_inverse
    monkeypatch.setattr(kfac, "damped_inverse", lambda *args: sound(*args) * 1e100)
    repair(optimizer)
    after = states(optimizer)
    assert failed
    assert all(after[key] == 1 for key in failed)
    assert all(value.isfinite().all() for value in after.values())


@inverted
def test_block_that_fails_too_often_ends_the_run(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(Mixed)
    optimizer = make(method, model, max_failures=3, **EVERY_STEP)
    spoil_first_inverse(monkeypatch, torch.float64)
    advance(optimizer, model, range(3))
    assert all(value.isfinite().all() for value in values(model).values())
    with pytest.raises(RuntimeError, match=r"3 refreshes of a block failed in a row.*damping"):
        advance(optimizer, model, [3])


@every_method
@pytest.mark.parametrize("extra", [
    {},
    {"weight_decay_type": "l2", "nesterov": True, "fallback": "sgd"},
    {"damping_mode": "relative", "momentum": 0.0},
])  # fmt: skip
def test_a_device_that_decides_for_itself_skips_the_same_steps(
    method: str, extra: dict[str, Any]
) -> None:
    """What accelerators do, on a CPU: the host learns of a skipped step in the next one."""
    results = []
    for late in (False, True):
        model = made(Mixed)
        optimizer = make(method, model, **extra)
        read_late(optimizer, late)
        known = []
        for step in range(8):
            if step in (0, 3, 4):
                optimizer.zero_grad()
                loss_of(model, 100 + step).backward()
                model.wide.weight.grad[0, 0] = torch.nan
                optimizer.step()
                assert all(value.isfinite().all() for value in values(model).values())
                known.append(optimizer.skipped_steps)
            advance(optimizer, model, [step])
        assert known == ([0, 1, 2] if late else [1, 2, 3])
        assert optimizer.skipped_steps == 3
        results.append(values(model) | states(optimizer))
    for key, expected in results[0].items():
        assert torch.allclose(results[1][key], expected, rtol=1e-9, atol=1e-12), key


@inverted
def test_inversions_are_spread_over_the_period(method: str) -> None:
    model = made(Mixed)
    optimizer = make(method, model, precondition_frequency=5)
    counts = []
    for step in range(10):
        advance(optimizer, model, [step])
        refreshes = [value for key, value in states(optimizer).items() if "refreshes" in key]
        counts.append(int(torch.stack(refreshes).sum()))
    assert [later - earlier for earlier, later in itertools.pairwise(counts)] == [1] * 9


@inverted
def test_every_inverse_has_its_turn_after_a_state_with_a_shorter_period_is_loaded(
    method: str,
) -> None:
    model, twin = made(Mixed), made(Mixed)
    optimizer, short = make(method, model, precondition_frequency=10), make(method, twin)
    short.param_groups[0]["precondition_frequency"] = 3
    advance(short, twin, [0])
    optimizer.load_state_dict(short.state_dict())
    advance(optimizer, model, range(1, 4))
    assert all(value > 0 for key, value in states(optimizer).items() if "refreshes" in key)


def fail_on_owner(method: str) -> str:
    """The error that this rank raises when blocks of rank 0 alone fail."""
    model = made(Mixed)
    for module in model.children():
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = make(method, model, max_failures=1, **EVERY_STEP)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            spoil_first_inverse(patch, torch.float64)
        advance(optimizer, model, [0])
    try:
        advance(optimizer, model, [1])
    except RuntimeError as error:
        return str(error)
    return "no error"


@inverted
def test_failing_block_of_one_rank_ends_all_ranks_alike(method: str) -> None:
    errors = run_on_ranks(2, fail_on_owner, method)
    assert errors[0] == errors[1]
    assert errors[0].startswith("1 refreshes of a block failed in a row")


def test_inverse_of_a_singular_matrix_is_nan_and_spoils_no_other() -> None:
    """A triangle with a zero on its diagonal raised LinAlgError."""
    factors = torch.stack([torch.ones(4, 4), torch.eye(4), torch.full((4, 4), torch.nan)])
    inverse = kfac.damped_inverse(factors, torch.full((3,), 1e-12))
    assert inverse[0].isnan().all()
    assert torch.allclose(inverse[1], torch.eye(4))
    assert inverse[2].isnan().all()


ONE_ROW = torch.randn(1, 16, generator=torch.Generator().manual_seed(5))


def rows(kind: str, step: int) -> Tensor:
    """Inputs of a layer, of which second moments have few eigenvalues, or none."""
    generator = torch.Generator().manual_seed(step)
    if kind == "one row":
        return torch.randn(1, 16, generator=generator)
    if kind == "whole numbers":
        return torch.full((8, 16), 2.0)
    if kind == "zeros":
        return torch.zeros(8, 16)
    return ONE_ROW.expand(8, 16).contiguous()


@pytest.mark.parametrize("kind", ["equal rows", "whole numbers", "one row", "zeros"])
@pytest.mark.parametrize("gradients", ["zero", "random"])
@pytest.mark.parametrize(
    "options",
    [
        {"damping": 1e-9},
        {"damping": 1e-9, "damping_mode": "relative"},
        {"damping_mode": "relative"},
        {"damping": 1e-20},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["FOOF", "K-FAC", "K-FAC, exact"])
def test_moments_of_few_directions_end_no_run(
    name: str, options: dict[str, Any], gradients: str, kind: str
) -> None:
    """What cannot be inverted in float32 is counted, and mended in float64 in the next step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8)
    model = torch.nn.Sequential(layer)
    exact = {"factored_damping": False} if name == "K-FAC, exact" else {}
    make_one: Any = FOOF if name == "FOOF" else KFAC
    optimizer = make_one(model.named_parameters(), model=model, lr=1e-3, **EVERY_STEP, **exact,
                         **options)  # fmt: skip
    for step in range(8):
        optimizer.zero_grad()
        output = model(rows(kind, step))
        generator = torch.Generator().manual_seed(100 + step)
        back = torch.randn(output.shape, generator=generator) * (gradients == "random")
        (output * back).mean().backward()
        optimizer.step()
    # Damping of 1e-20 leaves directions that float32 does not hold.
    assert optimizer.skipped_steps == 0 or options == {"damping": 1e-20}
    assert layer.weight.isfinite().all()
    state = optimizer.state[layer.weight]
    assert of_blocks(state, "refreshes")[0] >= 7  # each failure is mended but the last
    assert optimizer.failed_refreshes <= 8


def test_a_failed_inverse_is_that_of_the_damped_factor_one_step_later() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8, bias=False)
    model = torch.nn.Sequential(layer)
    optimizer = FOOF(model.named_parameters(), model=model, lr=0.0, damping=1e-9,
                     precondition_frequency=100)  # fmt: skip
    for step in range(2):
        optimizer.zero_grad()
        model(rows("equal rows", step)).sum().backward()
        optimizer.step()
    assert optimizer.failed_refreshes == 1
    values, vectors = torch.linalg.eigh(
        of_blocks(optimizer.state[layer.weight], "right")[0].double()
    )
    expected = (vectors / (values.clamp(min=0) + 1e-9)) @ vectors.mT
    found = of_blocks(optimizer.state[layer.weight], "right_inverse")[0].double()
    assert (found - expected).norm() < 1e-4 * expected.norm()
