"""Writing checkpoints, at once or while training goes on, and what happens if that fails.

A failed save leaves nothing behind and harms nothing that was there; every rank learns of it, in
one line.
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
    """Write one checkpoint, all ranks together, while rank 0 finds its folder ``is_ours``.

    Raises:
        CheckpointError: On every rank, if it could not be written; nothing is left of it then.
    """
    start = time.monotonic()
    writer = Writer(place, record, is_ours)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # not an Exception: it would pass most handlers
        writer.discard()
        raise in_one_line(place, "not saved", error) from error
    if dist.get_rank() == 0:
        _logger.info("saved %s in %.1f s", place, time.monotonic() - start)


class BackgroundSave:
    """Writes one checkpoint at a time in a thread, which is the same thread on every rank."""

    def __init__(self, group: dist.ProcessGroup, *, pinned: bool) -> None:
        """Write with the collectives of ``group``, which nobody else may use meanwhile."""
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
        """Copy the tensors and begin to :func:`write` the copies."""
        assert self._saving is None, "the last save must be finished first"
        copies, wait_for_copies = self._staging.copy(tensors)

        def save() -> None:
            wait_for_copies()
            write(place, copies, record, self._group, is_ours)

        self._saving = self._thread.submit(save)

    @property
    def is_running(self) -> bool:
        """Whether a save was begun and not yet finished by :meth:`finish`."""
        return self._saving is not None

    @property
    def is_done(self) -> bool:
        """Whether a save ended, well or not, that :meth:`finish` has not yet been asked about."""
        return self._saving is not None and self._saving.done()

    def finish(self) -> None:
        """Wait for the save that was begun, if any.

        Raises:
            CheckpointError: If it failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """End the thread; waits for what it does."""
        self._thread.shutdown()
