"""What goes wrong is decided by all ranks alike, named once, mended, and ends a run in time."""

import logging
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.support.block_views import of_blocks
from tests.support.checkpoint_runs import Run, run_in
from tests.support.internals import repair
from tests.support.ranks import run_on_ranks
from titan_shampoo import Shampoo
from titan_shampoo.distributed.layout import local_tensor
from titan_shampoo.distributed.state import BlockTensor
from titan_shampoo.functional import shampoo
from titan_shampoo.functional.roots import Root, inverse_root


def matrix_and_optimizer(**options: Any) -> tuple[torch.nn.Parameter, Shampoo]:
    weight = torch.nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    defaults: dict[str, Any] = {
        "lr": 0.1,
        "block_size": 2,
        "precondition_frequency": 1,
        "start_step": 1,
    }
    return weight, Shampoo([("w", weight)], **defaults | options)


def take_step(weight: Tensor, optimizer: Shampoo, step: int) -> None:
    weight.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
    optimizer.step()


def spoil_first_root(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> None:
    """The first matrix of every call in one of ``dtypes`` has no root."""

    def spoiled(matrices: Tensor, *args: Any, **kwargs: Any) -> Root:
        found = inverse_root(matrices, *args, **kwargs)
        if matrices.dtype in dtypes:
            found.root[0] = math.nan
        return found

    monkeypatch.setattr(shampoo, "inverse_root", spoiled)


def test_failed_refresh_is_named_once_and_mended_in_float64(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spoil_first_root(monkeypatch, torch.float32)
    weight, optimizer = matrix_and_optimizer()
    take_step(weight, optimizer, 1)
    state = optimizer.state[weight]
    assert torch.equal(of_blocks(state, "left_root")[0], torch.eye(2))
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        take_step(weight, optimizer, 2)
        take_step(weight, optimizer, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "w, block 0: a refresh failed and is repeated in float64; the last good one stays in use"
    ]
    assert not torch.equal(of_blocks(state, "left_root")[0], torch.eye(2))
    assert of_blocks(state, "failures")[0] == 0
    assert optimizer.failed_refreshes == 1


def test_repetition_in_float64_gives_the_roots_of_the_failed_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, optimizer = matrix_and_optimizer(precondition_frequency=100, refresh="together")
    with monkeypatch.context() as patch:
        spoil_first_root(patch, torch.float32)
        take_step(weight, optimizer, 1)
    twin, sound = matrix_and_optimizer(precondition_frequency=100, refresh="together")
    take_step(twin, sound, 1)
    repair(optimizer)
    mended, expected = optimizer.state[weight], sound.state[twin]
    for name in ("left_root", "right_root"):
        found, wanted = of_blocks(mended, name)[0], of_blocks(expected, name)[0]
        assert torch.allclose(found, wanted, rtol=1e-3)


def test_a_repetition_that_is_finite_in_float64_alone_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, optimizer = matrix_and_optimizer()
    take_step(weight, optimizer, 1)
    spoil_first_root(monkeypatch, torch.float32)
    take_step(weight, optimizer, 2)
    last = of_blocks(optimizer.state[weight], "left_root")[0].clone()

    def large(matrices: Tensor, *args: Any, **kwargs: Any) -> Root:
        root, condition = inverse_root(matrices, *args, **kwargs)
        return Root(root * 1e100, condition)

    monkeypatch.setattr(shampoo, "inverse_root", large)
    repair(optimizer)
    assert torch.equal(of_blocks(optimizer.state[weight], "left_root")[0], last)
    assert of_blocks(optimizer.state[weight], "failures")[0] == 1


@pytest.mark.parametrize("method", ["newton", "newton_schulz", "qr", "eigh"])
@pytest.mark.parametrize("rank", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_of_few_directions_end_no_run(rank: int, method: str) -> None:
    """Rounding of a thousand steps leaves negative eigenvalues of up to three of its units."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(16, rank, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(16, 8))
    options: dict[str, Any] = {"root_method": method, "precondition_frequency": 20}
    optimizer = Shampoo([("w", weight)], lr=0.01, **options)
    for _ in range(1500):
        weight.grad = directions @ torch.randn(rank, 8, generator=generator)
        optimizer.step()
    if method != "newton_schulz":  # whose failures are mended in the next step
        assert of_blocks(optimizer.state[weight], "refreshes")[0] == 75
        assert optimizer.failed_refreshes == 0
    assert weight.isfinite().all()


def test_block_that_fails_too_often_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_first_root(monkeypatch, torch.float32, torch.float64)
    weight, optimizer = matrix_and_optimizer(max_failures=3)
    for step in range(1, 4):
        take_step(weight, optimizer, step)
    assert weight.isfinite().all()
    with pytest.raises(RuntimeError, match="3 refreshes of a block failed in a row"):
        take_step(weight, optimizer, 4)


def test_too_many_steps_without_finite_gradients_end_the_run() -> None:
    weight, optimizer = matrix_and_optimizer(max_skipped=3)
    before = weight.detach().clone()
    weight.grad = torch.full((4, 4), math.nan)
    for _ in range(2):
        optimizer.step()
    with pytest.raises(RuntimeError, match="3 steps in a row had a gradient that is not finite"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.skipped_steps == 3


def skip_on_all(bad_rank: int) -> tuple[bool, int, bool]:
    """One rank's shard of the gradient is bad: unchanged parameter, skipped steps, moved after."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weight: Any = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = Shampoo([("w", weight)], lr=0.1, block_size=3)
    before = weight.detach().full_tensor()
    grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    weight.grad = grad.clone()
    if dist.get_rank() == bad_rank:
        weight.grad.to_local()[0, 0] = math.inf
    optimizer.step()
    unchanged = torch.equal(weight.detach().full_tensor(), before)
    weight.grad = grad.clone()
    optimizer.step()
    moved = not torch.equal(weight.detach().full_tensor(), before)
    return unchanged, optimizer.skipped_steps, moved


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_bad_gradient_of_one_rank_is_skipped_by_all(bad_rank: int) -> None:
    assert run_on_ranks(2, skip_on_all, bad_rank) == [(True, 1, True)] * 2


def fail_on_owner() -> str:
    """The error that this rank raises when blocks of rank 0 alone fail."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    weight: Any = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    options: dict[str, Any] = {"block_size": 2, "precondition_frequency": 1, "start_step": 1}
    optimizer = Shampoo([("w", weight)], lr=0.1, max_failures=1, **options)
    if dist.get_rank() == 0:
        with pytest.MonkeyPatch.context() as patch:
            spoil_first_root(patch, torch.float32, torch.float64)
            weight.grad = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
            optimizer.step()
    else:
        weight.grad = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        optimizer.step()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_failing_block_of_one_rank_ends_all_ranks_alike() -> None:
    errors = run_on_ranks(2, fail_on_owner)
    assert errors[0] == errors[1]
    assert errors[0].startswith("1 refreshes of a block failed in a row")


def random_places() -> list[tuple[int, int, float]]:
    """Rank, parameter and value of bad numbers."""
    draw = random.Random(0)
    values = (math.nan, math.inf, -math.inf)
    return [(draw.randrange(2), draw.randrange(5), draw.choice(values)) for _ in range(20)]


def snapshot(run: Run) -> dict[str, Tensor]:
    """Weights and state on this rank, but for the schedule, which goes on."""
    tensors = run.manager._state.tensors(run.manager._state.components)
    return {
        f"{key} {start}": chunk.clone()
        for key, value in tensors.items()
        if not key.endswith("cursor")
        for start, chunk in (
            value.chunks if isinstance(value, BlockTensor) else {(): local_tensor(value)}
        ).items()
    }


def poison(folder: Path, method: str) -> list[tuple[str, list[str], int, list[str]]]:
    """For each place: its parameter, what changed, steps skipped, and what this rank said."""
    found = []
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titan_shampoo").addHandler(handler)
    with run_in(folder, "fsdp2", method, load_only=True) as run:
        for rank, number, value in random_places():
            run.step()
            run._differentiate()
            name, param = list(run.model.named_parameters())[number]
            if dist.get_rank() == rank:
                assert param.grad is not None
                local_tensor(param.grad).view(-1)[-1] = value
            before = snapshot(run)
            run.optimizers.step()
            after = snapshot(run)
            changed = [key for key in before if not torch.equal(before[key], after[key])]
            said = [line for line in heard if line.startswith("not finite")]
            found.append((name, changed, run.optimizers.failures()["skipped_steps"], said))
            heard.clear()
    return found


@pytest.mark.parametrize("method", ["Shampoo", "SOAP", "Eva", "KFAC"])
def test_a_bad_number_anywhere_changes_nothing_is_counted_and_named(
    tmp_path: Path, method: str
) -> None:
    ranks = run_on_ranks(2, poison, tmp_path, method)
    for place, (rank, _, _) in enumerate(random_places()):
        for here, found in enumerate(ranks):
            name, changed, skipped, said = found[place]
            assert changed == []
            assert skipped == place + 1
            expected = [f"not finite on this rank: gradient of {name}"]
            assert said == (expected if here == rank else [])
