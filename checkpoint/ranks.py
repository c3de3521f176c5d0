"""Shared decisions of ranks: results and errors of one rank reach all of them."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from checkpoint.errors import CheckpointError, UnreadableError, in_one_line

T = TypeVar("T")


def from_rank_0(find: Callable[[], T], group: dist.ProcessGroup, path: object) -> T:
    """Result of ``find`` on rank 0, on every rank.

    Raises:
        CheckpointError: On every rank, if ``find`` raises it on rank 0.
        UnreadableError: On every rank, if ``find`` raises OSError on rank 0.
    """
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = find()
        except CheckpointError as error:
            said[1] = error
        except OSError as error:
            said[1] = UnreadableError(str(in_one_line(path, "cannot be read", error)))
    dist.broadcast_object_list(said, src=0, group=group)
    found, wrong = said
    if wrong is not None:
        raise wrong
    return found


def say(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Log a line on rank 0 only."""
    if dist.get_rank() == 0:
        logger.log(level, message, *args, stacklevel=2)


def gathered(value: T, group: dist.ProcessGroup) -> list[T]:
    """The value of every rank, on every rank."""
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]  # all are set now
