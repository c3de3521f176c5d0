"""Loaders of a run for any data set, and the conversion of epochs to steps.

torchtitan builds the data before schedules, metrics and checkpoints, and reads ``training.steps``
and ``[lr_scheduler]`` only after that.
"""

from torchtitan.config import JobConfig

from titan_shampoo.data.loader import (
    Augmentation,
    EvaluationLoader,
    IndexedSamples,
    PositionedLoader,
)
from titan_shampoo.titan.seed import run_seed


def training_loader(
    data: IndexedSamples,
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    *,
    augment: Augmentation | None = None,
    mixup: float = 0.0,
) -> PositionedLoader:
    """Return the endless loader of ``data``.

    Args:
        data: The training part.
        job_config: Configuration, in which epochs are replaced by steps.
        dp_world_size: Number of ranks that read different data.
        dp_rank: Number of this rank among them.
        augment: Random change of each sample.
        mixup: Parameter of the weights by which neighbours are mixed.
    """
    training, loading = job_config.training, job_config.training.dataloader
    resolve_epochs(job_config, len(data), dp_world_size)
    return PositionedLoader(
        data,
        seed=run_seed(job_config),
        local_batch_size=training.local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        augment=augment,
        mixup=mixup,
        max_bad_fraction=training.max_bad_fraction,
        num_workers=loading.num_workers,
        prefetch_factor=loading.prefetch_factor,
        pin_memory=loading.pin_memory,
    )


def evaluation_loader(
    data: IndexedSamples,
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    *,
    spread: bool = False,
) -> EvaluationLoader:
    """Return the loader that passes once over ``data``, or over ``validation.steps`` batches.

    Args:
        data: The validation part.
        job_config: Configuration with the number of batches.
        dp_world_size: Number of ranks that read different data.
        dp_rank: Number of this rank among them.
        spread: True to spread the batches over ``data``; False to take the first ones.
    """
    validation = job_config.validation
    num_batches = None if validation.steps == -1 else validation.steps
    return EvaluationLoader(
        data,
        local_batch_size=validation.local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        max_batches=1 if job_config.job.dry_run else num_batches,
        spread=spread,
        max_bad_fraction=job_config.training.max_bad_fraction,
        num_workers=validation.dataloader.num_workers,
    )


def resolve_epochs(job_config: JobConfig, num_samples: int, dp_world_size: int) -> None:
    """Write the steps for ``training.epochs`` and other epochs into ``job_config``."""
    training, schedule = job_config.training, job_config.lr_scheduler
    batch = training.global_batch_size
    if batch == -1:
        batch = training.local_batch_size * dp_world_size

    def steps(epochs: float) -> int:
        return round(epochs * num_samples / batch)

    if training.epochs is not None:
        training.steps = max(steps(training.epochs), 1)
    if schedule.warmup_epochs is not None:
        schedule.warmup_steps = steps(schedule.warmup_epochs)
    if schedule.milestone_epochs:
        schedule.milestones = [steps(epoch) for epoch in schedule.milestone_epochs]
