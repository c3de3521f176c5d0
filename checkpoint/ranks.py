"""Deciding together: what one rank finds out, all ranks know, and errors are everybody's."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from checkpoint.errors import CheckpointError, in_one_line

T = TypeVar("T")


def from_rank_0(find: Callable[[], T], group: dist.ProcessGroup, path: object) -> T:
    """What ``find`` returns on rank 0, on every rank.

    Raises:
        CheckpointError: On every rank, if ``find`` raises it, or OSError, on rank 0.
    """
    answer: list[T | None] = [None]
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [find()]
        except CheckpointError as error:
            problem = [str(error)]
        except OSError as error:
            problem = [str(in_one_line(path, "cannot be read", error))]
    said = [answer[0], problem[0]]
    dist.broadcast_object_list(said, src=0, group=group)
    found, wrong = said
    if wrong is not None:
        raise CheckpointError(str(wrong))
    return found  # type: ignore[return-value]  # None only where find() returns it


def gathered(value: T, group: dist.ProcessGroup) -> list[T]:
    """The value of every rank, on every rank."""
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]  # all are set now
