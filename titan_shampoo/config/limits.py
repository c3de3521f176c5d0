"""Which values a setting may take beyond its type: steps are positive, decays lie in [0, 1], ..."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _at_least(least: int) -> Limit:
    return Limit(f"at least {least}", lambda value: value >= least)


def _from_to(least: int, most: int) -> Limit:
    return Limit(f"from {least} to {most}", lambda value: least <= value <= most)


def _off_or_at_least(off: int, least: int) -> Limit:
    return Limit(f"{off} or at least {least}", lambda value: value == off or value >= least)


_LARGEST = {"debug.seed": 2**63 - 1}


def largest(name: str) -> int:
    """The largest integer that ``name`` may be, and its negative the smallest."""
    return _LARGEST.get(name, 2**31 - 1)


_WORKERS = _from_to(0, 1024)
_PREFETCHED = _from_to(1, 1024)
_PIXELS = _from_to(1, 16384)
_PERIOD = _from_to(1, 10**6)  # each step of it is planned
_POSITIVE = Limit("greater than 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = Limit("0 or greater", lambda value: 0 <= value < math.inf)
_AVERAGING = Limit("from 0 to below 1", lambda value: 0 <= value < 1)
_FRACTION = Limit("between 0 and 1", lambda value: 0 <= value <= 1)
_NOT_EMPTY = Limit("not empty", bool)
_EPOCHS = Limit("greater than 0 and at most 1e9", lambda value: 0 < value <= 1e9)
_SHARE = Limit("greater than 0 and at most 1", lambda value: 0 < value <= 1)
_BETAS = Limit(
    "two numbers, the first from 0 to below 1, the second greater than 0 and at most 1",
    lambda betas: len(betas) == 2 and 0 <= betas[0] < 1 and 0 < betas[1] <= 1,
)
_BLOCK_SIZE = Limit(
    "at least 1, or two such numbers",
    lambda size: (
        len(size) == 2 and min(size) >= 1
        if isinstance(size, list)
        else size is not None and size >= 1
    ),
)

_EXPONENT = Limit(
    "0 or greater, one number or one for each dim",
    lambda value: (
        bool(value) and all(map(_NOT_NEGATIVE.holds, value))
        if isinstance(value, list)
        else _NOT_NEGATIVE.holds(value)
    ),
)
_MOMENTS = Limit(
    "two numbers from 0 to below 1, the second greater than 0",
    lambda betas: len(betas) == 2 and 0 <= betas[0] < 1 and 0 < betas[1] < 1,
)

_SCHEDULES = (
    "1F1B", "Interleaved1F1B", "GPipe", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble",
    "DualPipeV", "PipelineScheduleSingle", "PipelineScheduleMulti",
)  # fmt: skip
_SCHEDULE = Limit(
    f"one of {', '.join(_SCHEDULES)}",
    lambda name: name.lower() in map(str.lower, _SCHEDULES),
)

_COLOURS = Limit(
    "three numbers from 0 to 1",
    lambda values: len(values) == 3 and all(map(_FRACTION.holds, values)),
)
_SPREADS = Limit(
    "three numbers greater than 0",
    lambda values: len(values) == 3 and all(map(_POSITIVE.holds, values)),
)
_ASCENDING = Limit(
    "numbers greater than 0, each greater than the one before",
    lambda values: all(low < high for low, high in pairwise([0, *values])),
)


def _in(table: str, limits: Mapping[str, Limit]) -> dict[str, Limit]:
    return {f"{table}.{key}": limit for key, limit in limits.items()}


_BLOCKS = {
    "betas": _BETAS,
    "block_size": _BLOCK_SIZE,
    "dampening": _FRACTION,
    "factor_frequency": _PERIOD,
    "lr": _POSITIVE,
    "momentum": _AVERAGING,
    "precondition_frequency": _PERIOD,
    "start_step": _at_least(1),
    "max_failures": _at_least(1),
    "max_skipped": _at_least(1),
    "weight_decay": _NOT_NEGATIVE,
}
_GRAFTED_BLOCKS = {
    **_BLOCKS,
    "beta3": _AVERAGING,
    "grafting_beta2": _SHARE,
    "grafting_eps": _POSITIVE,
    "match_rms": _POSITIVE,
}
_SHAMPOO = {
    **_GRAFTED_BLOCKS,
    "eps": _POSITIVE,
    "eps_relative": _SHARE,
    "exponent": _EXPONENT,
}
# Second moments that sum instead of averaging have no correction for their start at zero.
_SOAP = {**_BLOCKS, "betas": _MOMENTS, "eps": _POSITIVE}

_LAYERS = {
    "betas": _MOMENTS,
    "damping": _POSITIVE,
    "dampening": _FRACTION,
    "eps": _POSITIVE,
    "fallback_lr": _NOT_NEGATIVE,
    "kl_clip": _POSITIVE,
    "lr": _POSITIVE,
    "max_skipped": _at_least(1),
    "momentum": _AVERAGING,
    "statistics_decay": _AVERAGING,
    "weight_decay": _NOT_NEGATIVE,
}

_FACTORED_LAYERS = {
    **_LAYERS,
    "factor_frequency": _PERIOD,
    "max_factor_dim": _at_least(1),
    "max_failures": _at_least(1),
    "precondition_frequency": _PERIOD,
}

LIMITS: Mapping[str, Limit] = {
    "activation_checkpoint.memory_budget": _FRACTION,
    "activation_checkpoint.selective_ac_option": Limit(
        '"op" or a whole number of layers in quotes',
        lambda option: option == "op" or (option.isdecimal() and int(option) > 0),
    ),
    "checkpoint.folder": _NOT_EMPTY,
    "checkpoint.interval": _at_least(1),
    "checkpoint.keep_latest_k": _off_or_at_least(0, 1),
    "checkpoint.load_step": _at_least(-1),
    "comm.init_timeout_seconds": _at_least(1),
    "comm.train_timeout_seconds": _at_least(1),
    "comm.trace_buf_size": _at_least(0),
    "debug.seed": _at_least(0),
    "images.flip": _FRACTION,
    "images.label_smoothing": _AVERAGING,
    "images.mean": _COLOURS,
    "images.min_area": _SHARE,
    "images.mixup": _NOT_NEGATIVE,
    "images.num_classes": _at_least(1),
    "images.random_erasing": _FRACTION,
    "images.resize": _PIXELS,
    "images.rotate": Limit("from 0 to 180", lambda value: 0 <= value <= 180),
    "images.shift": _at_least(0),
    "images.size": _PIXELS,
    "images.std": _SPREADS,
    "images.stretch": _AVERAGING,
    "job.config_file": _NOT_EMPTY,
    "job.dump_folder": _NOT_EMPTY,
    "lr_scheduler.decay_ratio": _FRACTION,
    "lr_scheduler.factor": _SHARE,
    "lr_scheduler.milestone_epochs": _ASCENDING,
    "lr_scheduler.milestones": _ASCENDING,
    "lr_scheduler.min_lr_factor": _FRACTION,
    "lr_scheduler.total_steps": _at_least(1),
    "lr_scheduler.warmup_epochs": _NOT_NEGATIVE,
    "lr_scheduler.warmup_steps": _at_least(0),
    "metrics.log_freq": _at_least(1),
    "model.flavor": _NOT_EMPTY,
    "optimizer.average_decay": _AVERAGING,
    "optimizer.beta1": _AVERAGING,
    "optimizer.beta2": Limit("greater than 0 and below 1", lambda value: 0 < value < 1),
    "optimizer.eps": _POSITIVE,
    "optimizer.lr": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.groups.lr": _POSITIVE,
    "optimizer.groups.pattern": _NOT_EMPTY,
    "optimizer.groups.weight_decay": _NOT_NEGATIVE,
    "optimizer.sgd.dampening": _FRACTION,
    "optimizer.sgd.momentum": _AVERAGING,
    **_in("optimizer.shampoo", _SHAMPOO),
    **_in("optimizer.soap", _SOAP),
    **_in("optimizer.kl_shampoo", _GRAFTED_BLOCKS),
    **_in("optimizer.eva", {**_LAYERS, "kv_batch_size": _POSITIVE}),
    **_in("optimizer.eva_f", _LAYERS),
    **_in("optimizer.eva_s", _LAYERS),
    **_in("optimizer.foof", _FACTORED_LAYERS),
    **_in("optimizer.kfac", {**_FACTORED_LAYERS, "loss_normaliser": _POSITIVE}),
    "parallelism.context_parallel_degree": _at_least(1),
    "parallelism.data_parallel_replicate_degree": _at_least(1),
    "parallelism.data_parallel_shard_degree": _off_or_at_least(-1, 1),
    "parallelism.expert_parallel_degree": _at_least(1),
    "parallelism.expert_tensor_parallel_degree": _at_least(1),
    "parallelism.pipeline_parallel_degree": _at_least(1),
    "parallelism.pipeline_parallel_schedule": _SCHEDULE,
    "parallelism.pipeline_parallel_first_stage_less_layers": _at_least(0),
    "parallelism.pipeline_parallel_last_stage_less_layers": _at_least(0),
    "parallelism.pipeline_parallel_layers_per_stage": _at_least(1),
    "parallelism.pipeline_parallel_microbatch_size": _at_least(1),
    "parallelism.tensor_parallel_degree": _at_least(1),
    "profiling.profile_freq": _at_least(1),
    "profiling.profiler_active": _at_least(1),
    "profiling.profiler_warmup": _at_least(0),
    "training.dataloader.num_workers": _WORKERS,
    "training.dataloader.prefetch_factor": _PREFETCHED,
    "training.dataset": _NOT_EMPTY,
    "training.epochs": _EPOCHS,
    "training.gc_freq": _at_least(1),
    "training.global_batch_size": _off_or_at_least(-1, 1),
    "training.local_batch_size": _at_least(1),
    "training.max_bad_fraction": _FRACTION,
    "training.max_norm": Limit("greater than 0", lambda value: value > 0),  # inf: no clipping
    "training.seq_len": _at_least(1),
    "training.stream_lanes": _at_least(1),
    "training.steps": _at_least(1),
    "validation.dataloader.num_workers": _WORKERS,
    "validation.dataloader.prefetch_factor": _PREFETCHED,
    "validation.freq": _at_least(1),
    "validation.local_batch_size": _at_least(1),
    "validation.seq_len": _at_least(1),
    "validation.steps": _off_or_at_least(-1, 1),
}
