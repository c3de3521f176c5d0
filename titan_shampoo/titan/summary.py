"""Description of a run in a few aligned lines, before it starts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from titan_shampoo.data import printable
from titan_shampoo.distributed.summary import readable
from titan_shampoo.layers.optimizer import LayerOptimizer
from titan_shampoo.titan.optimizers import OptimizersContainer, Preconditioner

_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
_DIAGONAL = {"adamw": "AdamW", "sgd": "SGD"}
_MOST_DECAY = 0.01
"""Share of the weights lost per step from which a warning is shown."""


def summary_lines(
    job_config: JobConfig,
    parallel_dims: ParallelDims,
    *,
    model_parts: list[nn.Module],
    optimizers: OptimizersContainer,
    num_samples: int | None,
    unit: str,
) -> list[str]:
    """Return the lines for this rank.

    Args:
        job_config: Configuration with epochs replaced by steps.
        parallel_dims: Degrees of parallelism.
        model_parts: Sharded parts of the model on this rank.
        optimizers: Optimizers with their state.
        num_samples: Number of samples in the training data; None for a stream.
        unit: Unit of the samples: "windows" or "images".
    """
    rows = [
        ("model", _model(job_config, model_parts)),
        ("mesh", _mesh(parallel_dims)),
        *_labelled("optimizer", map(optimizer_line, optimizers.optimizers)),
        *_labelled("warning", decay_warnings(optimizers.optimizers)),
        ("memory", _memory(model_parts, optimizers)),
        ("data", _data(job_config, parallel_dims, num_samples, unit)),
        ("writes", _places(job_config)),
    ]
    return [f"{label:<10} {text}" for label, text in rows]


def _labelled(label: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    for index, text in enumerate(texts):
        yield "" if index else label, text


def _model(job_config: JobConfig, parts: list[nn.Module]) -> str:
    count = sum(param.numel() for part in parts for param in part.parameters())
    stage = " in this pipeline stage" if job_config.parallelism.pipeline_parallel_degree > 1 else ""
    return f"{job_config.model.name} {job_config.model.flavor}, {count:,} parameters{stage}"


def _mesh(dims: ParallelDims) -> str:
    degrees = {axis: getattr(dims, axis) for axis in _AXES}
    used = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1)
    ranks = "1 rank" if dims.world_size == 1 else f"{dims.world_size} ranks"
    return f"{ranks}{': ' if used else ''}{used}, torch {torch.__version__}"


def optimizer_line(optimizer: Optimizer) -> str:
    """Method, learning rates and number of parameters; call it after schedules are made."""
    tensors: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    rates: dict[bool, set[float]] = {False: set(), True: set()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            fallback = _fallback(optimizer, param, group)
            label = f"{fallback} (fallback)" if fallback else type(optimizer).__name__
            tensors[label] += 1
            numbers[label] += param.numel()
            own = group.get("fallback_lr") if fallback else None
            rates[bool(fallback)].add(float(group["initial_lr"] if own is None else own))
    labels = sorted(tensors, key=lambda label: "(fallback)" in label)
    parts = [f"{label} on {tensors[label]} tensors ({numbers[label]:,})" for label in labels]
    return f"{', '.join(parts)}; learning rate {_rates(rates[False], rates[True])}"


def decay_warnings(optimizers: Iterable[Optimizer]) -> Iterator[str]:
    """A line for each optimizer whose weight decay removes most of the weights in some steps.

    Decay that is usual for AdamW is harmful at the learning rates of methods for layers, whose
    momentum multiplies it again.
    """
    for optimizer in optimizers:
        shares = [
            group["initial_lr"] * group["weight_decay"] / (1 - group["momentum"])
            for group in optimizer.param_groups
            if isinstance(optimizer, LayerOptimizer) and group["weight_decay_type"] == "decoupled"
        ]
        if shares and max(shares) > _MOST_DECAY:
            yield (
                f"{type(optimizer).__name__} decays weights by {max(shares):.2g} per step (lr x "
                "weight_decay / (1 - momentum)); set optimizer.weight_decay, 1e-4 for instance"
            )


def _fallback(optimizer: Optimizer, param: Tensor, group: Mapping[str, Any]) -> str | None:
    """The diagonal method that steps a parameter instead of the optimizer's own; None without."""
    if isinstance(optimizer, Preconditioner) and not optimizer.preconditions(param):
        return _DIAGONAL[group["fallback"]]
    return None


def _rates(own: set[float], of_fallback: set[float]) -> str:
    first, second = (", ".join(f"{rate:.3g}" for rate in sorted(r)) for r in (own, of_fallback))
    return f"{first}, fallback {second}" if own and second not in ("", first) else first or second


def _memory(parts: list[nn.Module], optimizers: OptimizersContainer) -> str:
    weights = _bytes(param for part in parts for param in part.parameters())
    state = _bytes(optimizers.state_dict().values())
    return (
        f"on this rank: weights {readable(weights, 'B')}, gradients as many, "
        f"optimizer {readable(state, 'B')}"
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local if isinstance(t, Tensor))


def _data(job_config: JobConfig, dims: ParallelDims, num_samples: int | None, unit: str) -> str:
    training = job_config.training
    readers = int(dims.dp_replicate * dims.dp_shard)
    batch = training.global_batch_size
    batch = training.local_batch_size * readers if batch == -1 else batch
    source = printable(training.dataset)
    if num_samples is None:
        return f"{source}, streaming; {training.steps:,} steps of {batch}"
    epochs = training.steps * batch / num_samples
    return (
        f"{source}: {num_samples:,} {unit}; {training.steps:,} steps of {batch} "
        f"({epochs:.3g} epochs)"
    )


def _places(job_config: JobConfig) -> str:
    if job_config.job.dry_run:
        return "nothing: a dry run"
    folder = Path(job_config.job.dump_folder)
    saved = f", checkpoints in {folder / job_config.checkpoint.folder}"
    return f"metrics in {folder}{saved if job_config.checkpoint.enable else ', no checkpoints'}"
