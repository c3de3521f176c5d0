"""Steps whose gradients are not finite: decided by all ranks alike, skipped, counted, and ended.

One number per step, the maximum over all ranks, says all: infinity where a gradient is not finite,
else how many refreshes of a block have failed in a row. (Beside it travels whether any rank has
other gradients than the ranks last agreed on, see ``distributed.presence``, and whether a direction
of the step before was beyond the range of its dtype.) A CPU reads it at
once. An accelerator would stand still while its host waits: there the step decides for itself, on
the device, whether it changes anything, and the host reads the numbers of the step before.
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
    """Five numbers that are the same on all ranks, ``(5,)``; one all-reduce per group.

    The first is infinity if a gradient of any rank is not finite, else the most failures of any
    rank. The second is 1 if something is news to any rank, the third if it is none to any; else 0;
    the fourth if replicas would part, the fifth if a direction was beyond the range of floats.

    Args:
        norms: Of local gradients, and of whatever else must be finite, 0-dim.
        failures: Refreshes that failed in a row on this rank, 0-dim.
        groups: Reduced over in turn.
        is_news: Whether this rank has other gradients than when the ranks last agreed.
        parts_replicas: Whether any of these are of a parameter with replicas.
        beyond: Whether a direction of this rank was, in the step before, 0-dim.
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
    """Whether a step may change anything, decided on the device, 0-dim bool.

    Not if replicas would part: some have other gradients, and the others do not know it yet.
    """
    worst, _, is_known, parts_replicas, _ = verdict
    finite = worst.isfinite()
    return finite if is_agreed else finite & ~((is_known > 0) & (parts_replicas > 0))


def norms_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The norm of each tensor: not its largest entry, which takes seven times as long.

    Where squares overflow, so does everything that is made of them.
    """
    some = list(tensors)
    wide = any(tensor.dtype == torch.float64 for tensor in some)
    dtype = torch.float64 if wide else torch.float32
    return list(torch._foreach_norm(some, 2, dtype=dtype)) if some else []


class Watch:
    """Counts skipped steps, and reads numbers off the device without stopping it.

    Args:
        device: Where the gradients lie.
        late: Whether the host reads a step late; None for what suits the device.
    """

    skipped_steps: int
    """Steps that changed nothing, as far as the host knows."""

    def __init__(self, device: torch.device, *, late: bool | None = None) -> None:
        self.skipped_steps = self._in_a_row = 0
        self.late = device.type != "cpu" if late is None else late
        self._pending: tuple[Tensor, torch.Event | None] | None = None

    def read(self, verdict: Tensor) -> list[float]:
        """The numbers of this step, or if reads are late of the step before (0 in the first)."""
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
        """Count a skipped step, and the one before if a direction of it was left out.

        Args:
            worst: The first number that :meth:`read` returned.
            beyond: The last one.
            max_skipped: Skipped steps in a row that end the run.

        Raises:
            RuntimeError: On all ranks alike, after ``max_skipped`` in a row.
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
    """A copy that arrives on the host while the device works on, and the event of its arrival."""
    if values.device.type == "cpu":
        return values.clone(), None
    copy = torch.empty(len(values), dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrival = torch.Event(values.device)
    arrival.record()
    return copy, arrival
