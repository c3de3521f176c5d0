"""Run a test function on several ranks of one machine."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
# What workers would each import for themselves; torch._dynamo comes with the first optimizer step.
_FORKS.set_forkserver_preload(["torch._dynamo", "titan_shampoo.titan", "tests.support.titan_runs"])

PATIENCE = 600
"""Seconds of silence after which something hangs: a machine may have other work, ten times its own.

pytest's own limits in the Makefile are longer.
"""


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = PATIENCE
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` gloo ranks and return what each rank returned.

    Workers are forked from a server that has imported torch once, so a call costs a fork, not an
    import. ``function`` must be importable (module level), and its results picklable.

    Raises:
        AssertionError: If a rank raised (with its traceback), died, or was silent for ``timeout``.
    """
    results: dict[int, Any] = {}
    receiver: Any
    with tempfile.TemporaryDirectory() as folder:
        workers, pipes = [], {}
        for rank in range(world_size):
            receiver, sender = _FORKS.Pipe(duplex=False)
            job = (rank, world_size, folder, sender, function, args)
            worker = _FORKS.Process(target=_work, args=job)
            worker.start()
            sender.close()
            workers.append(worker)
            pipes[receiver] = rank
        try:
            while pipes:
                ready = wait(list(pipes), timeout)
                assert ready, f"ranks {sorted(pipes.values())} not done after {timeout} s"
                for receiver in ready:
                    rank = pipes.pop(receiver)
                    error, results[rank] = _receive(receiver)
                    assert not error, f"rank {rank} of {world_size}:\n{error}"
        finally:
            for worker in workers:
                if len(results) < world_size or pipes:
                    worker.kill()  # a signal would only ask it to save
                worker.join(timeout)
    return [results[rank] for rank in range(world_size)]


def _receive(receiver: Connection) -> tuple[str, Any]:
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return "died without a word (killed, or out of memory)", None


def _work(
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch  # noqa: PLC0415  (the parent, which only forks, need not import it)
    import torch.distributed as dist  # noqa: PLC0415

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=PATIENCE / 2),
        )
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        # As bytes: torch's pickler for pipes passes handles of memory that dies with this process.
        sender.send_bytes(pickle.dumps(("", result)))
    except BaseException:
        sender.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        raise SystemExit(1) from None
