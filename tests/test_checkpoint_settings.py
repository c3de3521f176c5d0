"""Every key of ``[checkpoint]`` does what it says."""

import logging
import os
import signal

import pytest
import torch

from checkpoint.errors import CheckpointError
from checkpoint.settings import settings_differences
from checkpoint.verify import read_manifest
from tests.support.checkpoint_runs import content, run_in
from tests.support.log_lines import Lines
from tests.support.ranks import run_on_ranks


def train(folder, until, config, *, last=None, settings=None, load_step=-1):
    """Train in one process; returns what was said, and where the run stood after loading."""
    logger, said = logging.getLogger("checkpoint"), Lines()
    logger.setLevel(logging.INFO)
    logger.addHandler(said)
    try:
        with run_in(folder, "single", settings=settings, **config) as run:
            run.manager.load(load_step)
            start = run.progress.value
            run.train(until, last=last)
    except CheckpointError as error:
        return [str(error)], -1
    return said.lines, start


def run(*args, **kwargs):
    (found,) = run_on_ranks(1, call, args, kwargs)
    return found


def call(args, kwargs):
    return train(*args, **kwargs)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoint").glob("*step*"))


def test_interval_and_first_step(tmp_path):
    run(tmp_path, 5, {"interval": 2, "enable_first_step_checkpoint": True})
    assert names(tmp_path) == ["step-1", "step-2", "step-4"]


def test_nothing_happens_unless_enabled(tmp_path):
    run(tmp_path, 2, {"enable": False})
    assert list(tmp_path.iterdir()) == []


def test_load_only_saves_and_renames_nothing(tmp_path):
    run(tmp_path, 2, {})
    before = sorted(tmp_path.rglob("*"))
    _, start = run(tmp_path, 5, {"load_only": True}, load_step=1)
    assert start == 1
    assert sorted(tmp_path.rglob("*")) == before


def handlers_of_a_run(folder):
    with run_in(folder, "single", load_only=True) as stopping:
        stopping.manager.load()
        before = signal.getsignal(signal.SIGTERM)
        stopping.train(1)
        return signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_only_loads_has_nothing_to_save_when_it_is_stopped(tmp_path):
    assert run_on_ranks(1, handlers_of_a_run, tmp_path) == [True]


def test_a_last_checkpoint_of_the_model_only_cannot_be_resumed_but_begun_from(tmp_path):
    run(tmp_path, 3, {"last_save_model_only": True, "export_dtype": "bfloat16"}, last=3)
    manifest = read_manifest(tmp_path / "checkpoint" / "step-3")
    assert all(key.startswith("model.") for key in manifest.tensors)
    assert {entry.dtype for entry in manifest.tensors.values()} == {"BF16"}
    said, _ = run(tmp_path, 4, {})
    assert "holds the model only" in said[0]
    assert "checkpoint.initial_load_path" in said[0]


def test_a_run_begins_from_another_runs_model_or_from_all_of_its_state(tmp_path):
    run(tmp_path / "first", 3, {})
    path = tmp_path / "first" / "checkpoint" / "step-3"
    for only_model in (True, False):
        config = {"initial_load_path": str(path), "initial_load_model_only": only_model}
        _, start = run(tmp_path / str(only_model), 4, config)
        assert start == (0 if only_model else 3)
    run(tmp_path / "first", 4, {})
    expected = content(tmp_path / "first" / "checkpoint" / "step-4")
    found = content(tmp_path / "False" / "checkpoint" / "step-4")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    ids = {
        read_manifest(tmp_path / name / "checkpoint" / "step-4").record["run"]
        for name in ("first", "True", "False")
    }
    assert len(ids) == 3


def test_components_can_be_left_out_when_loading(tmp_path):
    run(tmp_path, 3, {})
    _, start = run(tmp_path, 3, {"exclude_from_loading": ["train_state"], "load_only": True})
    assert start == 0
    said, _ = run(tmp_path, 3, {"exclude_from_loading": ["optimiser"]})
    assert (
        "checkpoint.exclude_from_loading: optimiser: no such component; there are: mod" in said[0]
    )


def test_components_can_be_left_out_when_beginning_from_another_runs_state(tmp_path):
    run(tmp_path / "first", 3, {})
    config = {
        "initial_load_path": str(tmp_path / "first" / "checkpoint" / "step-3"),
        "initial_load_model_only": False,
        "exclude_from_loading": ["dataloader", "lr_scheduler"],
    }
    _, start = run(tmp_path / "second", 4, config)
    assert start == 3
    record = read_manifest(tmp_path / "second" / "checkpoint" / "step-4").record
    assert record["values"]["dataloader"] == {"samples": 8}
    assert record["values"]["lr_scheduler"] == {"last_epoch": 1}


def test_a_model_that_is_all_there_is_to_load_cannot_be_left_out(tmp_path):
    run(tmp_path / "first", 1, {})
    path = str(tmp_path / "first" / "checkpoint" / "step-1")
    config = {"initial_load_path": path, "exclude_from_loading": ["model"]}
    said, _ = run(tmp_path / "second", 1, config)
    assert "checkpoint.exclude_from_loading: model, and the model is all that" in said[0]


def draws_after_loading(folder, excluded):
    with run_in(folder, "single", load_only=True, exclude_from_loading=excluded) as resumed:
        resumed.manager.load()
        return torch.rand(4).tolist()


def test_random_generators_go_on_with_the_step_whatever_else_is_left_out(tmp_path):
    run(tmp_path, 3, {"noise": 0.1})
    draws = {
        name: run_on_ranks(1, draws_after_loading, tmp_path, excluded)
        for name, excluded in {
            "all": [],
            "no rates": ["lr_scheduler"],
            "anew": ["train_state"],
        }.items()
    }
    assert draws["no rates"] == draws["all"] != draws["anew"]


def test_changed_hyper_parameters_are_said_and_the_new_ones_win(tmp_path):
    run(tmp_path, 1, {}, settings={"optimizer.lr": 0.1, "training.steps": 9})
    said, _ = run(tmp_path, 2, {}, settings={"optimizer.lr": 0.2, "training.steps": 9})
    assert "optimizer.lr: 0.1 in the checkpoint, 0.2 now" in said
    assert not any("training.steps" in line for line in said)
    record = read_manifest(tmp_path / "checkpoint" / "step-2").record
    assert record["settings"]["optimizer.lr"] == 0.2


def test_paths_are_no_hyper_parameters():
    assert settings_differences({"job.dump_folder": "a"}, {"job.dump_folder": "b"}) == []
    assert settings_differences({}, {"new.key": 1}) == [
        "new.key: not known in the checkpoint, 1 now"
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"initial_load_in_hf": True}, "needs checkpoint.initial_load_path"),
        ({"initial_load_path": "nowhere"}, "nowhere: no such checkpoint"),
    ],
)
def test_what_cannot_be_begun_from_is_said(tmp_path, config, words):
    said, _ = run(tmp_path, 1, config)
    assert words in said[0]


def restarted(folder):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return train(folder, 3, {}, load_step=1)[1]


def test_a_restart_goes_on_from_the_newest_whatever_the_first_attempt_was_told(tmp_path):
    run(tmp_path, 2, {})
    assert run_on_ranks(1, restarted, tmp_path) == [2]
