"""Ranks that end with a mistake leave together, so that each has said its own.

Every rank finds the same mistake, but not at the same moment. Whoever leaves first takes the store
of the process group along: the others would end with an error of the network.
"""

import time

import torch.distributed as dist

_PATIENCE = 20.0


def wait_for_others(patience: float = _PATIENCE) -> None:
    """Wait until every rank of the process group is about to leave, but no longer than this.

    Args:
        patience: Seconds; a rank may have a mistake of its own, of which the others never hear.
    """
    if not dist.is_initialized():
        return
    deadline = time.monotonic() + patience
    try:
        store = dist.distributed_c10d._get_default_store()
        store.add("ended", 1)
        _wait(store, "ended", dist.get_world_size(), deadline)
        if dist.get_rank() == 0:  # whose process may hold the store
            _wait(store, "left", dist.get_world_size() - 1, deadline)
        else:
            store.add("left", 1)
    except RuntimeError:  # the store went with another rank
        return


def _wait(store: dist.Store, key: str, count: int, deadline: float) -> None:
    while store.add(key, 0) < count and time.monotonic() < deadline:
        time.sleep(0.02)
