"""What cannot be read is not called damaged: nobody renames a good checkpoint for it."""

import errno
import logging
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from checkpoint import verify
from checkpoint.errors import CheckpointError
from checkpoint.retention import Retention
from tests.support.checkpoint_runs import run_in
from tests.support.ranks import run_on_ranks

DATA = "what rank 1 hashes"
NAMES = ("manifest.json", DATA)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(verify, "PAUSES", (0.01, 0.01, 0.01))


@pytest.fixture
def saved(tmp_path):
    """Where two FSDP2 ranks have saved steps 1 and 2."""
    run_on_ranks(2, save, tmp_path)
    return tmp_path


def save(folder, until=2):
    with run_in(folder, "fsdp2") as run:
        run.manager.load()
        run.train(until)


def fail_to_open(patch, place, number, times):
    """Let opening a file fail with an error number, some times."""
    opens, left = Path.open, iter(range(times))

    def failing(path, *args, **kwargs):
        if path == place and next(left, None) is not None:
            raise OSError(number, os.strerror(number), str(path))
        return opens(path, *args, **kwargs)

    patch.setattr(Path, "open", failing)
    if number == errno.ENOENT:
        looks = Path.lstat

        def not_seen(path):
            return failing(path) if path == place and times == 99 else looks(path)

        patch.setattr(Path, "lstat", not_seen)


def resume(folder, name, number, times, failing_rank):
    with pytest.MonkeyPatch.context() as patch, run_in(folder, "fsdp2") as run:
        patch.setattr(verify, "PAUSES", (0.01, 0.01, 0.01))
        if dist.get_rank() == failing_rank:
            fail_to_open(patch, folder / "checkpoint" / "step-2" / name, number, times)
        try:
            run.manager.load()
        except CheckpointError as error:
            return str(error)
        return run.progress.value


def failing_file(folder, name, rank):
    """The name of a file that a rank reads."""
    if name != DATA:
        return name
    found = verify.read_manifest(folder / "checkpoint" / "step-2")
    return verify.shares(found, 2)[rank][0][0]


def steps(folder):
    return sorted(path.name for path in (folder / "checkpoint").glob("step-*"))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
def test_what_can_be_read_a_moment_later_is_resumed_from(saved, number):
    for rank, name in enumerate(NAMES):
        name = failing_file(saved, name, rank)
        assert run_on_ranks(2, resume, saved, name, number, 3, rank) == [2, 2]
    assert steps(saved) == ["step-1", "step-2"]


def test_what_one_rank_cannot_read_is_refused_on_all_and_not_renamed(saved):
    for rank, (name, number) in enumerate(zip(NAMES, (errno.EMFILE, errno.EACCES), strict=True)):
        name = failing_file(saved, name, rank)
        first, second = run_on_ranks(2, resume, saved, name, number, 99, rank)
        assert first == second
        assert f"step-2/{name}: cannot be read" in first
        assert os.strerror(number) in first
        assert f"make it readable, or rename {saved / 'checkpoint' / 'step-2'}" in first
    assert steps(saved) == ["step-1", "step-2"]


def test_a_file_that_one_rank_does_not_see_and_another_does_is_not_damage(saved):
    for rank, name in enumerate(NAMES):
        name = failing_file(saved, name, rank)
        first, second = run_on_ranks(2, resume, saved, name, errno.ENOENT, 99, rank)
        assert first == second
        assert f"step-2/{name}: missing for rank {rank}, there for rank {1 - rank}" in first
        assert "make it readable, or rename " in first
    assert steps(saved) == ["step-1", "step-2"]


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.safetensors"])
def test_a_file_that_no_rank_sees_is_damage(saved, name):
    (saved / "checkpoint" / "step-2" / name).unlink()
    assert run_on_ranks(2, resume, saved, "none", errno.ENOENT, 0, 0) == [1, 1]
    assert steps(saved) == ["step-1", "step-2.bad"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_retention_neither_counts_nor_renames_nor_deletes_what_cannot_be_read(
    saved, number, monkeypatch, caplog
):
    run_on_ranks(2, save, saved, 4)
    place = saved / "checkpoint" / "step-3" / "rank-00000.safetensors"
    fail_to_open(monkeypatch, place, number, 99)
    retention = Retention(saved / "checkpoint", keep=2)
    with caplog.at_level(logging.WARNING):
        retention.apply()
        retention.apply()
    # Step 1 is older than two good ones.
    assert steps(saved) == ["step-2", "step-3", "step-4"]
    assert len([record for record in caplog.records if "step-3" in record.getMessage()]) == 1
