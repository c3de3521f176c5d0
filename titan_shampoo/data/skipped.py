"""Samples that cannot be read: skipped and counted, until there are too many of them."""

import logging
from collections.abc import Sequence

from titan_shampoo.data import DataError

__all__ = ["AT_LEAST", "SkippedSamples", "check_share"]

AT_LEAST = 1000
"""So many samples are allowed for from the start: one broken image among ten is no verdict yet."""

_NUM_NAMED = 3

_logger = logging.getLogger(__name__)


class SkippedSamples:
    """Counts on this rank; the first few are named in warnings.

    Args:
        max_fraction: Share of the samples read so far that may be unreadable.
    """

    def __init__(self, max_fraction: float) -> None:
        """Start from zero."""
        self._max_fraction = max_fraction
        self._num_read = 0
        self.count = 0

    def add(self, messages: Sequence[str], *, num_read: int) -> None:
        """Count a batch.

        Args:
            messages: Each names a sample that was skipped, and says why.
            num_read: Samples that were not.

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
    """Refuse data of which more than ``max_fraction`` is bad.

    Raises:
        DataError: With the numbers, an example, and the key to change.
    """
    if num_bad > max_fraction * total:
        raise DataError(
            f"{num_bad} of {total} samples cannot be read, more than "
            f"training.max_bad_fraction = {max_fraction:g} allows, such as {example}"
        )
