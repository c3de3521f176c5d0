"""Kill ranks at random times and resume, until the run is done: ``python -m tests.soak.kills``.

Each trial is a job of two ranks that saves every step, synchronously or not, and keeps the newest
two. One rank or both are killed with SIGKILL at a random moment; the job is started again and
killed again, and in the end left alone. Its last checkpoint must be that of a job never killed.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.folders import step_folder, steps_in
from checkpoint.verify import verify
from tests.support.checkpoint_runs import content, run_in
from tests.support.ranks import _FORKS, PATIENCE, _work

STEPS = 60


def job(folder: Path, async_mode: str) -> None:
    """Train to the last step from wherever the folder is; says which steps are saved."""
    torch.manual_seed(dist.get_rank())
    with run_in(folder, "fsdp2", async_mode=async_mode, keep_latest_k=2) as run:
        run.manager.load()
        while run.progress.value < STEPS:
            run.train(run.progress.value + 1, last=STEPS)
            if dist.get_rank() == 0:
                (folder / "acknowledged").write_text(str(run.manager._saved_step))


def start(folder: Path, async_mode: str) -> list[int]:
    """Start the ranks of a job; returns their process ids. They write nothing to this process."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Path(tempfile.mkdtemp(dir=folder))
    receiver, sender = _FORKS.Pipe(duplex=False)
    workers = []
    for rank in range(2):
        arguments = (rank, 2, str(store), sender, job, (folder, async_mode))
        worker = _FORKS.Process(target=_work, args=arguments)
        worker.start()
        workers.append(worker)
    _started[folder] = workers, receiver  # a pipe that nobody holds breaks under its writers
    return [worker.pid or 0 for worker in workers]


_started: dict[Path, tuple[list[Any], Any]] = {}


def wait(folder: Path, seconds: float = PATIENCE) -> bool:
    """Whether all ranks ended well."""
    codes = []
    workers, _ = _started.pop(folder)
    for worker in workers:
        worker.join(seconds)
        codes.append(worker.exitcode)
    return codes == [0, 0]


def trial(folder: Path, async_mode: str, draw: random.Random) -> tuple[int, str]:
    """Number of kills that hit, and what went wrong."""
    hits = 0
    for _ in range(3):
        pids = start(folder, async_mode)
        time.sleep(draw.uniform(0.2, 1.5))
        for pid in draw.choice([pids, pids[:1], pids[1:]]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        hits += not wait(folder)
        problem = lost(folder)
        if problem:
            return hits, problem
    start(folder, async_mode)
    return hits, "" if wait(folder) else "the last attempt failed"


def lost(folder: Path) -> str:
    """An acknowledged step that is not there, or something broken under a good name."""
    path = folder / "acknowledged"
    text = path.read_text() if path.exists() else ""
    acknowledged = int(text) if text else -1
    steps = steps_in(folder / "checkpoint")
    for step in steps:
        verify(step_folder(folder / "checkpoint", step))
    return f"{acknowledged} lost" if acknowledged > max([*steps, -1]) else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=34, help="of three kills each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        start(root / "whole", "disabled")
        assert wait(root / "whole")
        expected = content(step_folder(root / "whole" / "checkpoint", STEPS))
        kills = bad = 0
        for number in range(options.trials):
            folder = root / str(number)
            hits, problem = trial(folder, ("disabled", "async")[number % 2], draw)
            kills += hits
            if not problem:
                found = content(step_folder(folder / "checkpoint", STEPS))
                same = all(torch.equal(found[key], value) for key, value in expected.items())
                problem = "" if same else "ends with other bits"
            bad += bool(problem)
            if problem:
                print(f"trial {number}: {problem}")
    print(f"{options.trials} jobs, {kills} kills, {bad} lost or broken")
