"""Writes of checkpoints, in the foreground or beside training, and the handling of failures.

A failed save leaves nothing behind and no damage; every rank reports it in one line.
"""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint.errors import in_one_line
from checkpoint.staging import Staging
from checkpoint.writer import Writer

_logger = logging.getLogger(__name__)


def write(
    place: Path,
    tensors: Mapping[str, Tensor],
    record: dict[str, Any],
    group: dist.ProcessGroup,
    is_ours: Callable[[], bool] = lambda: True,
) -> None:
    """Write one checkpoint on all ranks together, as long as ``is_ours`` holds on rank 0.

    Raises:
        CheckpointError: On every rank, if it could not be written; nothing is left behind then.
    """
    start = time.monotonic()
    writer = Writer(place, record, is_ours)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # a BaseException: it would pass most handlers
        writer.discard()
        raise in_one_line(place, "not saved", error) from error
    if dist.get_rank() == 0:
        _logger.info("saved %s in %.1f s", place, time.monotonic() - start)


class BackgroundSave:
    """Writes one checkpoint at a time in a thread, which lives as long as this object."""

    def __init__(self, group: dist.ProcessGroup, *, pinned: bool) -> None:
        """Write with the collectives of ``group``, which has no other users in the meantime."""
        self._group = group
        self._staging = Staging(pinned=pinned)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None

    def start(
        self,
        place: Path,
        tensors: Mapping[str, Tensor],
        record: dict[str, Any],
        is_ours: Callable[[], bool],
    ) -> None:
        """Copy the tensors, and start to :func:`write` the copies."""
        assert self._saving is None, "the last save must be finished first"
        copies, wait_for_copies = self._staging.copy(tensors)

        def save() -> None:
            wait_for_copies()
            write(place, copies, record, self._group, is_ours)

        self._saving = self._thread.submit(save)

    @property
    def is_running(self) -> bool:
        """True if a save was started and :meth:`finish` has not returned since."""
        return self._saving is not None

    @property
    def is_done(self) -> bool:
        """True if a save has ended, well or not, and :meth:`finish` was not called since."""
        return self._saving is not None and self._saving.done()

    def finish(self) -> None:
        """Wait for the running save, if any.

        Raises:
            CheckpointError: If it failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._thread.shutdown()
