"""When a run saves, when it stops, and what it resumes from.

Takes the place of torchtitan's manager in its trainer: ``load`` before the first step, ``save``
after each, ``close`` at the end. How a checkpoint is written stands in ``saving``, which one is
used in ``finding``, what the state of a run is in ``state``.
"""

import logging
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import rng
from checkpoint.errors import CheckpointError
from checkpoint.finding import find_newest, find_step
from checkpoint.folders import step_folder, steps_in, sweep
from checkpoint.hugging_face import export_weights
from checkpoint.loading import Loading
from checkpoint.lock import FolderLock
from checkpoint.ranks import from_rank_0, gathered, say
from checkpoint.reader import model_weights
from checkpoint.record import describe_run, flattened
from checkpoint.retention import Retention
from checkpoint.saving import BackgroundSave, write
from checkpoint.settings import check_settings
from checkpoint.signals import StopRequest
from checkpoint.state import MODEL, RunState, in_dtype
from checkpoint.verify import read_manifest

_logger = logging.getLogger(__name__)

_TIMEOUT = timedelta(hours=2)
"""For collectives about checkpoints: a slow disk is no reason to end a run, a dead rank is noticed
by its closed connection."""


class CheckpointManager:
    """Saves every ``checkpoint.interval`` steps, after the last, and when asked to stop.

    Attributes:
        enable: Whether anything is saved or loaded.
        folder: Where checkpoints lie.
        stopped: Whether a signal has ended the run; true after the step that was saved then. Before
            the first step, and in a run that saves nothing, a signal ends the process.
    """

    def __init__(
        self,
        dataloader: Any,  # noqa: ANN401 (anything with a state)
        model_parts: list[nn.Module],
        optimizers: Any,  # noqa: ANN401
        lr_schedulers: Any,  # noqa: ANN401
        states: dict[str, Any],
        checkpoint_config: Any,  # noqa: ANN401 (merged dataclass)
        sd_adapter: Any = None,  # noqa: ANN401 (torchtitan's)
        base_folder: str = "",
        ft_manager: object = None,  # torchtitan's replicas, which the configuration refuses
        job_config: object = None,
    ) -> None:
        """Take what torchtitan's manager takes, and the settings of the run.

        Raises:
            CheckpointError: If settings do not fit the hardware or each other.
        """
        self._config = config = checkpoint_config
        self.enable: bool = config.enable
        self.load_only: bool = config.load_only
        self.folder = str(Path(base_folder) / config.folder)
        self.stopped = self._is_open = False
        if not self.enable:
            return
        self._state = RunState(
            model_parts,
            optimizers,
            {"lr_scheduler": lr_schedulers, "dataloader": dataloader, **states},
        )
        self._settings = {} if job_config is None else flattened(job_config)
        self._adapter = sd_adapter
        check_settings(config, self._state.components)
        self._votes = _new_group()
        # What a thread does together with other ranks' threads needs a group of its own.
        in_background = config.async_mode != "disabled"
        self._group = _new_group() if in_background else self._votes
        self._loading = Loading(
            self._state,
            self._settings,
            self._votes,
            reblocks=config.reblock == "approximate",
            data_position=config.data_position,
        )
        self._background = BackgroundSave(
            self._group, pinned=config.async_mode == "async_with_pinned_mem"
        )
        self._tidying = ThreadPoolExecutor(1, thread_name_prefix="retention")
        self._retention = Retention(Path(self.folder), config.keep_latest_k)
        self._stop: StopRequest | None = None
        self._lock: FolderLock | None = None
        self._run = from_rank_0(lambda: uuid.uuid4().hex[:12], self._votes, self.folder)
        self._geometry: dict[str, Any] | None = None
        self._begun: dict[str, Any] | None = None
        self._saved_step = -1
        self._pending_step = -1
        self._is_retry = False
        self._is_open = True

    # ---- loading

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Load a checkpoint in place and return whether there was one.

        Args:
            step: The last step done in it; -1 means the newest that is good.

        Raises:
            CheckpointError: On every rank, before anything is changed, if there is none of that
                step, or it is not good or not this run's.
        """
        if not self.enable:
            return False
        found = self._load(step)
        self._begun = self._state.values()
        return found

    def _load(self, step: int) -> bool:
        folder, writes = Path(self.folder), not self.load_only
        if writes:
            from_rank_0(self._take_folder, self._votes, folder)
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            step = -1  # The first attempt has gone on from there.
        if step == -1:
            found = find_newest(
                folder, self._votes, fallback=self._config.fallback, changes_names=writes
            )
        else:
            found = find_step(folder, step, self._votes, changes_names=writes)
        if found is None:
            return self._loading.load_initial(self._config, self._adapter)
        if found.manifest.record.get("kind") == MODEL:
            raise CheckpointError(
                f"{found.folder}: holds the model only and cannot be resumed; to begin from it "
                "set checkpoint.initial_load_path, and another checkpoint.folder"
            )
        self._run = found.manifest.record.get("run", self._run)
        excluded = set(self._config.exclude_from_loading)
        self._loading.load(found, set(self._state.components) - excluded)
        self._saved_step = found.manifest.step
        self._retention.trust(found.manifest.step)
        return True

    def _take_folder(self) -> None:
        """Make sure, on rank 0, that no other run writes here, and clean up after dead ones."""
        if self._lock is None:
            self._lock = FolderLock(Path(self.folder))
        sweep(Path(self.folder))

    def _keep_folder(self) -> bool:
        """Return, on rank 0, whether the folder had been deleted and is now another one.

        Raises:
            CheckpointError: If it is another run's, or may be.
        """
        folder = Path(self.folder)
        if self._lock is None:  # nothing was loaded
            self._lock = FolderLock(folder)
        if self._lock.is_held():
            return False
        self._lock.release()
        self._lock = FolderLock(folder)
        steps = steps_in(folder)
        if steps:
            self._lock.release()
            raise CheckpointError(
                f"{folder}: its .lock was removed while this run trained, and step-{steps[-1]} may "
                "be another run's: this one has ended without saving more; start it again"
            )
        _logger.warning(
            "%s: was deleted while this run trained, with all checkpoints in it; made anew", folder
        )
        return True

    def _is_ours(self) -> bool:
        return self._lock is not None and self._lock.is_held()

    # ---- saving

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        """See to everything that is due after a step, on all ranks together.

        Args:
            curr_step: The step that was done.
            last_step: Whether it is the run's last.

        Raises:
            CheckpointError: On every rank, if the last state of a run could not be saved, or
                another run may have taken the folder. Other failures are said, retried once, and
                training goes on.
        """
        if not self.enable or self.load_only:
            return
        self._listen()
        stops, ended = self._agree()
        failed = ended and not self._finish_background(curr_step)
        if not (stops or last_step or failed or self._is_due(curr_step)):
            return
        if from_rank_0(self._keep_folder, self._votes, self.folder):
            self._saved_step = -1
        if stops and not last_step:
            self._save_and_stop(curr_step)
        elif last_step:
            self._save_last(curr_step)
        else:
            self._save_on_the_way(curr_step, is_retry=failed)

    def _listen(self) -> None:
        """Take over the signals, once there is something to save, or about to be.

        All ranks must have, before any of them can be done with the first step.
        """
        if self.enable and not self.load_only and self._stop is None:
            self._stop = StopRequest()

    def _is_due(self, step: int) -> bool:
        config = self._config
        return step % config.interval == 0 or (step == 1 and config.enable_first_step_checkpoint)

    def _agree(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any rank's background save ended."""
        asked = self._stop is not None and self._stop.received is not None
        mine = [asked, self._background.is_done]
        votes = torch.tensor(mine, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._votes)
        stops, ended = votes.tolist()
        return bool(stops), bool(ended)

    def _finish_background(self, step: int) -> bool:
        """Wait for the background save and return whether to be content with it."""
        if not self._background.is_running:
            return True
        try:
            self._background.finish()
        except CheckpointError as error:
            again = "" if self._is_retry else ", and is repeated now"
            say(
                _logger, logging.WARNING, "%s; training goes on after step %d%s", error, step, again
            )
            return self._is_retry
        self._complete(self._pending_step)
        return True

    def _save_on_the_way(self, step: int, *, is_retry: bool) -> None:
        self._finish_background(step)
        place = step_folder(Path(self.folder), step)
        if self._config.async_mode != "disabled":
            self._is_retry, self._pending_step = is_retry, step
            self._background.start(place, self._full_state(), self._record(step), self._is_ours)
            return
        try:
            self._write_with_retry(step)
        except CheckpointError as error:
            say(_logger, logging.WARNING, "%s; training goes on after step %d", error, step)

    def _save_and_stop(self, step: int) -> None:
        self._finish_background(step)
        if self._saved_step != step:
            self._write_with_retry(step)
        self.stopped = True
        say(
            _logger,
            logging.INFO,
            "asked to stop: saved after step %d; the same command line goes on from there",
            step,
        )

    def _save_last(self, step: int) -> None:
        self._finish_background(step)
        if self._saved_step == step:
            return
        if not self._config.last_save_model_only:
            self._write_with_retry(step)
            return
        dtype = getattr(torch, self._config.export_dtype)
        model = self._state.tensors({MODEL})
        if dtype != torch.float32:
            model = in_dtype(model, dtype)
        self._write_with_retry(step, model)
        if self._config.last_save_in_hf:
            from_rank_0(partial(self._export, step), self._votes, self.folder)

    def _export(self, step: int) -> None:
        place = step_folder(Path(self.folder), step)
        out = place.with_name(f"hf-{place.name}")
        export_weights(model_weights(place, read_manifest(place)), out, self._adapter)
        _logger.info("exported %s", out)

    def _write_with_retry(self, step: int, model: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint now; once more if that fails.

        Raises:
            CheckpointError: If both attempts failed.
        """
        place = step_folder(Path(self.folder), step)
        tensors = self._full_state() if model is None else model
        record = self._record(step, is_model_only=model is not None)
        try:
            write(place, tensors, record, self._group, self._is_ours)
        except CheckpointError as error:
            say(_logger, logging.WARNING, "%s; once more", error)
            write(place, tensors, record, self._group, self._is_ours)
        self._complete(step)

    def _complete(self, step: int) -> None:
        """What follows a checkpoint that is complete."""
        self._saved_step = step
        if dist.get_rank() == 0:
            self._retention.trust(step)
            self._tidying.submit(_logged, self._tidy)

    def _tidy(self) -> None:
        if self._is_ours():
            self._retention.apply()

    def _full_state(self) -> dict[str, Tensor]:
        rows = rng.rng_rows(dist.get_rank(), dist.get_world_size())
        return self._state.tensors(self._state.components) | rows

    def _record(self, step: int, *, is_model_only: bool = False) -> dict[str, Any]:
        """What the manifest says beside files and tensors; the same on all ranks."""
        if self._geometry is None:
            parts = gathered(self._state.geometry(), self._votes)
            self._geometry = {name: one for part in parts for name, one in part.items()}
        record = describe_run(step, self._run, MODEL if is_model_only else "full")
        record["world"]["mesh"] = self._state.mesh()
        if not is_model_only:
            record |= {"values": self._state.values(), "geometry": self._geometry}
            record |= {} if self._begun is None else {"begun": self._begun}
            record["num_samples"] = self._state.num_samples
        return record | {"settings": self._settings}

    # ---- the rest

    def maybe_wait_for_staging(self) -> None:
        """Wait for nothing: whatever changes the state is enqueued behind the copies.

        Called between the backward pass and the optimizers: what takes minutes in a first step, and
        can be given up, is done.
        """
        self._listen()

    def close(self) -> None:
        """Wait for what is being written, and let other runs have the folder."""
        if not self._is_open:
            return
        self._is_open = False
        self._finish_background(self._pending_step)
        self._background.close()
        self._tidying.shutdown()
        if self._stop is not None:
            self._stop.release()
        if self._lock is not None:
            self._lock.release()


def _new_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _logged(do: Callable[[], None]) -> None:
    """Run what no run should end for, in a thread whose errors nobody sees."""
    try:
        do()
    except Exception as error:
        _logger.warning("old checkpoints are not deleted: %s: %s", type(error).__name__, error)
