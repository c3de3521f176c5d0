"""torchtitan's trainer, with the gradient of the mean loss on every mesh.

torchtitan 0.2.2 divides the summed loss by the global number of labels and expects gradients to be
*summed* over the ranks. Two layouts break that silently. Pure DDP averages, so gradients are too
small by the number of replicas. A pipeline differentiates the undivided sum, so they are too large
by the number of labels. AdamW with clipping hides both; damped methods fail.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torchtitan.train
from torch import Tensor, nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import maybe_enable_amp
from torchtitan.protocols import train_spec
from torchtitan.protocols.train_spec import LossFunction, TrainSpec
from torchtitan.tools.utils import device_type

from titan_shampoo.config.errors import ConfigError, nearest
from titan_shampoo.data.mixup import MixedLabels
from titan_shampoo.stopping import ignore
from titan_shampoo.titan.environment import (
    check_context_parallel,
    check_device,
    check_environment,
    rendezvous_explained,
)
from titan_shampoo.titan.metrics import Progress
from titan_shampoo.titan.names import check_names
from titan_shampoo.titan.optimizers import Members, members
from titan_shampoo.titan.replaced import replaced
from titan_shampoo.titan.restarts import init_process_group
from titan_shampoo.titan.seed import set_determinism
from titan_shampoo.titan.summary import summary_lines

Batch = tuple[dict[str, Tensor], Tensor]


class Trainer(torchtitan.train.Trainer):
    """Trains a recipe with torchtitan's loop and this project's scaling of gradients.

    Args:
        job_config: Checked configuration; ``model.name`` names the recipe.
        recipe: Model, data, loss and sharding.
        checkpoint_manager: Makes the object that saves and resumes the run, from torchtitan's
            arguments and ``job_config``.

    Raises:
        ConfigError: If the recipe has no flavour of the wanted name.
    """

    metrics_processor: Progress

    def __init__(
        self,
        job_config: JobConfig,
        recipe: TrainSpec,
        checkpoint_manager: Callable[..., Any],
    ) -> None:
        """Build everything that the run needs."""
        flavor = job_config.model.flavor
        if flavor not in recipe.model_args:
            raise ConfigError(
                f'model.flavor = "{flavor}": {job_config.model.name} has no such flavour, only '
                f"{', '.join(recipe.model_args)}{nearest(flavor, recipe.model_args)}"
            )
        if job_config.job.dry_run:
            write_nothing(job_config)
        check_device()
        check_context_parallel(job_config.parallelism.context_parallel_degree)
        check_names(job_config)
        if device_type != "cuda":
            job_config.comm.trace_buf_size = 0  # for nccl only, but its folder would be created
        self._pipeline_loss: DividedLoss | None = None
        self._whole_model: Members | None = None
        _register(job_config.model.name, self._adapted(recipe))
        manager = partial(checkpoint_manager, job_config=job_config)
        with (
            replaced(torchtitan.train, "CheckpointManager", manager),
            replaced(torchtitan.train.dist_utils, "maybe_enable_amp", _autocast),
            replaced(torchtitan.train.dist_utils, "set_determinism", set_determinism),
        ):
            super().__init__(job_config)

        self.metrics_processor.count_skipped = lambda: self.dataloader.skipped.count
        self._introduce()

    def init_distributed(self) -> ParallelDims:
        """Connect to the other ranks, and check that all fit together."""
        with (
            rendezvous_explained(self.job_config.comm.init_timeout_seconds),
            # Separate from the keys of an earlier attempt of torchrun.
            replaced(dist, "init_process_group", init_process_group),
        ):
            dims = super().init_distributed()
        check_environment(self.job_config)
        return dims

    def _introduce(self) -> None:
        """Print a summary of the run."""
        lines = summary_lines(
            self.job_config,
            self.parallel_dims,
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            num_samples=self.dataloader.num_samples,
            unit="images" if self.job_config.model.name == "resnet" else "windows",
        )
        for line in lines:
            self.metrics_processor.say(line)

    def _adapted(self, recipe: TrainSpec) -> TrainSpec:
        """Adapt the recipe: a loss that a pipeline can divide, and a validator with our batches."""
        validator = recipe.build_validator_fn
        if validator is not None:
            validator = partial(validator, prepare=self.post_dataloading_process)
        pipelining, build_optimizers = recipe.pipelining_fn, recipe.build_optimizers_fn
        return replace(
            recipe,
            pipelining_fn=pipelining and partial(self._pipeline, pipelining),
            build_optimizers_fn=partial(self._build_optimizers, build_optimizers),
            build_validator_fn=validator,
        )

    def _pipeline(self, pipelining: Any, model: nn.Module, *args: Any) -> Any:  # noqa: ANN401 (torchtitan's)
        self._whole_model = members(model)  # before it moves from the meta device
        *others, loss_fn = args
        self._pipeline_loss = DividedLoss(loss_fn)
        try:
            return pipelining(model, *others, self._pipeline_loss)
        except ValueError as error:
            degree = self.job_config.parallelism.pipeline_parallel_degree
            raise ConfigError(
                f"parallelism.pipeline_parallel_degree = {degree}: {_first_line(error)}"
            ) from error

    def _build_optimizers(self, build: Any, *args: Any) -> Any:  # noqa: ANN401 (torchtitan's)
        """Pass the parameters of all stages to the optimizers of a pipeline stage."""
        return build(*args, self._whole_model)

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor | float
    ) -> Tensor:
        """Return this rank's part of the mean loss; its gradients add up over the ranks.

        Args:
            input_dict: ``input``, of shape ``(batch, ...)``, on this rank.
            labels: ``(batch, ...)``; -100 is ignored.
            global_valid_tokens: Number of labels in the global batch, over all microbatches.
        """
        step = partial(super().forward_backward_step, input_dict=input_dict, labels=labels)
        if self._pipeline_loss is not None:
            # The schedule differentiates the result of the loss, so the loss itself must divide.
            with self._pipeline_loss.divided_by(global_valid_tokens):
                return step(global_valid_tokens=1.0)
        num_replicas = self._num_averaged_replicas()
        return step(global_valid_tokens=global_valid_tokens / num_replicas) / num_replicas

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor | MixedLabels, dict[str, Tensor], dict[str, Any]]:
        """Return the model's input, the loss's labels, and further arguments of the model."""
        weight = input_dict.pop("label_weight", None)
        inputs, labels, *others = super().post_dataloading_process(input_dict, labels)
        return inputs, labels if weight is None else MixedLabels(labels, weight), *others

    def train_step(self, data_iterator: Iterable[Batch]) -> None:
        """Take one step, and update the average of the weights if the run keeps one."""
        super().train_step(data_iterator)
        if self.optimizers.average is not None:
            self.optimizers.average.update(self.step)
        self.metrics_processor.advance()

    def should_continue_training(self) -> bool:
        """Return whether a step is left and no stop was requested; a dry run takes one step."""
        if self.job_config.job.dry_run:
            return self.step < 1
        return super().should_continue_training() and not self.checkpointer.stopped

    def _num_averaged_replicas(self) -> int:
        """Number of ranks over which gradients are averaged instead of summed: DDP's replicas."""
        dims = self.parallel_dims
        return 1 if dims.fsdp_enabled else int(dims.dp_replicate)

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """Return the batches; torchtitan calls it once, right after the checkpoint is loaded."""
        self.metrics_processor.begin(self.step)
        return super().batch_generator(data_iterable)

    def train(self) -> None:
        """Train to the last step or to a requested stop, and print where the files are."""
        # torchtitan's rank 0 sleeps two seconds "for other ranks"; close() waits for them.
        awake = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)
        with replaced(torchtitan.train, "time", awake):
            super().train()
        if self.checkpointer.stopped:
            self.metrics_processor.close_bar()  # the run was asked to stop: skip the report
            return
        self.metrics_processor.finish(
            Path(self.checkpointer.folder) if self.checkpointer.enable else None
        )

    def run(self) -> None:
        """Train, finish all writing, and leave the process group together with all other ranks."""
        try:
            self.train()
            ignore()  # training is over: a request to stop has nothing left to stop
        finally:
            self.close()
        # Without a barrier some ranks close gloo while others still use it, and those abort.
        dist.barrier()
        dist.destroy_process_group()

    def state_dict(self) -> dict[str, Any]:
        """Return step and number of labels seen by all ranks together, valid on any mesh."""
        return {"step": self.step, "num_labels_seen": self.ntokens_seen * self._batch_degree()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the step of ``state_dict``."""
        self.step = state_dict["step"]
        self.ntokens_seen = state_dict["num_labels_seen"] // self._batch_degree()

    def _batch_degree(self) -> int:
        return int(self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard)


class DividedLoss:
    """A summed loss divided by a number that changes between steps; by 1 outside of steps."""

    def __init__(self, summed: LossFunction) -> None:
        """Divide ``summed`` by 1."""
        self._summed = summed
        self._divisor: Tensor | float = 1.0

    def __call__(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one microbatch."""
        return self._summed(prediction, labels) / self._divisor

    @contextmanager
    def divided_by(self, divisor: Tensor | float) -> Iterator[None]:
        """Divide by ``divisor`` inside this block."""
        self._divisor = divisor
        try:
            yield
        finally:
            self._divisor = 1.0


def _autocast(dims: ParallelDims, precision: str, device: str) -> AbstractContextManager[Any]:
    """Mixed precision without FSDP2; for float32 a null context, as torch's autocast would warn."""
    return nullcontext() if precision == "float32" else maybe_enable_amp(dims, precision, device)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_nothing(job_config: JobConfig) -> None:
    """Switch off every setting in ``job_config`` that writes files or records."""
    job_config.checkpoint.enable = False
    job_config.metrics.enable_tensorboard = False
    job_config.metrics.enable_wandb = False
    job_config.profiling.enable_profiling = False
    job_config.profiling.enable_memory_snapshot = False
    job_config.job.save_config_file = None
    job_config.comm.trace_buf_size = 0  # otherwise a folder for the traces is created


def _register(name: str, recipe: TrainSpec) -> None:
    """Register ``recipe`` with torchtitan under ``name``, in place of its own."""
    train_spec._extra_train_specs.pop(name, None)
    train_spec.register_train_spec(name, recipe)
