"""Steps whose gradients are not finite: decided by all ranks alike, skipped, counted, and ended.

One number per step, the maximum over all ranks, says all: infinity where a gradient is not finite,
else how many refreshes of a block have failed in a row. A CPU reads it at once. An accelerator
would stand still while its host waits: there the step decides for itself, on the device, whether
it changes anything, and the host reads the number of the step before.
"""

import logging
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


def worst_of(
    grads: Iterable[Tensor], failures: Tensor, process_group: dist.ProcessGroup | None
) -> Tensor:
    """Infinity if a gradient of any rank is not finite, else the most failures of any rank, 0-dim.

    One all-reduce of one element.

    Args:
        grads: Local gradients.
        failures: Refreshes that failed in a row on this rank, 0-dim.
        process_group: Ranks of the model; None for all.
    """
    worst = failures.clone()
    filled = [grad for grad in grads if grad.numel()]
    if filled:
        # Not the largest entry, seven times as slow: and where squares overflow, so do factors.
        wide = any(grad.dtype == torch.float64 for grad in filled)
        dtype = torch.float64 if wide else torch.float32
        norms = torch.stack(torch._foreach_norm(filled, 2, dtype=dtype))
        worst.masked_fill_(~norms.isfinite().all(), math.inf)
    if dist.is_initialized():
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=process_group)
    return worst


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

    def read(self, worst: Tensor) -> float:
        """The number of this step, or if reads are late of the step before (0 in the first)."""
        if not self.late:
            return float(worst)
        before, self._pending = self._pending, _sent_to_host(worst)
        if before is None:
            return 0.0
        value, arrival = before
        if arrival is not None:
            arrival.synchronize()  # a whole forward and backward pass ago: nothing to wait for
        return float(value)

    def count(self, verdict: float, max_skipped: int) -> None:
        """Count a skipped step.

        Args:
            verdict: What :meth:`read` returned.
            max_skipped: Skipped steps in a row that end the run.

        Raises:
            RuntimeError: On all ranks alike, after ``max_skipped`` in a row.
        """
        if verdict != math.inf:
            self._in_a_row = 0
            return
        self.skipped_steps += 1
        self._in_a_row += 1
        logger.warning("step skipped: a gradient is not finite (%d so far)", self.skipped_steps)
        if self._in_a_row >= max_skipped:
            raise RuntimeError(f"{self._in_a_row} steps in a row had a gradient that is not "
                               "finite; lower lr, or raise max_skipped")  # fmt: skip


def _sent_to_host(value: Tensor) -> tuple[Tensor, torch.Event | None]:
    """A copy that arrives on the host while the device works on, and the event of its arrival."""
    if value.device.type == "cpu":
        return value.clone(), None
    copy = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    arrival = torch.Event(value.device)
    arrival.record()
    return copy, arrival
