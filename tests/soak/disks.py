"""Save on a disk that is full after so many bytes: ``python -m tests.soak.disks``.

The disk is a limit on the size of files, so that every write beyond it fails as on a full disk.
"""

import argparse
import logging
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from checkpoint.verify import verify
from tests.support.checkpoint_runs import run_in
from tests.support.ranks import run_on_ranks


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.lines.append(record.getMessage())


def fill_levels(folder: Path, count: int) -> list[int]:
    """Sizes from nothing to just too little for the largest file of a checkpoint."""
    run_on_ranks(2, _save_one, folder / "size")
    files = verify(folder / "size" / "checkpoint" / "step-1").files.values()
    smallest = min(file.bytes for file in files)
    return [smallest * level // count for level in range(count)]


def _save_one(folder: Path) -> None:
    with run_in(folder, "fsdp2") as run:
        run.manager.load()
        run.train(1)


def run_on_full_disk(folder: Path, async_mode: str, levels: list[int]) -> list[str]:
    """For each level, what went wrong on this rank; empty is well."""
    logger = logging.getLogger("checkpoint")
    logger.setLevel(logging.INFO)
    problems = []
    for level in levels:
        said = _Lines()
        logger.addHandler(said)
        problems.append(_run(folder / f"{async_mode}-{level}", async_mode, level, said))
        logger.removeHandler(said)
    return problems


def _run(folder: Path, async_mode: str, level: int, said: _Lines) -> str:
    """Save step 1, fail to save steps 2 to 4, save step 5."""
    with run_in(folder, "fsdp2", async_mode=async_mode) as run:
        run.manager.load()
        run.train(1)
        run.manager._finish_background(1)
        with file_size_limit(level):
            run.train(4)
            run.manager._finish_background(4)
            dist.barrier()
            left = {path.name for path in (folder / "checkpoint").iterdir()}
            dist.barrier()
        if left != {"step-1", ".lock"}:
            return f"left behind: {left}"
        verify(folder / "checkpoint" / "step-1")
        run.train(5)
        run.manager._finish_background(5)
        if run.progress.value != 5:
            return "training did not go on"
    verify(folder / "checkpoint" / "step-5")
    if dist.get_rank() == 0:
        wanted = ("checkpoint/step-", "not saved: File too large; needs ", "bytes, free are ")
        good = [all(part in line for part in wanted) and "\n" not in line for line in said.lines]
        if not good or not all(good):
            return f"said: {said.lines}"
    return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", type=int, default=20)
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        levels = fill_levels(folder, options.levels)
        for mode in ("disabled", "async"):
            ranks = run_on_ranks(2, run_on_full_disk, folder, mode, levels)
            found = [problem for problems in ranks for problem in problems if problem]
            bad += len(found)
            print("\n".join(found))
    print(f"{len(levels)} fill levels, sync and async: {bad} went wrong")
