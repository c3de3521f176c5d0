"""A mistake ends all ranks in one line and with exit code 2, also under torchrun's agent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import PATIENCE

ROOT = Path(__file__).parents[1]


def launched(script: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "parallel.launch", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, str(script), *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.slow
def test_a_mistake_that_a_rank_explains_is_all_there_is_to_read(tmp_path: Path) -> None:
    ended = launched(
        ROOT / "train.py",
        "--job.config_file=configs/transformer_debug.toml",
        "--model.flavor=nope",
        f"--job.dump_folder={tmp_path / 'run'}",
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith('model.flavor = "nope": llama3 has no such flavour')
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_any_other_failure_is_reported_as_torchrun_does(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise RuntimeError('not explained')")
    ended = launched(script)
    assert ended.returncode == 1
    assert "not explained" in ended.stderr
    assert "ChildFailedError" in ended.stderr
