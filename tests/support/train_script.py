"""The real ``train.py`` on forked ranks: how a run ends and what each rank says; no torchrun."""

import os
import runpy
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.ranks import _FORKS, PATIENCE

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Ended:
    """How one rank ended."""

    exit_code: int
    error: list[str]
    """Lines on standard error."""
    output: list[str]
    """Lines on standard output."""


def start_on_ranks(
    world_size: int, args: Sequence[str], folder: Path, *, timeout: float = PATIENCE
) -> list[Ended]:
    """Run ``train.py`` with these arguments on every rank, each as if alone on its machine.

    Args:
        world_size: Number of ranks.
        args: The command line of each.
        folder: For what they say, and for the cache of ``datasets``; nothing else is written there.
        timeout: Seconds after which ranks are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        _FORKS.Process(target=_start, args=(rank, world_size, port, list(args), folder))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    ended = []
    for rank, worker in enumerate(workers):
        worker.join(timeout)
        if worker.exitcode is None:
            worker.kill()
            worker.join()
        said = [(folder / f"{name}-{rank}").read_text().splitlines() for name in ("err", "out")]
        ended.append(Ended(worker.exitcode or 0, *said))
    return ended


def _start(rank: int, world_size: int, port: int, args: list[str], folder: Path) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        opened = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    # LOCAL_RANK 0 on every rank: none waits for another one to speak first.
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import datasets  # noqa: PLC0415  (the parent, which only forks, need not import it)
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    os.chdir(ROOT)
    sys.argv = ["train.py", *args]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
