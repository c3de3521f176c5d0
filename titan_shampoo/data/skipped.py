"""Unreadable samples: skipped and counted, and refused if there are too many."""

import logging
from collections.abc import Sequence

from titan_shampoo.data import DataError

__all__ = ["AT_LEAST", "SkippedSamples", "check_share"]

AT_LEAST = 1000
"""Number of unreadable samples that is always allowed: one broken image among ten proves little."""

_NUM_NAMED = 3

_logger = logging.getLogger(__name__)


class SkippedSamples:
    """Counter of this rank; names the first few samples in warnings.

    Args:
        max_fraction: Largest share of unreadable samples among those read so far.
    """

    def __init__(self, max_fraction: float) -> None:
        """Start from zero."""
        self._max_fraction = max_fraction
        self._num_read = 0
        self.count = 0

    def add(self, messages: Sequence[str], *, num_read: int) -> None:
        """Count a batch.

        Args:
            messages: One per skipped sample, with its name and the reason.
            num_read: Number of samples that were read.

        Raises:
            DataError: If too many have been skipped.
        """
        self._num_read += num_read
        for message in messages:
            self.count += 1
            if self.count <= _NUM_NAMED:
                more = "; more will only be counted" if self.count == _NUM_NAMED else ""
                _logger.warning("skipped %s%s", message, more)
        if messages:
            total = max(self._num_read + self.count, AT_LEAST)
            check_share(self.count, total, self._max_fraction, messages[-1])


def check_share(num_bad: int, total: int, max_fraction: float, example: str) -> None:
    """Refuse data with a larger share of bad samples than ``max_fraction``.

    Raises:
        DataError: With the numbers, an example, and the key to change.
    """
    if num_bad > max_fraction * total:
        raise DataError(
            f"{num_bad} of {total} samples cannot be read, more than "
            f"training.max_bad_fraction = {max_fraction:g} allows, such as {example}"
        )
