"""Full disks, second runs, dead ranks and signals: training goes on, or ends well."""

import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from checkpoint.errors import CheckpointError
from checkpoint.lock import FolderLock
from checkpoint.retention import Retention
from checkpoint.staging import Staging, local_chunks
from checkpoint.verify import verify
from tests.soak.disks import fill_levels, run_on_full_disk
from tests.support.checkpoint_runs import content, run_in, run_until_signal
from tests.support.ranks import PATIENCE, run_on_ranks

# ---- full disks


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_full_disk_harms_neither_the_run_nor_older_checkpoints(tmp_path, async_mode):
    levels = fill_levels(tmp_path, 5)
    ranks = run_on_ranks(2, run_on_full_disk, tmp_path, async_mode, levels)
    for level, outcomes in zip(levels, zip(*ranks, strict=True), strict=True):
        assert [problem for problem in outcomes if problem] == [], f"at {level} bytes"


def fail_at_the_end(folder):
    with run_in(folder, "single") as run:
        run.manager.load()
        run.train(1)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            run.train(2, last=2)
        except CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return "nothing"


def test_a_run_whose_last_state_cannot_be_saved_does_not_end_well(tmp_path):
    (said,) = run_on_ranks(1, fail_at_the_end, tmp_path)
    assert "step-2: not saved: File too large; needs " in said
    assert "bytes, free are" in said


# ---- second runs


def test_a_second_run_is_kept_out_of_the_folder(tmp_path):
    first = FolderLock(tmp_path)
    with pytest.raises(CheckpointError, match=f"another run writes here \\(process {os.getpid()}"):
        FolderLock(tmp_path)
    first.release()
    FolderLock(tmp_path).release()


def test_a_restart_waits_for_a_predecessor_that_is_about_to_end(tmp_path):
    first = FolderLock(tmp_path)
    threading.Timer(0.5, first.release).start()
    FolderLock(tmp_path, patience=PATIENCE).release()


def test_a_lock_ends_with_its_process_even_if_forked_helpers_live(tmp_path):
    program = (
        "import os, sys, time; from checkpoint.lock import FolderLock; from pathlib import Path;"
        "lock = FolderLock(Path(sys.argv[1])); helper = os.fork();"
        "helper and print(helper, flush=True); time.sleep(3600)"
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=root
    ) as holder:
        assert holder.stdout
        helper = int(holder.stdout.readline())
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on "):
            FolderLock(tmp_path)
        holder.kill()
    FolderLock(tmp_path, patience=PATIENCE).release()
    os.kill(helper, signal.SIGKILL)


def load_twice(folder):
    with run_in(folder, "fsdp2") as first, run_in(folder, "fsdp2") as second:
        first.manager.load()
        try:
            second.manager.load()
        except CheckpointError as error:
            return str(error)
    return "nothing"


def test_all_ranks_of_a_second_run_say_so(tmp_path):
    first, second = run_on_ranks(2, load_twice, tmp_path)
    assert first == second
    assert "another run writes here" in first


# ---- retention


def keep_two(folder):
    with run_in(folder, "single", keep_latest_k=2) as run:
        run.manager.load()
        run.train(4)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoint").glob("step*"))


def test_the_newest_two_are_kept(tmp_path):
    run_on_ranks(1, keep_two, tmp_path)
    assert names(tmp_path) == ["step-3", "step-4"]


def test_what_does_not_verify_is_not_counted(tmp_path, caplog):
    run_on_ranks(1, save_steps, tmp_path, 4)
    folder = tmp_path / "checkpoint"
    path = folder / "step-3" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        Retention(folder, keep=2).apply()
    assert names(tmp_path) == ["step-2", "step-3.bad", "step-4"]
    assert "step-3/rank-00000.safetensors: corrupted" in caplog.text


def save_steps(folder, until):
    with run_in(folder, "single") as run:
        run.manager.load()
        run.train(until)


# ---- signals


@pytest.mark.parametrize(
    ("number", "delay", "rank"),
    [(signal.SIGTERM, 0.0, 0), (signal.SIGTERM, 0.05, 1), (signal.SIGUSR1, 0.11, 1)],
)
def test_a_signal_to_any_rank_ends_the_run_after_a_saved_step(tmp_path, number, delay, rank):
    first, second = run_on_ranks(2, run_until_signal, tmp_path, number, delay, rank)
    assert first[0] == second[0] == first[1] == second[1] < 10_000
    assert first[2]
    assert second[2]
    verify(tmp_path / "checkpoint" / f"step-{first[0]}")


def handlers_after_a_run(folder):
    before = signal.getsignal(signal.SIGTERM)
    with run_in(folder, "single") as run:
        run.manager.load()
        begun = signal.getsignal(signal.SIGTERM)
        run.train(1)
        during = signal.getsignal(signal.SIGTERM)
    return before == begun == signal.getsignal(signal.SIGTERM) != during


def test_signals_are_taken_once_there_is_a_step_to_save_and_given_back(tmp_path):
    assert run_on_ranks(1, handlers_after_a_run, tmp_path) == [True]


# ---- asynchronous saving


def digests(folder, async_mode):
    with run_in(folder, "fsdp2", async_mode=async_mode) as run:
        run.manager.load()
        run.train(6)


def test_saving_while_training_goes_on_saves_the_same_bytes(tmp_path):
    for mode in ("disabled", "async"):
        run_on_ranks(2, digests, tmp_path / mode, mode)
    for step in range(1, 7):
        sync, background = (
            content(tmp_path / mode / "checkpoint" / f"step-{step}")
            for mode in ("disabled", "async")
        )
        assert sync.keys() == background.keys()
        assert all(torch.equal(sync[key], background[key]) for key in sync)


def test_every_background_save_copies_into_the_memory_of_the_first():
    staging = Staging(pinned=False)
    state = {"weight": torch.zeros(3, 4), "turned": torch.zeros(5, 2).t()}
    places = []
    for value in (1.0, 2.0):
        for tensor in state.values():
            tensor.fill_(value)
        copies, wait = staging.copy(state)
        wait()
        chunks = [chunk for copy in copies.values() for chunk in local_chunks(copy).values()]
        assert all((chunk == value).all() for chunk in chunks)
        places.append([chunk.data_ptr() for chunk in chunks])
    assert places[0] == places[1]
    assert not set(places[0]) & {tensor.data_ptr() for tensor in state.values()}
    state["weight"] = torch.zeros(4, 4, dtype=torch.float64)
    copies, _ = staging.copy(state)
    assert copies["weight"].shape == (4, 4)
    assert copies["weight"].dtype == torch.float64
