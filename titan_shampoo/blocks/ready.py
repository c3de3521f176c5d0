"""Which stacks have had a refresh of every block, as the host learns it without waiting."""

import torch
from torch import Tensor

from titan_shampoo.step_status import sent_to_host


class Ready:
    """Remembers what devices have told, until state is loaded."""

    def __init__(self) -> None:
        self._complete: set[int] = set()
        self._asked: dict[int, tuple[Tensor, torch.Event | None]] = {}

    def is_complete(self, number: int, refreshes: Tensor) -> bool:
        """Whether every block of a stack has been refreshed; False as long as it is not known.

        Args:
            number: Of the stack.
            refreshes: How many refreshes of each block have been taken, ``(n,)``.
        """
        if number in self._complete:
            return True
        if number not in self._asked:
            self._asked[number] = sent_to_host((refreshes > 0).all().view(1))
        answer, arrival = self._asked[number]
        if arrival is None or arrival.query():
            del self._asked[number]
            if answer.item():
                self._complete.add(number)
        return number in self._complete

    def forget(self) -> None:
        """Ask anew."""
        self._complete.clear()
        self._asked.clear()
