"""A run that is interrupted and resumed is the run that was not; another run's state is refused."""

import random

import numpy as np
import pytest
import torch

from checkpoint.errors import CheckpointError
from tests.support.checkpoint_runs import LAYER_METHODS, SHAPES, run_in
from tests.support.ranks import run_on_ranks
from titan_shampoo.distributed.state import BlockTensor

STEPS = 12
METHODS = ("Shampoo", "SOAP", "KLShampoo", *LAYER_METHODS, "AdamW", "SGD")
IN_EVERY_STEP = ("Shampoo", "FOOF", "KFAC")
NOISE = 0.1


def digests_of_resumed_runs(folder, method, starts, steps):
    """The final digest of a run, and of those resumed after each of ``starts``."""
    with run_in(folder, "fsdp2", method, noise=NOISE) as run:
        run.manager.load()
        run.train(steps)
        whole = run.local_bytes()
    found = {}
    for start in starts:
        with run_in(folder, "fsdp2", method, noise=NOISE, load_only=True) as run:
            assert run.manager.load(start)
            assert run.progress.value == start
            run.train(steps)
            found[start] = run.local_bytes()
    return whole, found


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumed_after_any_step_ends_with_the_same_bits(tmp_path, method):
    # A period of six steps with FOOF and K-FAC: moments every second, inversions every third.
    starts = range(1, STEPS if method == "Shampoo" else 7) if method in IN_EVERY_STEP else (1, 5, 8)
    assert_same_bits(tmp_path, method, starts, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_one_of_twenty_steps_may_be_the_last_before_an_interruption(tmp_path, method):
    assert_same_bits(tmp_path, method, range(1, 20), 20)


def assert_same_bits(folder, method, starts, steps):
    ranks = run_on_ranks(2, digests_of_resumed_runs, folder, method, starts, steps)
    for whole, found in ranks:
        assert [start for start, digest in found.items() if digest != whole] == []


def drop(run, what):
    """Put a component back to what it is at the start of a run."""
    tensors = run.manager._state.tensors(run.manager._state.components)
    for key, value in tensors.items():
        name = key.rsplit(".", 2)[-2] if key[-1].isdecimal() else key.rsplit(".", 1)[-1]
        if name in what:
            chunks = value.chunks.values() if isinstance(value, BlockTensor) else [value]
            for chunk in chunks:
                chunk.zero_()
    if "rng" in what:
        torch.manual_seed(0)
    for counter in (run.rates, run.loader):
        if counter.key in what:
            counter.value = 0


COMPONENTS = (
    ("left",), ("right",), ("left_root",), ("right_root",), ("exp_avg",), ("exp_avg_sq",),
    ("momentum",), ("step",), ("cursor",), ("rng",), ("last_epoch",), ("samples",),
)  # fmt: skip


def digests_without(folder, components):
    with run_in(folder, "fsdp2", noise=NOISE) as run:
        run.manager.load()
        run.train(STEPS)
        whole = run.local_bytes()
    found = {}
    for component in components:
        with run_in(folder, "fsdp2", noise=NOISE, load_only=True) as run:
            run.manager.load(7)
            drop(run, component)
            run.train(STEPS)
            found[component] = run.local_bytes()
    return whole, found


def test_every_component_of_the_state_is_needed(tmp_path):
    ranks = run_on_ranks(2, digests_without, tmp_path, COMPONENTS)
    for component in COMPONENTS:
        assert any(found[component] != whole for whole, found in ranks), component


def generators(folder):
    with run_in(folder, "fsdp2") as run:
        run.manager.load()
        run.train(1)
        random.gauss(0, 1)  # leaves a second number behind, which is state too
        np.random.standard_normal()
        run.train(2)
        drawn = draws()
    with run_in(folder, "fsdp2") as run:
        run.manager.load()
        return drawn, draws()


def draws():
    return torch.rand(3).tolist(), random.gauss(0, 1), np.random.standard_normal(3).tolist()


def test_random_generators_come_back_on_every_rank(tmp_path):
    first, second = run_on_ranks(2, generators, tmp_path)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]


def draws_on_another_world(folder):
    found = []
    for _ in range(2):
        with run_in(folder, "fsdp3", load_only=True) as run:
            run.manager.load()
            found.append(draws())
    return found


def test_on_another_number_of_ranks_generators_are_seeded_anew_and_reproducibly(tmp_path):
    run_on_ranks(2, generators, tmp_path)
    ranks = run_on_ranks(3, draws_on_another_world, tmp_path)
    assert all(once == again for once, again in ranks)
    assert len({str(once) for once, _ in ranks}) == 3


# ---- refusals


def save_once(folder, layout):
    with run_in(folder, layout) as run:
        run.manager.load()
        run.train(2)


def what_is_said(folder, layout, cases):
    """What loading says in each case, and whether anything changed."""
    said = []
    for case in cases:
        with run_in(folder, layout, **case) as run:
            before = run.local_bytes()
            try:
                run.manager.load()
                said.append("loaded")
            except CheckpointError as error:
                said.append(str(error))
                assert run.local_bytes() == before, case
    return said


REFUSED = {
    "another method": ({"method": "SOAP"}, ['"shampoo"', '"soap"', "optimizer.name"]),
    "another grid": (
        {"options": {"block_size": 3}},
        ["weight: blocks cut at (0, 4, ", "(0, 3, ", "set block_size = 4, or checkpoint.reblock"],
    ),
    "another merge": ({"options": {"merge": "none"}}, ["conv.weight: blocks", 'merge = "matrix"']),
    "another exponent": ({"options": {"exponent": 0.5}}, ["exponent", "0.5 in this run"]),
    "no momentum": (
        {"options": {"momentum": 0.0}}, ["momentum: in the checkpoint", "; set momentum"]
    ),
    "rarer factors": (
        {"options": {"factor_frequency": 2}},
        ["num_measured: not in the checkpoint; set factor_frequency"],
    ),
    "no grafting": (
        {"options": {"grafting": "sgd"}},
        ["exp_avg_sq: in the checkpoint, not in this run; set grafting"],
    ),
    "another root method": (
        {"options": {"root_method": "qr"}}, ["_basis.4: not in the checkpoint; set root_method"]
    ),
    "another dtype": ({"dtype": torch.float64}, ["F32 in the checkpoint, torch.float64"]),
    "a parameter more": (
        {"shapes": {**SHAPES, "w2.weight": (4, 4)}}, ["w2.weight: not a trained parameter"]
    ),
    "a parameter less": (
        {"shapes": {k: v for k, v in SHAPES.items() if k != "wo.weight"}},
        ["wo.weight", "in the checkpoint, not in this run"],
    ),
    "another shape": (
        {"shapes": {**SHAPES, "wo.weight": (7, 5)}}, ["wo.weight: shape [5, 7] in the checkpoint"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["fsdp2", "pp2"])
def test_another_runs_state_is_refused_by_name_before_anything_changes(tmp_path, layout):
    run_on_ranks(2, save_once, tmp_path, layout)
    cases = [case for case, _ in REFUSED.values()]
    first, second = run_on_ranks(2, what_is_said, tmp_path, layout, cases)
    assert first == second
    for (name, (_, words)), line in zip(REFUSED.items(), first, strict=True):
        assert "\n" not in line
        assert all(word in line for word in words), f"{name}: {line}"


def test_a_block_size_that_cuts_nothing_else_is_no_other_grid(tmp_path):
    shapes = {"wq.weight": (3, 4)}
    run_on_ranks(1, save_shapes, tmp_path, shapes)
    (said,) = run_on_ranks(
        1, what_is_said, tmp_path, "single", [{"shapes": shapes, "options": {"block_size": 100}}]
    )
    assert said == ["loaded"]


def save_shapes(folder, shapes):
    with run_in(folder, "single", shapes=shapes) as run:
        run.manager.load()
        run.train(2)


def damaged_newest(folder, **config):
    """What a run of two ranks finds whose newest checkpoint has a flipped bit."""
    with run_in(folder, "fsdp2", **config) as run:
        before = run.local_bytes()
        try:
            run.manager.load()
        except CheckpointError as error:
            return str(error), run.local_bytes() == before
        return run.progress.value, None


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.fixture
def damaged(tmp_path):
    run_on_ranks(2, save_once, tmp_path, "fsdp2")
    flip(tmp_path / "checkpoint" / "step-2" / "rank-00001.safetensors")
    return tmp_path


def test_the_newest_good_checkpoint_is_resumed_and_the_bad_one_kept(damaged):
    assert run_on_ranks(2, damaged_newest, damaged) == [(1, None), (1, None)]
    names = sorted(path.name for path in (damaged / "checkpoint").glob("step*"))
    assert names == ["step-1", "step-2.bad"]


def refused_newest(folder):
    return damaged_newest(folder, fallback=False)


def test_falling_back_can_be_forbidden(damaged):
    first, second = run_on_ranks(2, refused_newest, damaged)
    assert first == second
    assert first[1]  # nothing changed
    assert "step-2/rank-00001.safetensors: corrupted" in first[0]
    assert "checkpoint.fallback" in first[0]
    assert (damaged / "checkpoint" / "step-2").exists()


def test_a_run_of_which_no_checkpoint_is_good_does_not_begin_anew(damaged):
    flip(damaged / "checkpoint" / "step-1" / "rank-00000.safetensors")
    (first, _) = run_on_ranks(2, damaged_newest, damaged)
    assert "none of the 2 checkpoints" in first[0]
    assert sorted(p.name for p in (damaged / "checkpoint").glob("step*")) == ["step-1", "step-2"]


def from_step_1(folder):
    with run_in(folder, "fsdp2") as run:
        run.manager.load(1)
        run.train(3)


def test_a_run_told_to_start_earlier_sets_later_checkpoints_aside(tmp_path):
    run_on_ranks(2, save_once, tmp_path, "fsdp2")
    run_on_ranks(2, from_step_1, tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoint").glob("step*"))
    assert names == ["step-1", "step-2", "step-2.superseded", "step-3"]
