"""The Llama-style transformer under FSDP2, HSDP, DDP, tensor and pipeline parallelism.

The plan is torchtitan's: attention and feed-forward column- then row-wise over ``tp``, one FSDP
unit per block over ``dp_replicate x fsdp``. Its context parallelism, which needs GPUs, is untested
here. Two things are ours: gradients are summed by operations that gloo has, and the initial weights
do not depend on the sharding.
"""

from torch import nn

from parallel.gradients import sum_gradients
from titan_shampoo.titan import (
    JobConfig,
    ParallelDims,
    initialize_alike,
    parallelize_llama,
    pipeline_llm,
    run_seed,
)

__all__ = ["parallelize", "pipeline"]

pipeline = pipeline_llm


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Return ``model``, or a part of a pipeline, sharded as ``[parallelism]`` says.

    Args:
        model: The model on the meta device.
        parallel_dims: Degrees of parallelism and their meshes.
        job_config: Configuration of compilation, activation checkpointing and mixed precision.
    """
    model = parallelize_llama(model, parallel_dims, job_config)
    sum_gradients(model)
    initialize_alike(model, run_seed(job_config))
    return model
