"""Common exit of ranks after an error, so that each of them has logged its own.

Every rank finds the same error, but not at the same moment. The first rank to leave closes the
store of the process group, and the others would end with a network error instead.
"""

import time

import torch.distributed as dist

_PATIENCE = 20.0


def wait_for_others(patience: float = _PATIENCE) -> None:
    """Wait until every rank of the process group is about to leave, at most ``patience``.

    Args:
        patience: Limit in seconds: a rank may fail alone, unnoticed by the others.
    """
    if not dist.is_initialized():
        return
    deadline = time.monotonic() + patience
    try:
        store = dist.distributed_c10d._get_default_store()
        store.add("ended", 1)
        _wait(store, "ended", dist.get_world_size(), deadline)
        if dist.get_rank() == 0:  # its process may hold the store
            _wait(store, "left", dist.get_world_size() - 1, deadline)
        else:
            store.add("left", 1)
    except RuntimeError:  # the store was closed with another rank
        return


def _wait(store: dist.Store, key: str, count: int, deadline: float) -> None:
    while store.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(0.02)
