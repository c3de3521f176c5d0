"""The mixture of experts under FSDP2 and expert parallelism.

The plan is torchtitan's. Experts are divided over the ``ep`` ranks, to which tokens travel and come
back, and each rank's experts are sharded over the rest of the data-parallel ranks (``efsdp``).
Router, shared expert and everything else are sharded with their block over all of them. Two things
are ours: gradients are summed by operations that gloo has, and the initial weights do not depend on
the sharding.
"""

from torch import nn

from parallel.gradients import sum_gradients
from titan_shampoo.titan import (
    JobConfig,
    ParallelDims,
    initialize_alike,
    parallelize_mixture,
    run_seed,
)


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Return ``model`` sharded as ``[parallelism]`` says.

    Args:
        model: The model on the meta device.
        parallel_dims: Degrees of parallelism and their meshes.
        job_config: Configuration of compilation, activation checkpointing and mixed precision.
    """
    model = parallelize_mixture(model, parallel_dims, job_config)
    sum_gradients(model)
    initialize_alike(model, run_seed(job_config))
    return model
