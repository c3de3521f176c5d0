"""The recipe of one's own that docs/recipes.md shows is one that trains, resumes and is planned."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.command_line import main as checkpoint
from tests.support.ranks import PATIENCE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/recipes.md").read_text().partition("## A recipe of your own")[2]
PACKAGES = ("titan_shampoo", "parallel", "checkpoint")


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


def apply_to(folder):
    """Change the lines that the page changes."""
    for part in block("diff").split("--- a/")[1:]:
        name, *hunks = re.split(r"^@@\n", part, flags=re.MULTILINE)
        file = folder / name.splitlines()[0]
        for hunk in hunks:
            lines = hunk.splitlines()
            before, after = (
                "".join(f"{line[1:]}\n" for line in lines if line[0] in kept)
                for kept in (" -", " +")
            )
            assert file.read_text().count(before) == 1, f"{file}: {before}"
            file.write_text(file.read_text().replace(before, after))


@pytest.fixture
def project(tmp_path):
    """A copy of the project with the module, the lines and the settings of the page in it."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "parallel/window.py").write_text(block("python"))
    (tmp_path / "window.toml").write_text(block("toml"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 2000)
    apply_to(tmp_path)
    return tmp_path


def start(project, *args):
    """What a command says; the copy of the project comes before the installed one."""
    done = subprocess.run(
        [sys.executable, *args, "--job.config_file", "window.toml",
         "--training.dataset", "text.txt", "--lr_scheduler.warmup_steps", "2",
         "--checkpoint.interval", "2"],
        cwd=project, capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(project), "HF_DATASETS_CACHE": str(project / "cache"),
                          "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(said):
    return [float(loss) for loss in re.findall(r"step +\d+/\d+ +loss +([\d.]+)", said)]


@pytest.mark.slow
def test_the_recipe_of_the_page_is_planned_trains_and_resumes_on_other_ranks(project):
    plan = start(project, "train.py", "--plan", "--world-size", "8")
    assert plan.startswith("window small, ")
    assert "Shampoo: blocks owned" in plan
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    first = start(project, *torchrun, "--training.steps", "4", "--metrics.log_freq", "1")
    assert len(losses(first)) == 4
    assert losses(first)[-1] < losses(first)[0]
    assert re.search(r"step 4/4 +validation loss [\d.]+ nats per byte", first)
    # Shampoo steps the layers, AdamW what is named like an embedding, and biases.
    assert "Shampoo on 2 tensors (49,152), AdamW (fallback) on 5 tensors" in first
    more = start(project, "train.py", "--training.steps", "6", "--metrics.log_freq", "1")
    assert "resumed after step 4 of 6" in more
    assert checkpoint(["verify", str(project / "outputs/window/checkpoint")]) == 0


@pytest.mark.slow
def test_weights_of_the_recipe_of_the_page_are_those_of_one_rank_on_every_mesh(project):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    batch = ["--training.global_batch_size", "16", "--dry-run"]
    meshes = [
        ["train.py"],
        torchrun,
        [*torchrun, "--parallelism.data_parallel_replicate_degree", "2",
         "--parallelism.data_parallel_shard_degree", "1"],
    ]  # fmt: skip
    said = [losses(start(project, *mesh, *batch)) for mesh in meshes]
    assert len(said[0]) == 1
    assert said[0] == said[1] == said[2]
