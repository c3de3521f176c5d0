"""``python -m checkpoint``: what it prints, its exit codes, and that looking needs no torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.command_line import main
from tests.support.checkpoint_runs import run_in
from tests.support.ranks import run_on_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(2, three_steps, folder)
    return folder / "checkpoint"


def three_steps(folder):
    with run_in(folder, "fsdp2", settings={"optimizer.lr": 0.1}) as run:
        run.manager.load()
        run.train(2)
        run.manager._settings["optimizer.lr"] = 0.2
        run.train(3)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_looking_needs_no_torch(saved, command):
    program = (
        "import sys; from checkpoint.command_line import main;"
        f"code = main([{command!r}, {str(saved)!r}]);"
        "assert not {'torch', 'numpy'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step-3" in done.stdout


def test_a_run_is_looked_at_by_its_own_folder(saved, tmp_path, capsys):
    (tmp_path / "checkpoint").symlink_to(saved)
    assert main(["verify", str(tmp_path)]) == 0
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["good"] * 3


def test_inspect_says_what_a_checkpoint_is(saved, capsys):
    assert main(["inspect", str(saved / "step-3")]) == 0
    said = capsys.readouterr().out
    assert "step 3 of run" in said
    assert "by 2 ranks on cpu" in said
    assert any("left_root" in line and "6 tensors" in line for line in said.splitlines())
    assert "shampoo           10 x 12  blocks 4 x 4        wq.weight" in said
    assert main(["inspect", "--json", str(saved)]) == 0
    first, *_ = found = json.loads(capsys.readouterr().out)
    assert len(found) == 3
    assert first["step"] == 1
    assert sum(kind["bytes"] for kind in first["kinds"].values()) < sum(first["files"].values())
    assert first["values"]["dataloader"] == {"samples": 8}


def test_verify_names_every_bad_file(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "copy")
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        path = tmp_path / "copy" / "step-2" / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    (tmp_path / "copy" / "step-1" / "XXH128SUMS").unlink()
    assert main(["verify", str(tmp_path / "copy")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "step-1/XXH128SUMS: missing" in lines[0]
    assert "step-2/rank-00000.safetensors: corrupted" in lines[1]
    assert "step-2/rank-00001.safetensors: corrupted" in lines[2]
    assert lines[3].endswith("step-3: good")
    assert main(["verify", "--json", str(tmp_path / "copy")]) == 1
    assert [len(found) for found in json.loads(capsys.readouterr().out).values()] == [1, 2, 0]


def test_diff_says_what_changed_between_two_steps(saved, capsys):
    assert main(["diff", str(saved / "step-2"), str(saved / "step-3")]) == 1
    said = capsys.readouterr().out
    assert "optimizer.lr: 0.1 in the first, 0.2 in the second" in said
    assert "model.wq.weight: by " in said
    assert "dataloader.samples: 16 in the first, 24 in the second" in said
    assert main(["diff", "--json", str(saved / "step-2"), str(saved)]) == 1
    values = json.loads(capsys.readouterr().out)["values"]
    assert values["optim.wq.weight.step"] > 0
    assert "optim.wq.weight.failures" not in values  # all zero in both


def test_a_checkpoint_does_not_differ_from_itself(saved, capsys):
    assert main(["diff", str(saved / "step-3"), str(saved)]) == 0
    assert "no difference" in capsys.readouterr().out


def test_export_and_convert(saved, tmp_path, capsys):
    for to in ("hf", "dcp"):
        assert main(["export", str(saved), str(tmp_path / to), "--to", to]) == 0
        assert main(["convert", str(tmp_path / to), str(tmp_path / f"from-{to}")]) == 0
        assert main(["verify", str(tmp_path / f"from-{to}")]) == 0
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "from-hf"), str(tmp_path / "from-dcp")]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nowhere"], "nowhere: no such checkpoint"),
        (["export", "SAVED", "SAVED"], "exists; name another folder"),
        (["convert", "nowhere", "out"], "nowhere: no such folder"),
        (["convert", "SAVED", "out"], "has no .safetensors files"),
        (["convert", "SAVED/step-3", "out", "--flavor", "8X"], 'flavor = "8X"'),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    saved, tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("SAVED", str(saved)) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
