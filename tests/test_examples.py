"""Every program of examples/ runs, and its loss falls."""

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.ranks import PATIENCE

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NEEDS = {"hugging_face_trainer": ["transformers", "accelerate"], "lightning_module": ["lightning"]}
ON_RANKS = ["fsdp2"]


def check_that_the_loss_falls(printed: str) -> None:
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)$", printed, re.MULTILINE)]
    assert len(losses) >= 3, printed
    assert losses[-1] < 0.9 * losses[0]


def run(*words: str) -> str:
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path()},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def path() -> str:
    return os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])


@pytest.mark.parametrize("name", ["plain_loop", "parameter_groups"])
def test_a_program_of_torch_alone_learns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    check_that_the_loss_falls(capsys.readouterr().out)


@pytest.mark.parametrize("name", NEEDS)
def test_a_program_inside_a_trainer_learns(name: str) -> None:
    for package in NEEDS[name]:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    check_that_the_loss_falls(run(str(EXAMPLES / f"{name}.py")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_RANKS)
def test_a_program_on_two_ranks_learns(name: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    check_that_the_loss_falls(run(*launcher, str(EXAMPLES / f"{name}.py")))


def test_every_program_has_a_test() -> None:
    tried = {"plain_loop", "parameter_groups", *NEEDS, *ON_RANKS}
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tried


def test_the_program_on_ranks_is_as_short_as_the_readme_says() -> None:
    lines = (EXAMPLES / "fsdp2.py").read_text().partition("import os")[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 40
