"""Ask runs to stop at random times: ``python -m tests.soak.signals``."""

import argparse
import random
import signal
import tempfile
from pathlib import Path

from tests.support.checkpoint_runs import run_until_signal
from tests.support.ranks import run_on_ranks

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    options = parser.parse_args()
    draw = random.Random(0)
    bad = 0
    for trial in range(options.trials):
        number = draw.choice([signal.SIGTERM, signal.SIGUSR1])
        with tempfile.TemporaryDirectory() as folder:
            arguments = (Path(folder), number, draw.uniform(0, 0.3), draw.randrange(2))
            ranks = run_on_ranks(2, run_until_signal, *arguments)
        steps = {step for rank in ranks for step in rank[:2]}
        if len(steps) != 1 or not all(rank[2] for rank in ranks):
            bad += 1
            print(f"trial {trial}: {ranks}")
    print(f"{options.trials} signals, {bad} not saved and ended well")
