"""train.py under torchrun: the start of a run that saves, its ranks, and the wait for its files."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.ranks import PATIENCE

ROOT = Path(__file__).parents[2]
SAVING = {
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "training__steps": 12,
    "optimizer__name": "Shampoo",
    "optimizer__shampoo.precondition_frequency": 2,
    "optimizer__shampoo.block_size": 64,
}


def torchrun(args, folder, *options):
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"),
    }  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*launch, *options, "train.py", *args],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip


def workers_of(process):
    """The ranks that a torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def wait_for(path, process, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
