"""Loss, and perplexity or accuracy, over a whole validation set.

The mean is over all labels of all ranks: sums are added up first and divided once. It therefore
does not depend on batch size, padding or the number of ranks.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, LossFunction
from torchtitan.components.validate import BaseValidator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from titan_shampoo.titan.metrics import Progress

Batch = tuple[dict[str, Tensor], Tensor]
Prepare = Callable[
    [dict[str, Tensor], Tensor], tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]
]

_LARGEST_EXPONENT = 700.0


class Validator(BaseValidator):
    """Validates a model on every batch of a loader.

    Args:
        loader: One pass over the data, with equally many batches on every rank.
        job_config: Configuration with the interval.
        parallel_dims: Degrees, for the ranks over which sums are added up.
        loss_fn: Sum over the labels of a batch.
        validation_context: The trainer's context for loss parallel.
        maybe_enable_amp: The trainer's context for autocast.
        metrics_processor: Receives the result.
        prepare: The trainer's ``post_dataloading_process``.
        reports: Metric beside the loss. With "accuracy", predictions are ``(batch, classes)``, and
            right answers are counted, as the first and among the first five.
        pp_schedule: Schedule of a pipeline; None without one.
        pp_has_first_stage: True if this rank takes the inputs.
        pp_has_last_stage: True if this rank has the loss.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        *,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        loss_fn: LossFunction,
        validation_context: Callable[[], AbstractContextManager[None]],
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: Progress,
        prepare: Prepare,
        reports: Literal["accuracy", "perplexity"],
        pp_schedule: _PipelineSchedule | None = None,
        pp_has_first_stage: bool | None = None,
        pp_has_last_stage: bool | None = None,
    ) -> None:
        """Keep all arguments."""
        super().__init__(job_config)
        self._loader = loader
        self._loss_mesh = parallel_dims.get_optional_mesh("loss")
        self._loss_fn = loss_fn
        self._context = validation_context
        self._autocast = maybe_enable_amp
        self._metrics = metrics_processor
        self._prepare = prepare
        self._reports = reports
        self._schedule = pp_schedule
        self._is_first = bool(pp_has_first_stage)
        self._is_last = pp_schedule is None or bool(pp_has_last_stage)

    def should_validate(self, step: int) -> bool:
        """Return whether ``step`` is the first, the last, or one of every ``validation.freq``."""
        return step == self.job_config.training.steps or super().should_validate(step)

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Report the mean loss over the whole loader."""
        self._report(model_parts, step, of_average=False)
        average = self._metrics.optimizers.average
        if average is not None:
            with average.in_use():
                self._report(model_parts, step, of_average=True)

    def _report(self, model_parts: list[nn.Module], step: int, *, of_average: bool) -> None:
        start = time.perf_counter()
        for model in model_parts:
            model.eval()
        sums = torch.zeros(4, dtype=torch.float64)  # loss, labels, right answers, top five
        for inputs, labels in self._loader:
            sums += self._evaluate(model_parts, inputs, labels)
        for model in model_parts:
            model.train()
        sums = sums.to(device_type)
        if self._loss_mesh is not None:
            dist.all_reduce(sums, group=self._loss_mesh.get_group())
        loss, num_labels, num_right, num_nearly = sums.tolist()
        loss /= num_labels
        extra = {"seconds": time.perf_counter() - start}
        if self._reports == "accuracy":
            extra |= {"accuracy": num_right / num_labels, "top5": num_nearly / num_labels}
        else:
            extra["perplexity"] = math.exp(min(loss, _LARGEST_EXPONENT))
        self._metrics.log_validation(
            loss=loss, step=step, extra_metrics=extra | {"of_average": of_average}
        )

    def _evaluate(
        self, model_parts: list[nn.Module], input_dict: dict[str, Tensor], labels: Tensor
    ) -> Tensor:
        """Return loss, labels, right answers and top five of this rank's batch, ``(4,)``."""
        input_dict = {key: value.to(device_type) for key, value in input_dict.items()}
        inputs, labels, extra_inputs, extra_kwargs = self._prepare(
            input_dict, labels.to(device_type)
        )
        num_right = num_nearly = torch.tensor(0)
        with self._context():
            if self._schedule is not None:
                loss = self._pipeline_loss(inputs, labels, extra_inputs, extra_kwargs)
            else:
                with self._autocast:
                    prediction = model_parts[0](inputs, **extra_inputs, **extra_kwargs)
                    loss = self._loss_fn(prediction, labels)
                if self._reports == "accuracy":
                    best = prediction.topk(min(5, prediction.shape[-1]), dim=-1).indices
                    is_right = best == labels.unsqueeze(-1)
                    num_right, num_nearly = is_right[:, 0].sum(), is_right.sum()
        if isinstance(loss, DTensor):  # loss parallel
            loss = loss.full_tensor()
        num_labels = (labels != IGNORE_INDEX).sum()
        values = (loss, num_labels, num_right, num_nearly)
        return torch.stack([value.double().cpu() for value in values])

    def _pipeline_loss(
        self,
        inputs: Tensor,
        labels: Tensor,
        extra_inputs: dict[str, Tensor],
        extra_kwargs: dict[str, Any],
    ) -> Tensor:
        """Return the batch's loss on the last stage, and zero on the others."""
        assert self._schedule is not None
        losses: list[Tensor] = []
        self._schedule.eval(
            *((inputs,) if self._is_first else ()),
            **(extra_inputs if self._is_first else {}),
            **extra_kwargs,
            target=labels if self._is_last else None,
            losses=losses if self._is_last else None,
        )
        return torch.stack(losses).sum() if self._is_last else torch.tensor(0.0)
