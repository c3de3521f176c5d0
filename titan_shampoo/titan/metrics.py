"""Reports of a run: a line per interval, a progress bar, TensorBoard, ``metrics.jsonl``.

Rates are over all ranks together, without the time of validation. There is no "model FLOPS
utilisation": torchtitan relates it to the peak of an A100 if it does not know the device.
"""

import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor, _get_metrics_rank
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import NoColor, device_type
from tqdm import tqdm

from titan_shampoo.config.errors import ConfigError
from titan_shampoo.plot import Record
from titan_shampoo.titan.layer_metrics import condition_numbers, extremes, scalars
from titan_shampoo.titan.records import RunRecords

_logger = logging.getLogger(__name__)


class Progress(MetricsProcessor):
    """Reports a run on the one rank that has the loss.

    Args:
        job_config: Configuration with intervals and folders.
        parallel_dims: Degrees, for the rank with the loss and the number of data readers.
        unit: Unit of the data: "tokens" or "images".
    """

    ntokens_since_last_log: int

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, *, unit: str) -> None:
        """Open the logs, on the reporting rank."""
        super().__init__(job_config, parallel_dims)
        if not sys.stdout.isatty():
            self.color = NoColor()
        self._unit = unit
        is_bytes = unit == "tokens" and not job_config.model.hf_assets_path
        self._loss_unit = " nats per byte" if is_bytes else ""
        self._num_steps = int(job_config.training.steps)
        self._num_readers = int(parallel_dims.dp_replicate * parallel_dims.dp_shard)
        self._reporter = _get_metrics_rank(parallel_dims, job_config)
        self._reports = dist.get_rank() == self._reporter
        self._folder = Path(job_config.job.dump_folder)
        self._is_dry = bool(job_config.job.dry_run)
        self._is_guest = _is_guest(job_config)
        writes = self._reports and not self._is_dry and not self._is_guest
        self._records = RunRecords(self._folder, enabled=writes)
        self._bar: tqdm[Any] | None = None
        self._batch_mesh = parallel_dims.get_optional_mesh("batch")
        self.count_skipped: Callable[[], int] = int
        self._first_step = 0
        self._last_logged = 0
        self._start = time.perf_counter()

    def begin(self, step: int) -> None:
        """Count from ``step``, the last one done; called after the checkpoint is loaded.

        Raises:
            ConfigError: On every rank, if another run writes its records into the same folder.
        """
        self._first_step = step
        self._start = self.time_last_log = time.perf_counter()
        self._last_logged = step
        self.optimizers.take_step_seconds()
        self._resume_records(step)
        if not self._reports:
            return
        if sys.stderr.isatty() and not self._is_dry:
            self._bar = tqdm(total=self._num_steps, initial=step, unit="step", dynamic_ncols=True)
        if step >= self._num_steps:
            self.say(f"all {self._num_steps} steps are done; raise training.steps to go on")
        elif step:
            self.say(f"resumed after step {step} of {self._num_steps}")
        else:
            self.say("a dry run: one step" if self._is_dry else f"training {self._num_steps} steps")

    def _resume_records(self, step: int) -> None:
        problem: list[str | None] = [None]
        if self._reports:
            try:
                self._records.resume(step)
            except ConfigError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=self._reporter)
        if problem[0] is not None:
            raise ConfigError(problem[0])
        if self._is_guest:
            self.say(
                f"checkpoint.load_only: metrics and loss plot in {self._folder} are left to the "
                "run that saves there; for others, set job.dump_folder, and checkpoint.folder to "
                "the whole path of the checkpoints"
            )

    def close(self) -> None:
        """Write the rest, as far as possible, and release the folder for other runs."""
        with self._records.complaining():
            super().close()
        self._records.close()

    def advance(self) -> None:
        """Count a finished step."""
        if self._bar is not None:
            self._bar.update()

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Report the interval that ends with ``step``.

        Args:
            step: Counted from 1.
            global_avg_loss: Mean over all labels of the step, before the update.
            global_max_loss: Largest mean of any rank; not reported.
            grad_norm: Norm of the gradient of the mean loss, before clipping.
            extra_metrics: ``lr`` and ``n_tokens_seen``.
        """
        seconds = time.perf_counter() - self.time_last_log
        record: Record = {
            "step": step,
            "loss": global_avg_loss,
            "grad_norm": grad_norm,
            "lr": (extra_metrics or {})["lr"],
            f"{self._unit}_per_second": self.ntokens_since_last_log * self._num_readers / seconds,
            f"{self._unit}_seen": int((extra_metrics or {})["n_tokens_seen"]),
            "optimizer_share": self.optimizers.take_step_seconds() / seconds,
            "data_share": sum(self.data_loading_times) / seconds,
            "seconds_per_step": seconds / max(step - self._last_logged, 1),
            "memory_gib": self.device_memory_monitor.get_peak_stats().max_reserved_gib,
            **self.optimizers.failures(),
            "skipped_samples": self._all_skipped(),
        }
        layers = self.optimizers.layer_metrics()
        record |= extremes(layers) | condition_numbers(self.optimizers.conditions())
        if layers and self.job_config.metrics.layers:
            record["layers"] = layers
        self._write(record)
        self.say(self._line(record))
        self._last_logged = step
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()
        self.time_last_log = time.perf_counter()

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        """Report a validation.

        Args:
            loss: Mean over all validation labels.
            step: The last step done.
            extra_metrics: ``accuracy`` and ``top5`` (0 to 1) or ``perplexity``; ``seconds``, the
                time it took; ``of_average`` for averaged weights.
        """
        extra = dict(extra_metrics or {})
        self.time_last_log += extra.pop("seconds", 0.0)
        of_average = bool(extra.pop("of_average", False))
        name = "average_validation" if of_average else "validation"
        record = {"step": step, f"{name}_loss": loss}
        record |= {f"{name}_{key}": value for key, value in extra.items()}
        self._write(record)
        shown = [
            f"{label} {extra[key]:{form}}"
            for key, label, form in (
                ("accuracy", "accuracy", ".2%"),
                ("top5", "top-5", ".2%"),
                ("perplexity", "perplexity", ".4g"),
            )
            if key in extra
        ]
        self.say(
            f"{self._step(step)}  {self.color.yellow}{name.replace('_', ' ')} loss {loss:.4f}"
            f"{self._loss_unit}{self.color.reset}  {'  '.join(shown)}"
        )

    def finish(self, checkpoints: Path | None) -> None:
        """Draw the loss, and print the folders of all files.

        Args:
            checkpoints: Folder of the checkpoints, if the run saves any.
        """
        self.close_bar()
        if not self._reports or self._is_dry:
            return
        own = self._records.enabled
        self._records.draw_loss(self.job_config.job.description)
        config = self.job_config.metrics
        places = {
            "checkpoints": checkpoints,
            "TensorBoard": config.enable_tensorboard and self._folder / config.save_tb_folder,
            "metrics": own and self._records.file,
            "loss plot": own and self._records.plot,
        }
        minutes = timedelta(seconds=round(time.perf_counter() - self._start))
        self.say(f"done after {minutes}")
        for name, place in places.items():
            if place:
                self.say(f"  {name:<12} {place}")

    def close_bar(self) -> None:
        """Close the bar, so that other output can follow."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, line: str) -> None:
        """Print one line, on the reporting rank."""
        if not self._reports:
            return
        if self._bar is None:
            _logger.info(line)
        else:
            with tqdm.external_write_mode():  # moves the bar below the line
                _logger.info(line)

    def _all_skipped(self) -> int:
        """Samples that could not be read, on all ranks together; every rank must call it."""
        count = torch.tensor(self.count_skipped(), device=device_type)
        if self._batch_mesh is not None:
            dist.all_reduce(count, group=self._batch_mesh.get_group())
        return int(count)

    def _write(self, record: Record) -> None:
        numbers = {key: value for key, value in record.items() if key != "step"}
        with self._records.complaining():
            self.logger.log(scalars(numbers), record["step"])
        if self._reports:
            self._records.append(record)

    def _line(self, record: Record) -> str:
        color, step = self.color, record["step"]
        rate = record[f"{self._unit}_per_second"]
        return "  ".join(
            (
                self._step(step),
                f"{color.green}loss {record['loss']:.4f}{color.reset}",
                f"grad norm {record['grad_norm']:.4f}",
                f"lr {record['lr']:.2e}",
                f"{color.blue}{rate:,.0f} {self._unit}/s{color.reset}",
                f"optimizer {record['optimizer_share']:.0%}",
                *(
                    f"{color.red}{record[key]} {key.replace('_', ' ')}{color.reset}"
                    for key in ("skipped_steps", "failed_refreshes", "skipped_samples")
                    if record[key]
                ),
                f"{self._time_left(step)} left",
            )
        )

    def _step(self, step: int) -> str:
        width = len(str(self._num_steps))
        return f"{self.color.red}step {step:>{width}}/{self._num_steps}{self.color.reset}"

    def _time_left(self, step: int) -> timedelta:
        per_step = (time.perf_counter() - self._start) / max(step - self._first_step, 1)
        return timedelta(seconds=round(per_step * (self._num_steps - step)))


def _is_guest(job_config: JobConfig) -> bool:
    """Return whether the run only reads checkpoints of another run in the same dump folder."""
    checkpoint, folder = job_config.checkpoint, Path(job_config.job.dump_folder).resolve()
    reads_only = checkpoint.enable and checkpoint.load_only
    return reads_only and (folder / checkpoint.folder).resolve().is_relative_to(folder)
