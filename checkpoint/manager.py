"""When a run saves, and what it resumes from.

torchtitan's manager on torch.distributed.checkpoint, but a checkpoint is written beside its place
and moved there when it is complete. So a folder that exists can be resumed, retention never counts
what cannot, and saving a step again never destroys the only good copy of it.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from checkpoint.errors import CheckpointError, in_one_line
from checkpoint.folders import commit, complete_steps, set_aside, sweep
from titan_shampoo import titan

_logger = logging.getLogger(__name__)

Saved = Future[Any] | AsyncSaveResponse | None


class CheckpointManager(titan.CheckpointManager):
    """Saves every ``checkpoint.interval`` steps and after the last, resumes the newest.

    Args and attributes are torchtitan's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (torchtitan's)
        """Take over torchtitan's arguments.

        Raises:
            CheckpointError: If the way of saving needs hardware that is not there.
        """
        super().__init__(*args, **kwargs)
        if self.enable_staging and not torch.accelerator.is_available():
            raise CheckpointError(
                'checkpoint.async_mode = "async_with_pinned_mem" needs a GPU; set it to "async"'
            )

    def load(self, step: int = -1) -> bool:
        """Load a checkpoint and return whether there was one.

        Args:
            step: The last step done in it; -1 means the newest complete one.

        Raises:
            CheckpointError: On every rank, if there is none of that step or it cannot be read.
        """
        if not self.enable:
            return False
        # One rank looks: folders on network file systems do not look the same to all at once.
        found = _decided_by_rank_0(self._look, step)
        return bool(super().load(found))

    def _look(self, step: int) -> int:
        """Return the step to load, or -1 for none, and clean up after runs that died."""
        folder, incomplete = Path(self.folder), self._incomplete
        try:
            sweep(folder, incomplete)
            steps = complete_steps(folder)
        except OSError as error:
            raise in_one_line(folder, "the checkpoint folder cannot be read", error) from error
        if step in (-1, *steps):
            return max(steps, default=-1) if step == -1 else step
        existing = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"checkpoint.load_step = {step}: {folder} has no complete checkpoint of that step; "
            f"there are: {existing}"
        )

    def _find_load_step(self, folder: str = "") -> int:
        """Return -1: ``load`` has looked already, and found nothing, if torchtitan asks again."""
        return -1

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """Load ``state_dict`` in place."""
        with _errors_in_one_line(checkpoint_id, "this checkpoint cannot be loaded"):
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: titan.AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Saved:
        """Write ``state_dict`` beside ``checkpoint_id``, and move it there when it is complete."""
        place = Path(checkpoint_id)
        written = self._incomplete / place.name
        start = time.monotonic()
        if dist.get_rank() == 0:
            rmtree(written, ignore_errors=True)
        dist.barrier()
        with _errors_in_one_line(place, "this checkpoint cannot be saved"):
            saved = super().dcp_save(
                state_dict, str(written), async_mode, enable_garbage_collection, to_hf
            )

        def complete() -> None:
            if dist.get_rank() == 0:
                commit(written, place)
                _logger.info("saved %s in %.1f s", place, time.monotonic() - start)

        return _then(saved, complete)

    def _save_last_step(self, curr_step: int) -> None:
        super()._save_last_step(curr_step)
        self._purge_stale_checkpoints()

    def _purge_stale_checkpoints(self) -> None:
        """Delete all but the newest ``checkpoint.keep_latest_k`` complete checkpoints."""
        if self.keep_latest_k == 0 or dist.get_rank() != 0:
            return
        folder = Path(self.folder)
        for step in complete_steps(folder)[: -self.keep_latest_k]:
            trash = set_aside(folder / f"step-{step}", self._incomplete)
            self.purge_queue.put(str(trash))

    @property
    def _incomplete(self) -> Path:
        """What is being written; on the same file system, so that a rename completes it."""
        return Path(f"{self.folder}.incomplete")


def _then(saved: Saved, complete: Callable[[], None]) -> Saved:
    """Return ``saved`` with ``complete`` called at its end: now, or by the thread that waits."""
    if isinstance(saved, AsyncSaveResponse):
        return replace(saved, upload_completion=_chained(saved.upload_completion, complete))
    if isinstance(saved, Future):
        return _chained(saved, complete)
    dist.barrier()  # Other formats than torch's own are finished by every rank on its own.
    complete()
    return None


def _chained(written: "Future[Any]", complete: Callable[[], None]) -> "Future[None]":
    """Return the future of ``complete``; ``written`` itself is done before its callbacks are."""
    completed: Future[None] = Future()

    def finish(written: "Future[Any]") -> None:
        try:
            written.result()
            complete()
        except BaseException as error:
            completed.set_exception(error)
        else:
            completed.set_result(None)

    written.add_done_callback(finish)
    return completed


@contextmanager
def _errors_in_one_line(path: object, problem: str) -> Iterator[None]:
    """Turn what torch.distributed.checkpoint raises, the same on all ranks, into one line."""
    try:
        yield
    except CheckpointException as error:  # not an Exception: it would pass most handlers
        raise in_one_line(path, problem, error) from error


def _decided_by_rank_0(decide: Callable[[int], int], step: int) -> int:
    """Return what ``decide`` returns on rank 0, or raise on all ranks what it raises there."""
    answer: list[int | str] = [0]
    if dist.get_rank() == 0:
        try:
            answer = [decide(step)]
        except CheckpointError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer)
    (decided,) = answer
    if isinstance(decided, str):
        raise CheckpointError(decided)
    return decided
