"""A run that is interrupted and started again is the run that was not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint import CheckpointError
from tests.support.forged_checkpoints import changed, forge, manifest_of
from tests.support.ranks import PATIENCE, run_on_ranks
from tests.support.titan_runs import records, text_run, train_all, trainer_of, write_text

SAVING = {
    "checkpoint__enable": True,
    "checkpoint__interval": 3,
    "training__steps": 6,
    "optimizer__name": "Shampoo",
    "optimizer__shampoo.precondition_frequency": 2,
    "optimizer__shampoo.block_size": 64,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on two ranks, six steps without interruption."""
    folder = tmp_path_factory.mktemp("resume")
    write_text(folder)
    run_on_ranks(2, train_all, [text_run(folder, "whole", **SAVING)])
    return folder


def interrupted(folder, name):
    """A copy of the run as it was after step 3."""
    shutil.copytree(folder / "whole", folder / name)
    shutil.rmtree(folder / name / "checkpoint" / "step-6")
    return folder / name


def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(whole):
    interrupted(whole, "resumed")
    run_on_ranks(2, train_all, [text_run(whole, "resumed", **SAVING)])
    for key in ("loss", "grad_norm", "lr", "tokens_seen"):
        assert records(whole, "resumed", key) == records(whole, "whole", key)
    assert set(records(whole, "resumed", "loss")) == {1, 2, 3, 4, 5, 6}


def test_a_run_does_not_go_on_from_an_edited_position(whole):
    shutil.copytree(whole / "whole", whole / "edited")
    place = whole / "edited" / "checkpoint" / "step-6"
    samples = ("values", "dataloader", "samples")
    forge(place, changed(manifest_of(place), samples, 7))
    run_on_ranks(2, train_all, [text_run(whole, "edited", **SAVING)], timeout=120)
    assert records(whole, "edited", "loss") == records(whole, "whole", "loss")
    names = {path.name for path in place.parent.glob("step-*")}
    assert names == {"step-3", "step-6", "step-6.bad"}
    assert manifest_of(place)["values"]["dataloader"] == {"samples": 48}


def test_a_run_resumes_on_another_number_of_ranks(whole):
    interrupted(whole, "fewer")
    args = text_run(whole, "fewer", **SAVING, training__local_batch_size=8)
    run_on_ranks(1, train_all, [args])
    for key in ("loss", "lr", "tokens_seen"):
        assert records(whole, "fewer", key) == pytest.approx(records(whole, "whole", key), rel=1e-4)


def loading_errors(commands):
    """What each command line says when it loads its checkpoint."""
    said = []
    for args in commands:
        with trainer_of(args) as trainer:
            try:
                trainer.checkpointer.load(trainer.job_config.checkpoint.load_step)
            except CheckpointError as error:
                said.append(str(error))
            else:
                said.append("")
    return said


def test_checkpoints_that_cannot_be_used_are_one_line_on_every_rank(whole):
    broken = interrupted(whole, "broken") / "checkpoint" / "step-3" / "manifest.json"
    broken.write_bytes(b"not a manifest")
    missing = interrupted(whole, "missing") / "checkpoint" / "step-3" / "rank-00001.safetensors"
    missing.unlink()
    (whole / "file").mkdir()
    (whole / "file" / "checkpoint").write_text("a file")
    distracted = interrupted(whole, "distracted") / "checkpoint"
    shutil.copytree(distracted / "step-3", distracted / "step-30.bad")
    as_soap = {key.replace("shampoo", "soap"): value for key, value in SAVING.items()}
    commands = [
        text_run(whole, "broken", **SAVING),
        text_run(whole, "missing", **SAVING),
        text_run(whole, "file", **SAVING),
        text_run(whole, "whole", **SAVING, checkpoint__load_step=4),
        text_run(whole, "distracted", **SAVING),
        text_run(whole, "whole", **SAVING | {"optimizer__shampoo.block_size": 32}),
        text_run(whole, "whole", **as_soap | {"optimizer__name": "SOAP"}),
    ]
    first, second = run_on_ranks(2, loading_errors, commands)
    assert first == second
    assert all("\n" not in line for line in first)
    assert str(broken) in first[0]
    assert str(missing) in first[1]
    assert str(whole / "file" / "checkpoint") in first[2]
    assert "checkpoint.load_step = 4" in first[3]
    assert "there are: 3, 6" in first[3]
    assert first[4] == ""  # step-30.bad is nobody's checkpoint
    assert "set block_size = 64" in first[5]
    assert '"shampoo" in the checkpoint, "soap" in this run' in first[6]


def kept_checkpoints(args):
    with trainer_of(args) as trainer:
        trainer.train()
        trainer.close()
    return sorted(path.name for path in (Path(args[1]) / "checkpoint").glob("step*"))


def test_retention_keeps_the_newest_complete_ones(whole):
    settings = {**SAVING, "checkpoint__interval": 2, "checkpoint__keep_latest_k": 2}
    (whole / "kept" / "checkpoint" / "step-1.bad").mkdir(parents=True)
    (kept,) = run_on_ranks(1, kept_checkpoints, text_run(whole, "kept", **settings))
    assert kept == ["step-1.bad", "step-4", "step-6"]


def build(args):
    with pytest.raises(CheckpointError, match='needs a GPU; set it to "async"'), trainer_of(args):
        pass


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
def test_saving_through_pinned_memory_is_refused_without_a_gpu(whole):
    args = text_run(whole, "pinned", **SAVING, checkpoint__async_mode="async_with_pinned_mem")
    run_on_ranks(1, build, args)


def torchrun(args, folder):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launch, "train.py", *args],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
        check=False,
        cwd=Path(__file__).parents[1],
    )


@pytest.mark.slow
def test_two_command_lines_make_one_run(whole):
    interrupted(whole, "torchrun")
    finished = torchrun(text_run(whole, "torchrun", **SAVING), whole)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert records(whole, "torchrun", "loss") == records(whole, "whole", "loss")
    assert "resumed after step 3 of 6" in finished.stdout
    for place in ("checkpoint", "metrics.jsonl", "loss.png"):
        assert str(whole / "torchrun" / place) in finished.stdout
    assert (whole / "torchrun" / "loss.png").exists()


@pytest.mark.slow
def test_a_mistake_ends_every_rank_with_one_line_of_ours(whole):
    failed = torchrun(text_run(whole, "mistake", training__dataset=whole / "wrods.txt"), whole)
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if "wrods.txt" in line]
    assert len(lines) == 1
    assert "training.dataset" in lines[0]
    assert "words.txt" in lines[0]
    assert "titan_shampoo/" not in failed.stderr  # no traceback of ours in torchrun's report


def one_rank(args):
    return subprocess.run(
        [sys.executable, "train.py", *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=Path(__file__).parents[1],
    )


def test_a_wrong_setting_is_one_line_and_exit_code_2(tmp_path):
    failed = one_rank(text_run(tmp_path, "mistake", training__stepz=5))
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.count("\n") == 1
    assert 'training.stepz: unknown key; did you mean "steps"?' in failed.stderr
