"""The residual network under FSDP2, HSDP and DDP: one FSDP unit per residual block.

Each rank normalises by the statistics of its own images, or with ``images.sync_batch_norm`` by
those of all ranks. In the former case the *running* statistics, for validation and checkpoints, are
averaged over all data-parallel ranks after every training pass, so that they are equal everywhere;
their variance does not include the spread of the ranks' means.
"""

from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from parallel.batch_norm import synchronise_batch_norm
from parallel.gradients import sum_gradients
from titan_shampoo.config import ConfigError
from titan_shampoo.models.resnet import ResNet
from titan_shampoo.titan import (
    TORCH_DTYPE_MAP,
    JobConfig,
    ParallelDims,
    initialize_alike,
    run_seed,
)


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Return ``model`` sharded as ``[parallelism]`` says.

    Args:
        model: A ``ResNet`` on the meta device.
        parallel_dims: Degrees of parallelism and their meshes.
        job_config: Configuration of compilation and mixed precision.

    Raises:
        ConfigError: If activations are recomputed, which would count each batch twice in the
            running statistics.
    """
    mode = job_config.activation_checkpoint.mode
    if mode != "none":
        raise ConfigError(
            f'activation_checkpoint.mode: got "{mode}", expected "none": recomputing a batch norm '
            "would count its batch twice in the running statistics"
        )
    is_synchronised = job_config.images.sync_batch_norm and parallel_dims.dp_enabled
    if is_synchronised:
        synchronise_batch_norm(model, parallel_dims.get_mesh("loss"))
    if job_config.compile.enable and "model" in job_config.compile.components:
        _compile(model, job_config.compile.backend)
    if parallel_dims.fsdp_enabled:
        _shard(model, parallel_dims, job_config)
    elif parallel_dims.dp_replicate_enabled:
        # The hook below keeps buffers equal; DDP would broadcast rank 0's instead.
        mesh = parallel_dims.get_mesh("dp_replicate")
        replicate(model, device_mesh=mesh, bucket_cap_mb=100, broadcast_buffers=False)
    if parallel_dims.dp_enabled and not is_synchronised:
        average_running_statistics(model, parallel_dims.get_mesh("loss"))
    initialize_alike(model, run_seed(job_config))
    return model


def _compile(model: nn.Module, backend: str) -> None:
    """Compile each block for its own shapes.

    Blocks share one function. Compiled for variable shapes, batch norm's counts are symbolic and
    inductor fails; beyond the recompile limit, torch would run the later blocks uncompiled.
    """
    blocks = _blocks(model)
    # Training and evaluation have batches of different sizes.
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, 4 * len(blocks)
    )
    for block in blocks:
        block.compile(backend=backend, dynamic=False)


def _shard(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> None:
    training, parallelism = job_config.training, job_config.parallelism
    axes = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    options: dict[str, Any] = {
        "mesh": parallel_dims.get_mesh(axes),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        ),
        "offload_policy": CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy(),
        "reshard_after_forward": parallelism.fsdp_reshard_after_forward != "never",
    }
    for block in _blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    sum_gradients(model)


def _blocks(model: nn.Module) -> list[nn.Module]:
    assert isinstance(model, ResNet)
    return [block for stage in model.stages for block in stage.children()]


def average_running_statistics(model: nn.Module, mesh: DeviceMesh) -> None:
    """Average the running means and variances over ``mesh`` after every training pass.

    One collective of two numbers per channel; gradients are four hundred times as many.

    Args:
        model: A model with batch norms; its buffers may still move.
        mesh: All ranks that read different data.
    """

    def average(model: nn.Module, inputs: object, output: Tensor) -> None:
        if not model.training:
            return
        buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.BatchNorm2d)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        with torch.no_grad():
            flat = torch.cat(buffers)
            dist.all_reduce(flat, group=mesh.get_group())
            flat /= mesh.size()
            sizes = [buffer.numel() for buffer in buffers]
            for buffer, part in zip(buffers, flat.split(sizes), strict=True):
                # .data: autograd saved the buffer for the backward pass, but does not read it.
                buffer.data.copy_(part)

    model.register_forward_hook(average)
