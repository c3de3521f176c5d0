"""Only complete checkpoints are found, and no rename or deletion ever loses one."""

import pytest

from checkpoint.folders import commit, discard, set_aside, steps_in, sweep, writing_name


def write(folder, content="x"):
    folder.mkdir(parents=True)
    (folder / "data").write_text(content)
    return folder


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_only_step_folders_are_found(tmp_path):
    others = ("step-30.bad", "old-step-40", "step-5x", "step-007", "step-4.writing-0123abcd")
    for name in ("step-20", "step-3", "step-100", *others):
        write(tmp_path / name)
    (tmp_path / "step-300").write_text("a file")
    assert steps_in(tmp_path) == [3, 20, 100]


def test_there_are_none_before_the_first_is_saved(tmp_path):
    assert steps_in(tmp_path / "checkpoint") == []


def test_what_is_written_appears_at_once_under_its_name(tmp_path):
    place = tmp_path / "step-20"
    written = write(writing_name(place))
    assert steps_in(tmp_path) == []
    commit(written, place)
    assert names(tmp_path) == ["step-20"]


@pytest.mark.parametrize("content", [True, False])
def test_nothing_is_overwritten(tmp_path, content):
    place = tmp_path / "step-20"
    write(place, "old") if content else place.mkdir()
    with pytest.raises(FileExistsError):
        commit(write(writing_name(place), "new"), place)
    assert not content or (place / "data").read_text() == "old"


def test_what_is_set_aside_is_kept_under_a_name_of_its_own(tmp_path):
    for _ in range(3):
        set_aside(write(tmp_path / "step-20"), "bad")
    assert names(tmp_path) == ["step-20.bad", "step-20.bad-2", "step-20.bad-3"]


def test_sweeping_removes_what_died_while_it_was_written_or_deleted_and_nothing_else(tmp_path):
    kept = ["step-10.bad", "step-20", "step-20.writing-mine", "step-30.trash", "notes"]
    for name in kept:
        write(tmp_path / name)
    write(writing_name(tmp_path / "step-40"))
    write(tmp_path / "step-5.trash-0123abcd")
    sweep(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_discarding_leaves_nothing(tmp_path):
    discard(write(tmp_path / "step-20"))
    assert names(tmp_path) == []
