"""Kill ranks of jobs that torchrun restarts: ``python -m tests.soak.restarts``.

Each job is train.py under ``torchrun --max-restarts=3``; a rank is killed after each of three
random steps was saved. Every job must end well, with the bits of one that was left alone.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from checkpoint.verify import verify
from tests.support.checkpoint_runs import equal
from tests.support.ranks import PATIENCE, run_on_ranks
from tests.support.titan_runs import text_run, train_all, write_text
from tests.support.torchrun import SAVING, torchrun, wait_for, workers_of


def job(folder: Path, name: str, draw: random.Random) -> str:
    """What went wrong with one job; empty if nothing did."""
    process = torchrun(text_run(folder, name, **SAVING), folder, "--max-restarts=3")
    place = folder / name / "checkpoint"
    for step in sorted(draw.sample([2, 4, 6, 8, 10], 3)):
        wait_for(place / f"step-{step}", process)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(draw.choice(workers_of(process)), signal.SIGKILL)
        time.sleep(3)  # until torchrun has ended the others
    said, _ = process.communicate(timeout=PATIENCE)
    if process.returncode:
        return f"exit code {process.returncode}: {said[-2000:]}"
    verify(place / "step-12")
    whole = folder / "whole" / "checkpoint" / "step-12"
    return "" if equal(place / "step-12", whole) else "ends with other bits"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    options = parser.parse_args()
    draw = random.Random(0)
    good = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_text(folder)
        run_on_ranks(2, train_all, [text_run(folder, "whole", **SAVING)])
        for number in range(options.jobs):
            problem = job(folder, f"job-{number}", draw)
            good += not problem
            print(f"job {number}: {problem or 'good'}", flush=True)
    print(f"{good} of {options.jobs} jobs through three kills each")
