"""Checkpoints during a run: when to save, when to stop, and where to resume.

Replaces torchtitan's manager in its trainer: ``load`` before the first step, ``save`` after each,
``close`` at the end. ``saving`` writes a checkpoint, ``finding`` chooses one, ``state`` names the
state of a run.
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
"""Timeout of collectives about checkpoints: a slow disk must not end a run, and a dead rank is
noticed by its closed connection."""


class CheckpointManager:
    """Saves every ``checkpoint.interval`` steps, after the last step, and when asked to stop.

    Attributes:
        enable: True if anything is saved or loaded.
        folder: Folder of the checkpoints.
        stopped: True after a signal has ended the run and its last step is saved. Before the first
            step, and in a run that saves nothing, a signal ends the process.
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
        """Take the arguments of torchtitan's manager, and the settings of the run.

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
        # A thread's collectives with other ranks' threads need their own process group.
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
        """Load a checkpoint in place; return True if there was one.

        Args:
            step: Last step done in it; -1 for the newest good one.

        Raises:
            CheckpointError: On every rank, before anything changes, if there is none of that step,
                or if it is damaged or does not fit this run.
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
            step = -1  # The first attempt has saved later steps since.
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
        """Lock the folder against other runs, on rank 0, and clean up after dead ones."""
        if self._lock is None:
            self._lock = FolderLock(Path(self.folder))
        sweep(Path(self.folder))

    def _keep_folder(self) -> bool:
        """Return, on rank 0, whether the folder was deleted and has been created again.

        Raises:
            CheckpointError: If the new one belongs to another run, or may do so.
        """
        folder = Path(self.folder)
        if self._lock is None:  # load() has not run
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
            "%s: was deleted while this run trained, with all checkpoints in it; created again",
            folder,
        )
        return True

    def _is_ours(self) -> bool:
        return self._lock is not None and self._lock.is_held()

    # ---- saving

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Do everything that is due after a step, on all ranks together.

        Args:
            curr_step: The step that was done.
            last_step: True for the last step of the run.

        Raises:
            CheckpointError: On every rank, if the last state of a run could not be saved, or
                another run may have taken the folder. Other failures are logged, retried once, and
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
        """Handle signals from now on, because there will be something to save.

        All ranks must do so before any of them can finish the first step.
        """
        if self.enable and not self.load_only and self._stop is None:
            self._stop = StopRequest()

    def _is_due(self, step: int) -> bool:
        config = self._config
        return step % config.interval == 0 or (step == 1 and config.enable_first_step_checkpoint)

    def _agree(self) -> tuple[bool, bool]:
        """True if any rank was asked to stop, and True if any rank's background save has ended."""
        asked = self._stop is not None and self._stop.received is not None
        mine = [asked, self._background.is_done]
        votes = torch.tensor(mine, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._votes)
        stops, ended = votes.tolist()
        return bool(stops), bool(ended)

    def _finish_background(self, step: int) -> bool:
        """Wait for the background save; return False if it has to be repeated."""
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
        """Write a checkpoint now, with one retry.

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
        """Do what follows a complete checkpoint."""
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
        """Record of the manifest, without files and tensors; the same on all ranks."""
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
        """Handle signals from now on, without a wait: later changes come behind the copies.

        torchtitan calls it between the backward pass and the optimizers. The slow part of a first
        step, which a signal may interrupt without a loss, is then over.
        """
        self._listen()

    def close(self) -> None:
        """Wait for unfinished writes, and release the folder for other runs."""
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
    """Run a task in a thread, with its errors logged: none of them should end the run."""
    try:
        do()
    except Exception as error:
        _logger.warning("old checkpoints are not deleted: %s: %s", type(error).__name__, error)
