"""Only complete checkpoints are found, and replacing one never loses it."""

import pytest

from checkpoint.folders import commit, complete_steps, set_aside, sweep


@pytest.fixture
def place(tmp_path):
    return tmp_path / "checkpoint"


@pytest.fixture
def incomplete(tmp_path):
    return tmp_path / "checkpoint.incomplete"


def write(folder, content="x", *, complete=True):
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_text(content)
    if complete:
        (folder / ".metadata").write_text(content)
    return folder


def test_only_complete_step_folders_are_found(place):
    for name in ("step-20", "step-3", "step-100", "step-30.bad", "old-step-40", "step-5x"):
        write(place / name)
    write(place / "step-200", complete=False)
    (place / "step-300").write_text("a file")
    assert complete_steps(place) == [3, 20, 100]


def test_there_are_none_before_the_first_is_saved(place):
    assert complete_steps(place) == []


def test_a_saved_step_replaces_an_older_save_of_it(place, incomplete):
    write(place / "step-20", "old")
    commit(write(incomplete / "step-20", "new"), place / "step-20")
    assert (place / "step-20" / ".metadata").read_text() == "new"
    assert list(incomplete.iterdir()) == []


def test_what_was_being_replaced_comes_back_if_the_run_died_in_between(place, incomplete):
    set_aside(write(place / "step-20", "old"), incomplete)
    write(incomplete / "step-20", "new")
    sweep(place, incomplete)
    assert complete_steps(place) == [20]
    assert not incomplete.exists()


def test_sweeping_removes_what_died_while_it_was_written_or_deleted(place, incomplete):
    write(place / "step-30")
    write(incomplete / "step-40", complete=False)
    set_aside(write(place / "step-20"), incomplete)
    sweep(place, incomplete)
    assert complete_steps(place) == [30]
    assert not incomplete.exists()
