"""Step status: one decision of all ranks whether a step is taken, skipped, or ends the run.

A CPU reads the status at once. An accelerator would idle while its host waits. There the step
decides on the device whether it changes anything, and the host reads the status of the step before.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


class StepStatus(NamedTuple):
    """Five numbers of a step, equal on all ranks: maxima over them, as floats on the host."""

    worst: float
    """Infinity if a gradient is not finite, else the most refreshes in a row of one block that
    failed."""
    has_new_pattern: float
    """1 if the gradient pattern of any rank differs from the last agreement
    (``distributed.gradient_pattern``)."""
    has_known_pattern: float
    """1 if that of any rank does not."""
    parts_replicas: float
    """1 if it differs for a parameter with replicas, which would diverge."""
    was_beyond: float
    """1 if a direction of the step before was beyond the range of its dtype."""

    @property
    def pattern_flags(self) -> tuple[float, float]:
        """The two flags of the gradient pattern: new to any rank, known to any rank."""
        return self.has_new_pattern, self.has_known_pattern


def agreed_status(
    norms: Iterable[Tensor],
    failures: Tensor,
    groups: Sequence[dist.ProcessGroup],
    *,
    has_new_pattern: bool,
    parts_replicas: bool,
    was_beyond: Tensor,
) -> Tensor:
    """The :class:`StepStatus` on the device, ``(5,)``; one all-reduce per group.

    Args:
        norms: Norms of local gradients, and other numbers that must be finite, 0-dim.
        failures: Refreshes that failed in a row on this rank, 0-dim.
        groups: Process groups to reduce over, one after the other.
        has_new_pattern: True if this rank's gradient pattern differs from the last agreement.
        parts_replicas: True if it differs for a parameter with replicas.
        was_beyond: True if a direction of this rank exceeded the range in the step before, 0-dim.
    """
    worst = failures
    lengths = list(norms)
    if lengths:
        worst = worst.masked_fill(~torch.stack(lengths).isfinite().all(), math.inf)
    numbers = (has_new_pattern, not has_new_pattern, parts_replicas)
    flags = [torch.full_like(worst, float(flag)) for flag in numbers]
    status = torch.stack([worst, *flags, was_beyond.to(worst.dtype)])
    for group in groups:
        dist.all_reduce(status, op=dist.ReduceOp.MAX, group=group)
    return status


def may_change(status: Tensor, *, is_agreed: bool) -> Tensor:
    """True if the step may change anything, decided on the device, 0-dim bool.

    False if replicas would diverge: some have another gradient pattern, and the others do not know
    it yet.

    Args:
        status: From :func:`agreed_status`.
        is_agreed: True if the ranks agreed on a gradient pattern in this step.
    """
    worst, _, is_known, parts_replicas, _ = status
    finite = worst.isfinite()
    return finite if is_agreed else finite & ~((is_known > 0) & (parts_replicas > 0))


def norms_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Norm of each tensor, which takes a seventh of the time of its largest entry.

    An overflow of the squares counts as not finite: statistics of the gradients would overflow too.
    """
    some = list(tensors)
    wide = any(tensor.dtype == torch.float64 for tensor in some)
    dtype = torch.float64 if wide else torch.float32
    return list(torch._foreach_norm(some, 2, dtype=dtype)) if some else []


class StatusReader:
    """Step statuses on the host, read off the device without a stall, and the skipped steps.

    Args:
        device: Device of the gradients.
        late: True if the host reads one step late; None for the default of the device.
    """

    skipped_steps: int
    """Number of steps that changed nothing, as far as the host knows."""

    def __init__(self, device: torch.device, *, late: bool | None = None) -> None:
        self.skipped_steps = self._in_a_row = 0
        self.late = device.type != "cpu" if late is None else late
        self._pending: tuple[Tensor, torch.Event | None] | None = None

    def read(self, status: Tensor) -> StepStatus:
        """Status of this step or, with late reads, of the step before (zeros in the first step)."""
        if not self.late:
            return StepStatus(*status.tolist())
        before, self._pending = self._pending, sent_to_host(status)
        if before is None:
            return StepStatus(*[0.0] * len(status))
        numbers, arrival = before
        if arrival is not None:
            arrival.synchronize()  # a whole forward and backward pass ago: nothing to wait for
        return StepStatus(*numbers.tolist())

    def count(self, status: StepStatus, max_skipped: int) -> None:
        """Count a skipped step, and the step before if one of its directions was left out.

        Args:
            status: Result of :meth:`read`.
            max_skipped: Number of skipped steps in a row that ends the run.

        Raises:
            RuntimeError: On all ranks, after ``max_skipped`` in a row.
        """
        reasons = []
        if status.was_beyond:
            reasons.append("a direction that is beyond the range of its dtype")
        if status.worst == math.inf:
            reasons.append("a gradient that is not finite, or whose square is not")
        if not reasons:
            self._in_a_row = 0
        for reason in reasons:
            self.skipped_steps += 1
            self._in_a_row += 1
            logger.warning("step skipped: it had %s (%d so far)", reason, self.skipped_steps)
            if self._in_a_row >= max_skipped:
                raise RuntimeError(f"{self._in_a_row} steps in a row had {reason}; lower lr, or "
                                   "raise max_skipped")  # fmt: skip


def sent_to_host(values: Tensor) -> tuple[Tensor, torch.Event | None]:
    """A copy on the host, made while the device works on, and the event of its arrival."""
    if values.device.type == "cpu":
        return values.clone(), None
    copy = torch.empty(len(values), dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrival = torch.Event(values.device)
    arrival.record()
    return copy, arrival
