"""What a run will need on every rank, found out without starting it.

The model is built on the meta device, and sharded by the recipe's own functions over torch's fake
process group, which has as many ranks as the run and sends nothing; the optimizers are then the
real ones, with state that has shapes and no memory. One rank per pipeline stage is asked: from its
meshes it knows all ranks of its stage. So nothing here can drift from what a run does.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.utils import set_default_dtype

from titan_shampoo.blocks.optimizer import BlockOptimizer
from titan_shampoo.distributed.memory import bytes_by_rank
from titan_shampoo.distributed.summary import MESSAGES, Figures, Summary, readable, table
from titan_shampoo.layers.methods import KroneckerOptimizer
from titan_shampoo.titan.optimizers import OptimizersContainer, members, replica_group
from titan_shampoo.titan.own_process import in_own_process

Row = tuple[str, Figures, str]
"""What, one figure per rank, and its unit."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What the ranks of one pipeline stage hold and do."""

    ranks: Sequence[int]
    rows: list[Row]
    total: Figures
    """Bytes of everything in ``rows`` that is memory."""
    summaries: Mapping[str, Summary]
    """By method, of the optimizers whose blocks have owners."""
    keys: int
    """Entries of a checkpoint that are of this stage."""

    def lines(self) -> list[str]:
        """The table and what goes with it, for people."""
        lines = table([*self.rows, ("all of this memory", self.total, "B")])
        for method, summary in self.summaries.items():
            lines += [f"{method}: {note}" for note in summary.notes()]
        return lines

    def as_json(self) -> dict[str, Any]:
        """The same figures for programs, rank by rank."""
        return {
            "ranks": list(self.ranks),
            "per_rank": {what: figures.tolist() for what, figures, _ in self.rows},
            "units": {what: unit for what, _, unit in self.rows},
            "memory": self.total.tolist(),
            "checkpoint_keys": self.keys,
            "methods": {method: summary.as_json() for method, summary in self.summaries.items()},
        }


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will need on every rank."""

    title: str
    stages: list[StagePlan]

    def __str__(self) -> str:
        lines = [self.title]
        for number, stage in enumerate(self.stages):
            if len(self.stages) > 1:
                ranks = f"ranks {stage.ranks[0]} to {stage.ranks[-1]}"
                lines += ["", f"pipeline stage {number + 1} of {len(self.stages)}, {ranks}"]
            lines += stage.lines()
        most = max(float(stage.total.max()) for stage in self.stages)
        lines.append(f"memory of the busiest rank: {readable(most, 'B')}, and activations")
        keys = sum(stage.keys for stage in self.stages)
        lines.append(f"tensors in a checkpoint: {keys:,}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {"title": self.title, "stages": [stage.as_json() for stage in self.stages]}


def plan_run(job_config: JobConfig, recipe: TrainSpec, world_size: int) -> RunPlan:
    """The plan of a run on ``world_size`` ranks.

    Args:
        job_config: Checked, also against ``world_size``.
        recipe: What is trained, and how it is sharded.
        world_size: Number of ranks; none of them need exist.
    """
    num_stages = job_config.parallelism.pipeline_parallel_degree
    plans = [
        in_own_process(_plan_stage, job_config, recipe, stage * (world_size // num_stages),
                       world_size)
        for stage in range(num_stages)
    ]  # fmt: skip
    name = f"{job_config.model.name} {job_config.model.flavor}"
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    title = f"{name}, {plans[0][0]:,} parameters, on {ranks}"
    return RunPlan(title, [stage for _, stage in plans])


class Shapes(NamedTuple):
    """One rank of a run, without the memory that it would have."""

    num_parameters: int
    """Of the whole model."""
    parts: list[nn.Module]
    optimizers: OptimizersContainer
    parallel_dims: ParallelDims

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and optimizer state by the names that a checkpoint has for them."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found |= {f"model.{key}": value for key, value in part.state_dict().items()}
        return found | {f"optim.{key}": v for key, v in self.optimizers.state_dict().items()}


@contextmanager
def shapes_of_rank(
    job_config: JobConfig, recipe: TrainSpec, rank: int, world_size: int
) -> Iterator[Shapes]:
    """The model and the optimizers of ``rank`` on the meta device; torch's ranks are fakes here.

    One use per process, as :func:`titan_shampoo.titan.own_process.in_own_process` explains.
    """
    with _fake_ranks(rank, world_size):
        parallel_dims = _parallel_dims(job_config, world_size)
        model, model_args = _whole_model(job_config, recipe, parallel_dims)
        num_parameters = sum(param.numel() for param in model.parameters())
        # Fused kernels refuse tensors without memory; the state is the same.
        config = copy.copy(job_config.optimizer)
        config.implementation = "foreach"
        whole = members(model) if parallel_dims.pp_enabled else None
        parts = _sharded(model, model_args, job_config, recipe, parallel_dims)
        optimizers = OptimizersContainer(parts, config, parallel_dims, whole)
        yield Shapes(num_parameters, parts, optimizers, parallel_dims)


def _plan_stage(
    job_config: JobConfig, recipe: TrainSpec, rank: int, world_size: int
) -> tuple[int, StagePlan]:
    """Number of parameters of the model, and the plan of the stage that ``rank`` belongs to."""
    with shapes_of_rank(job_config, recipe, rank, world_size) as shapes:
        return shapes.num_parameters, _stage_plan(shapes)


@contextmanager
def _fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """A process group of ``world_size`` ranks that sends nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _parallel_dims(job_config: JobConfig, world_size: int) -> ParallelDims:
    """As torchtitan's trainer makes them."""
    degrees = job_config.parallelism
    return ParallelDims(
        dp_shard=degrees.data_parallel_shard_degree,
        dp_replicate=degrees.data_parallel_replicate_degree,
        cp=degrees.context_parallel_degree,
        tp=degrees.tensor_parallel_degree,
        pp=degrees.pipeline_parallel_degree,
        ep=degrees.expert_parallel_degree,
        etp=degrees.expert_tensor_parallel_degree,
        world_size=world_size,
    )


def _whole_model(
    job_config: JobConfig, recipe: TrainSpec, parallel_dims: ParallelDims
) -> tuple[nn.Module, Any]:
    """The model before it is sharded, on the meta device, and what it was made from."""
    model_args = copy.deepcopy(recipe.model_args[job_config.model.flavor])
    model_args.update_from_config(job_config)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[job_config.training.dtype]):
        model = recipe.model_cls(model_args)
    build_model_converters(job_config, parallel_dims).convert(model)
    return model, model_args


def _sharded(
    model: nn.Module,
    model_args: Any,  # noqa: ANN401 (each recipe has its own)
    job_config: JobConfig,
    recipe: TrainSpec,
    parallel_dims: ParallelDims,
) -> list[nn.Module]:
    """This rank's parts of the model, by the functions that the trainer calls."""
    if not parallel_dims.pp_enabled:
        return [recipe.parallelize_fn(model, parallel_dims, job_config)]
    assert recipe.pipelining_fn is not None, "a recipe without stages was asked for some"
    loss = recipe.build_loss_fn(job_config, parallel_dims=parallel_dims)
    device = torch.device("cpu")
    _, parts, _, _ = recipe.pipelining_fn(
        model, parallel_dims, job_config, device, model_args, recipe.parallelize_fn, loss
    )
    return parts


def _stage_plan(shapes: Shapes) -> StagePlan:
    _, parts, optimizers, parallel_dims = shapes
    replicas = replica_group(parallel_dims)
    params = [param for part in parts for param in part.parameters()]
    trained = [param for param in params if param.requires_grad]
    buffers = [buffer for part in parts for buffer in part.buffers()]
    held = bytes_by_rank([(param, param) for param in params], replicas)
    ranks = sorted(held)

    def row(what: str, tensors: Sequence[tuple[Tensor, Tensor]]) -> Row:
        found = bytes_by_rank(tensors, replicas)
        return what, np.array([found[rank] for rank in ranks], np.float64), "B"

    rows = [
        row("parameters", [(param, param) for param in params]),
        row("gradients", [(param, param) for param in trained]),
    ]
    if buffers:
        size = sum(buffer.numel() * buffer.dtype.itemsize for buffer in buffers)
        rows.append(("buffers", np.full(len(ranks), float(size)), "B"))
    summaries: dict[str, Summary] = {}
    # Optimizers step one after the other and let go of their messages: the largest count.
    messages = np.zeros(len(ranks))
    for label, optimizer in _labelled(optimizers.optimizers).items():
        if isinstance(optimizer, (BlockOptimizer, KroneckerOptimizer)):
            summary = summaries[label] = optimizer.plan_summary()
            for what, figures, unit in summary.rows():
                here = _at(ranks, summary, figures)
                if what == MESSAGES:
                    messages = np.maximum(messages, here)
                else:
                    rows.append((f"{label}: {what}", here, unit))
        else:
            rows += [row(f"{label}: {key}", tensors) for key, tensors in _by_key(optimizer)]
    if messages.any():
        rows.append((MESSAGES, messages, "B"))
    memory = [figures for what, figures, unit in rows if unit == "B" and "sent in" not in what]
    total = sum(memory, np.zeros(len(ranks)))
    return StagePlan(ranks, rows, total, summaries, len(shapes.tensors()))


def _labelled(optimizers: Iterable[Optimizer]) -> dict[str, Optimizer]:
    """Optimizers by method, numbered where a rank has several: one per part of the model."""
    found: dict[str, Optimizer] = {}
    for optimizer in optimizers:
        method = type(optimizer).__name__
        names = (method, *(f"{method} {number}" for number in range(2, len(found) + 2)))
        found[next(name for name in names if name not in found)] = optimizer
    return found


def _at(ranks: Sequence[int], summary: Summary, figures: Figures) -> Figures:
    """Figures of some ranks as figures of all ``ranks``."""
    known = dict(zip(summary.ranks.tolist(), figures.tolist(), strict=True))
    return np.array([known.get(rank, 0.0) for rank in ranks])


def _by_key(optimizer: Optimizer) -> list[tuple[str, list[tuple[Tensor, Tensor]]]]:
    """State of one of torch's optimizers by its name, each tensor with its parameter."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for param, state in optimizer.state.items():
        for key, value in state.items():
            found.setdefault(key, []).append((value, param))
    return [(f"state: {key}", tensors) for key, tensors in found.items()]
