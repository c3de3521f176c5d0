"""Step status: one decision of all ranks whether a step is taken, skipped, or ends the run.

The main number of a step is a maximum over all ranks: infinity if a gradient is not finite, else
the number of failed refreshes in a row of the worst block. Flags travel beside it: for a gradient
pattern that differs from the last agreement (see ``distributed.gradient_pattern``), and for
directions of the step before that exceeded the range of their dtype. A CPU reads the numbers at
once. An accelerator would idle while its host waits. There the step decides on the device whether
it changes anything, and the host reads the numbers of the step before.
"""

import logging
import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


def verdict_of(
    norms: Iterable[Tensor],
    failures: Tensor,
    groups: Sequence[dist.ProcessGroup],
    *,
    is_news: bool,
    parts_replicas: bool,
    beyond: Tensor,
) -> Tensor:
    """Step status: five numbers, ``(5,)``, that are equal on all ranks; one all-reduce per group.

    The first is infinity if a gradient of any rank is not finite, else the most failures of any
    rank. The others are flags, 1 if true for any rank: the gradient pattern is new; it is
    unchanged; replicas would diverge; a direction exceeded the range of floats.

    Args:
        norms: Norms of local gradients, and other numbers that must be finite, 0-dim.
        failures: Refreshes that failed in a row on this rank, 0-dim.
        groups: Process groups to reduce over, one after the other.
        is_news: True if this rank's gradient pattern differs from the last agreement.
        parts_replicas: True if it differs for a parameter with replicas.
        beyond: True if a direction of this rank exceeded the range in the step before, 0-dim.
    """
    worst = failures
    lengths = list(norms)
    if lengths:
        worst = worst.masked_fill(~torch.stack(lengths).isfinite().all(), math.inf)
    numbers = (is_news, not is_news, parts_replicas)
    flags = [torch.full_like(worst, float(flag)) for flag in numbers]
    verdict = torch.stack([worst, *flags, beyond.to(worst.dtype)])
    for group in groups:
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=group)
    return verdict


def may_be_taken(verdict: Tensor, *, is_agreed: bool) -> Tensor:
    """True if the step may change anything, decided on the device, 0-dim bool.

    False if replicas would diverge: some have another gradient pattern, and the others do not know
    it yet.
    """
    worst, _, is_known, parts_replicas, _ = verdict
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


class Watch:
    """Counts skipped steps, and reads step statuses off the device without a stall.

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

    def read(self, verdict: Tensor) -> list[float]:
        """Status of this step or, with late reads, of the step before (zeros in the first step)."""
        if not self.late:
            return verdict.tolist()
        before, self._pending = self._pending, sent_to_host(verdict)
        if before is None:
            return [0.0] * len(verdict)
        numbers, arrival = before
        if arrival is not None:
            arrival.synchronize()  # a whole forward and backward pass ago: nothing to wait for
        return numbers.tolist()

    def count(self, worst: float, beyond: float, max_skipped: int) -> None:
        """Count a skipped step, and the step before if one of its directions was left out.

        Args:
            worst: First number of :meth:`read`.
            beyond: Last number of :meth:`read`.
            max_skipped: Number of skipped steps in a row that ends the run.

        Raises:
            RuntimeError: On all ranks, after ``max_skipped`` in a row.
        """
        reasons = []
        if beyond:
            reasons.append("a direction that is beyond the range of its dtype")
        if worst == math.inf:
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
