"""The one seed of weights, data order and the generators of all libraries."""

import random
from typing import Any

import numpy as np
import torch
from torchtitan.config import JobConfig
from torchtitan.distributed import utils as dist_utils

DEFAULT_SEED = 0

_set_determinism = dist_utils.set_determinism


def run_seed(job_config: JobConfig) -> int:
    """Return ``debug.seed``, or 0, so that an unset seed is equal on every rank too."""
    seed = job_config.debug.seed
    return DEFAULT_SEED if seed is None else int(seed)


def set_determinism(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (torchtitan's)
    """Seed Python's and numpy's generators as torchtitan seeds torch's.

    The seed is equal on all ranks except those of other stages of a pipeline. A resumed run then
    loads all states from its checkpoint.
    """
    _set_determinism(*args, **kwargs)
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
