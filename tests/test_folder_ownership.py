"""One run per folder, even if it is deleted meanwhile; and nothing is written through links."""

import logging
import os
import shutil
from pathlib import Path

import datasets
import pytest
import torch.distributed as dist

from checkpoint.errors import CheckpointError
from checkpoint.folders import commit, discard, set_aside, sweep, writing_name
from checkpoint.lock import FolderLock
from checkpoint.verify import read_manifest, verify
from tests.support.checkpoint_runs import run_in
from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import text_run, train_all, trainer_of, write_text
from titan_shampoo.config import ConfigError, check_dump_folder, read_config
from titan_shampoo.data.text import TextDataset
from titan_shampoo.data.tokenizer import ByteTokenizer
from titan_shampoo.own_files import open_own, replacing
from titan_shampoo.plot import draw
from titan_shampoo.titan.records import RunRecords

PRECIOUS = "somebody else's"


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text(PRECIOUS)
    return path


def plant(kind: str, place: Path, victim: Path) -> None:
    """Put a link or a pipe in place of a file that a run writes."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "symbolic link":
        place.symlink_to(victim)
    elif kind == "link to nothing":
        place.symlink_to(victim.with_name("made"))
    elif kind == "hard link":
        place.hardlink_to(victim)
    else:
        os.mkfifo(place)


KINDS = ("symbolic link", "link to nothing", "hard link", "pipe")


def assert_untouched(victim: Path) -> None:
    assert victim.read_text() == PRECIOUS
    assert not victim.with_name("made").exists()


# ---- links


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_leads_elsewhere_is_refused_in_one_line(tmp_path, victim, kind):
    plant(kind, tmp_path / "run" / ".lock", victim)
    with pytest.raises(
        CheckpointError, match=r"run/\.lock: cannot be written to: a link"
    ) as raised:
        FolderLock(tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert_untouched(victim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["metrics.jsonl", ".metrics.lock"])
def test_records_are_not_written_through_links(tmp_path, victim, kind, name):
    plant(kind, tmp_path / "run" / name, victim)
    with pytest.raises(ConfigError, match=rf"run/{name}: cannot be written.*: a link"):
        RunRecords(tmp_path / "run").resume(3)
    assert_untouched(victim)


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_planted_while_a_run_trains_gets_no_record(tmp_path, victim, kind, caplog):
    records = RunRecords(tmp_path / "run")
    records.resume(0)
    plant(kind, records.file, victim)
    plant(kind, records.plot, victim)
    for step in (1, 2):
        records.append({"step": step, "loss": 1.0})
    assert_untouched(victim)
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "metrics.jsonl: metrics cannot be written: a link" in warned[0]
    assert "training goes on" in warned[0]
    records.file.unlink()
    records.append({"step": 3, "loss": 1.0})
    records.draw_loss("takes the place of the link")
    assert [record["step"] for record in records.read()] == [3]
    assert records.plot.read_bytes()[:4] == b"\x89PNG"
    assert_untouched(victim)


def test_what_an_older_version_left_as_a_link_is_not_written_through(tmp_path, victim):
    records = RunRecords(tmp_path / "run")
    records.resume(0)
    records.append({"step": 1, "loss": 1.0})
    records.file.with_suffix(".tmp").symlink_to(victim)
    records.resume(1)
    assert [record["step"] for record in records.read()] == [1]
    assert_untouched(victim)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_takes_the_place_of_a_link(tmp_path, victim, kind):
    plant(kind, tmp_path / "comparison.png", victim)
    draw({"run": [{"step": 1, "loss": 2.0, "seconds": 1.0}]}, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "comparison.png").is_symlink()
    assert_untouched(victim)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_not_written_through_links(tmp_path, victim, kind, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = write_text(tmp_path)
    good = TextDataset(str(file), tokenizer=ByteTokenizer(), seq_len=32)
    good._path.unlink()
    plant(kind, good._path.with_suffix(".unfinished"), victim)
    again = TextDataset(str(file), tokenizer=ByteTokenizer(), seq_len=32)
    assert len(again) == len(good) > 0
    assert_untouched(victim)


def test_a_configuration_is_not_saved_through_a_link(tmp_path, victim):
    plant("symbolic link", tmp_path / "run" / "config.json", victim)
    args = ["--job.dump_folder", str(tmp_path / "run"), "--job.save_config_file", "config.json"]
    with pytest.raises(ConfigError, match=r"job\.save_config_file: .*config\.json is a link"):
        check_dump_folder(read_config(args))


def test_a_link_in_place_of_a_checkpoint_is_neither_followed_nor_overwritten(tmp_path, victim):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_text(PRECIOUS)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "step-1").symlink_to(tmp_path / "nothing")
    written = writing_name(folder / "step-1")
    written.mkdir()
    with pytest.raises(FileExistsError, match="never overwritten"):
        commit(written, folder / "step-1")
    (folder / "step-1.bad").symlink_to(tmp_path / "nothing")
    assert set_aside(folder / "step-1", "bad").name == "step-1.bad-2"
    for name in ("step-2", "step-3.trash-0123abcd", "step-4.writing-0123abcd"):
        (folder / name).symlink_to(elsewhere)
    discard(folder / "step-2")
    sweep(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-1.bad", "step-1.bad-2"]
    assert (elsewhere / "data").read_text() == PRECIOUS


def test_a_file_that_is_replaced_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.write("not bytes")  # type: ignore[call-overload]
    assert path.read_text() == "old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    os.close(open_own(tmp_path / "made", os.O_WRONLY))
    assert (tmp_path / "made").stat().st_size == 0


# ---- folders that are deleted while a run holds them


def test_a_lock_notices_that_its_file_or_folder_is_another_one(tmp_path):
    folder = tmp_path / "checkpoint"
    for change in (
        lambda: (folder / ".lock").unlink(),
        lambda: shutil.rmtree(folder),
        lambda: folder.rename(tmp_path / "moved"),
    ):
        lock = FolderLock(folder)
        assert lock.is_held()
        change()
        assert not lock.is_held()
        other = FolderLock(folder)  # made anew, by anybody
        assert other.is_held()
        assert not lock.is_held()
        other.release()
        lock.release()
        shutil.rmtree(folder)
    assert not lock.is_held()


def trained_over(folder, change, async_mode, keep):
    """Refusal and last step of a run of two ranks whose folder is changed after step 2."""
    with run_in(folder, "fsdp2", keep_latest_k=keep, async_mode=async_mode) as run:
        run.manager.load()
        run.train(2)
        run.manager._finish_background(2)
        held = None
        if dist.get_rank() == 0:
            run.manager._tidying.submit(int).result()  # after what it deletes
            held = CHANGES[change](folder / "checkpoint")
        dist.barrier()
        try:
            run.train(5, last=5)
            said = ""
        except CheckpointError as error:
            said = str(error)
        dist.barrier()
        if held is not None:
            held.release()
        return said, run.progress.value


def delete(folder):
    shutil.rmtree(folder)


def delete_and_enter(folder):
    shutil.rmtree(folder)
    return FolderLock(folder)


def delete_and_save(folder):
    """Another run has saved in the new folder, and ended."""
    shutil.rmtree(folder)
    FolderLock(folder).release()
    (folder / "step-1").mkdir()


def delete_lock(folder):
    (folder / ".lock").unlink()


CHANGES = {
    change.__name__: change for change in (delete, delete_and_enter, delete_and_save, delete_lock)
}


def names(folder):
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_folder_that_is_deleted_is_made_anew_and_locked(tmp_path, async_mode):
    ranks = run_on_ranks(2, trained_over, tmp_path, "delete", async_mode, 0)
    assert ranks == [("", 5), ("", 5)]
    assert names(tmp_path) == [".lock", "step-3", "step-4", "step-5"]
    verify(tmp_path / "checkpoint" / "step-5")


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize(
    ("change", "words", "left"),
    [
        ("delete_and_enter", "another run writes here (process ", [".lock"]),
        ("delete_and_save", "step-1 may be another run's", [".lock", "step-1"]),
        ("delete_lock", "step-2 may be another run's", [".lock", "step-1", "step-2"]),
    ],
)
def test_a_run_whose_folder_may_be_another_runs_stops_before_it_saves_or_deletes(
    tmp_path, async_mode, change, words, left
):
    # Retention would delete step 1, were it still this run's.
    keep = 0 if change == "delete_lock" else 1
    first, second = run_on_ranks(2, trained_over, tmp_path, change, async_mode, keep)
    assert first == second
    assert words in first[0]
    assert "\n" not in first[0]
    assert first[1] == 3
    assert names(tmp_path) == left


def deleted_before_the_end(folder):
    with run_in(folder, "single") as run:
        run.manager.load()
        run.train(2)
        shutil.rmtree(folder / "checkpoint")
        run.manager.save(2, last_step=True)


def test_the_last_state_is_saved_again_if_its_checkpoint_was_deleted(tmp_path):
    run_on_ranks(1, deleted_before_the_end, tmp_path)
    assert read_manifest(tmp_path / "checkpoint" / "step-2").step == 2


def saved_without_loading(folder):
    with run_in(folder, "single") as run:
        run.train(1)
        with pytest.raises(CheckpointError, match="another run writes here"):
            FolderLock(folder / "checkpoint")


def test_a_run_that_loads_nothing_locks_its_folder_too(tmp_path):
    run_on_ranks(1, saved_without_loading, tmp_path)


# ---- records of two runs


def test_two_runs_do_not_share_their_records(tmp_path):
    first, second = RunRecords(tmp_path), RunRecords(tmp_path)
    first.resume(0)
    first.append({"step": 1, "loss": 1.0})
    with pytest.raises(ConfigError, match=r"another run writes here \(process .*dump_folder"):
        second.resume(0)
    assert [record["step"] for record in first.read()] == [1]
    first.close()
    second.resume(1)
    assert [record["step"] for record in second.read()] == [1]


SAVING = {
    "checkpoint__enable": True, "checkpoint__interval": 1, "training__steps": 2,
    "optimizer__name": "SGD", "validation__enable": False,
}  # fmt: skip


def busy_folder(folder):
    """Records of a run, and what two others say that are started in its dump folder."""
    args = text_run(folder, "run", **SAVING)
    with trainer_of(args) as trainer:
        trainer.train()
        before = (folder / "run" / "metrics.jsonl").read_bytes()
        others = {
            "load_only": {**SAVING, "checkpoint__load_only": True, "training__steps": 3},
            "no checkpoints": {**SAVING, "checkpoint__enable": False},
        }
        said = {}
        for name, settings in others.items():
            try:
                train_all([text_run(folder, "run", **settings)])
                said[name] = "trained"
            except ConfigError as error:
                said[name] = str(error)
        return before == (folder / "run" / "metrics.jsonl").read_bytes(), said


def test_runs_started_in_the_folder_of_another_leave_its_records_alone(tmp_path):
    write_text(tmp_path)
    first, second = run_on_ranks(2, busy_folder, tmp_path, timeout=240)
    assert first == second
    unchanged, said = first
    assert unchanged
    assert said["load_only"] == "trained"
    assert "run: another run writes here (process " in said["no checkpoints"]


def guest(folder):
    """A run that only loads from the folder of a finished one."""
    train_all([text_run(folder, "run", **SAVING)])
    before = {p: p.read_bytes() for p in (folder / "run").glob("*") if p.is_file()}
    own = {
        **SAVING,
        "checkpoint__load_only": True,
        "training__steps": 3,
        "checkpoint__load_step": 1,
    }
    train_all([text_run(folder, "run", **own)])
    after = {p: p.read_bytes() for p in (folder / "run").glob("*") if p.is_file()}
    own["checkpoint__folder"] = folder / "run" / "checkpoint"
    train_all([text_run(folder, "own", **own)])
    return before == after, [record["step"] for record in RunRecords(folder / "own").read()]


def test_a_run_that_only_loads_keeps_records_in_a_folder_of_its_own(tmp_path):
    write_text(tmp_path)
    (found,) = run_on_ranks(1, guest, tmp_path, timeout=240)
    assert found == (True, [2, 3])
