"""Process groups of runs that torchrun restarts.

All attempts of a job share the key-value store of torchrun's agent, and torch no longer separates
them: workers of the second attempt read the addresses of dead workers of the first one. Here each
attempt has its own keys.
"""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

_original = dist.init_process_group


def init_process_group(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (torch's)
    """``torch.distributed.init_process_group`` with separate keys for each restart."""
    uses_agents_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if uses_agents_store and not {"store", "init_method", "rank"} & kwargs.keys():
        kwargs |= {
            "store": _store_of_attempt(kwargs.get("timeout") or default_pg_timeout),
            "rank": int(os.environ["RANK"]),
            "world_size": int(os.environ["WORLD_SIZE"]),
        }
    _original(*args, **kwargs)


def _store_of_attempt(timeout: timedelta) -> dist.Store:
    agents = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=False,
        timeout=timeout,
    )
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", agents)
