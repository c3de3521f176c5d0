"""Whole runs under torchrun: killed, signalled, restarted; and weights that come and go."""

import os
import re
import signal
import time

import pytest

from checkpoint.folders import steps_in
from checkpoint.verify import read_manifest, verify
from tests.support.checkpoint_runs import content, equal
from tests.support.ranks import PATIENCE, run_on_ranks
from tests.support.titan_runs import text_run, train_all, write_text
from tests.support.torchrun import SAVING, torchrun, wait_for, workers_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restart")
    write_text(folder)
    run_on_ranks(2, train_all, [text_run(folder, "whole", **SAVING)])
    return folder


@pytest.mark.slow
def test_torchrun_restarts_killed_ranks_from_the_newest_checkpoint(whole):
    process = torchrun(text_run(whole, "killed", **SAVING), whole, "--max-restarts=3")
    folder = whole / "killed" / "checkpoint"
    for step, rank in ((2, 1), (6, 0), (8, 1)):
        wait_for(folder / f"step-{step}", process)
        os.kill(sorted(workers_of(process))[rank], signal.SIGKILL)
        time.sleep(3)  # until the others have been ended
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert re.search(r"resumed after step \d+ of 12", said)
    verify(folder / "step-12")
    assert equal(folder / "step-12", whole / "whole" / "checkpoint" / "step-12")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signalled_ranks_save_and_end_well_and_the_same_command_goes_on(whole, number):
    args = text_run(whole, f"signalled-{number}", **{**SAVING, "checkpoint__interval": 1000})
    place = whole / f"signalled-{number}"
    process = torchrun(args, whole)
    wait_for(place / "metrics.jsonl", process)
    for worker in workers_of(process):
        os.kill(worker, number)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    stopped = re.search(r"asked to stop: saved after step (\d+)", said)
    assert stopped, said
    assert read_manifest(place / "checkpoint" / f"step-{stopped[1]}").step == int(stopped[1])
    run_on_ranks(2, train_all, [args])
    assert equal(place / "checkpoint" / "step-12", whole / "whole" / "checkpoint" / "step-12")


@pytest.mark.slow
def test_ranks_whose_torchrun_was_killed_save_and_let_the_next_run_go_on(whole):
    args = text_run(whole, "orphans", **{**SAVING, "training__steps": 100_000})
    process = torchrun(args, whole)
    place = whole / "orphans" / "checkpoint"
    wait_for(place / "step-2", process)
    process.kill()
    said, _ = process.communicate(timeout=PATIENCE)  # to the end of its ranks, which hold the pipe
    stopped = re.search(r"asked to stop: saved after step (\d+)", said)
    assert stopped, said
    assert max(steps_in(place)) == int(stopped[1])
    run_on_ranks(1, train_all, [[*args, f"--training.steps={int(stopped[1]) + 1}"]])
    assert max(steps_in(place)) == int(stopped[1]) + 1


@pytest.mark.slow
def test_weights_go_out_in_hugging_faces_format_and_begin_another_run(whole):
    out = text_run(
        whole, "exported", **SAVING,
        checkpoint__last_save_model_only=True, checkpoint__last_save_in_hf=True,
    )  # fmt: skip
    exported = whole / "exported" / "checkpoint"
    run_on_ranks(2, train_all, [out])
    assert (exported / "hf-step-12" / "model.safetensors").is_file()
    begin = {**SAVING, "training__steps": 1, "optimizer__lr": 1e-30}
    runs = {
        "from-hf": {"checkpoint__initial_load_in_hf": True, "path": exported / "hf-step-12"},
        "from-model": {"path": exported / "step-12"},
        "from-full": {"path": whole / "whole" / "checkpoint" / "step-12"},
    }
    for name, settings in runs.items():
        path = settings.pop("path")
        args = text_run(whole, name, **begin, checkpoint__initial_load_path=path, **settings)
        run_on_ranks(2, train_all, [args])
    found = [content(whole / name / "checkpoint" / "step-1") for name in runs]
    for key in (key for key in found[0] if key.startswith("model.")):
        assert (found[0][key] == found[1][key]).all(), key
        assert (found[0][key] == found[2][key]).all(), key
