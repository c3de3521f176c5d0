"""What a step holds for its messages, seen from outside."""

import weakref
from typing import Any

import pytest
from torch import Tensor

from titan_shampoo.distributed import exchange


class Buffers:
    """Message buffers of this rank: the most bytes, and the most exchanges, at any one time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sizes: weakref.WeakKeyDictionary[exchange.Exchange, int] = (
            weakref.WeakKeyDictionary()
        )  # fmt: skip
        self.most_bytes = self.most_exchanges = 0
        made, scatter, all_gather = (
            exchange.Exchange.__init__, exchange.Exchange.scatter, exchange.all_gather
        )  # fmt: skip
        scattering: list[exchange.Exchange] = []

        def init(own: exchange.Exchange, *args: Any) -> None:
            made(own, *args)
            self.add(own, own._inbox, own._gather_buffer)

        def scattered(own: exchange.Exchange, *args: Any) -> None:
            scattering[:] = [own]
            scatter(own, *args)
            scattering.clear()

        def shared(output: Tensor, source: Tensor, **kwargs: Any) -> Any:
            self.add(scattering[0], source)
            return all_gather(output, source, **kwargs)

        patch.setattr(exchange.Exchange, "__init__", init)
        patch.setattr(exchange.Exchange, "scatter", scattered)
        patch.setattr(exchange, "all_gather", shared)

    def add(self, own: exchange.Exchange, *buffers: Tensor) -> None:
        self.sizes[own] = self.sizes.get(own, 0) + sum(buffer.nbytes for buffer in buffers)
        self.most_bytes = max(self.most_bytes, sum(self.sizes.values()))
        self.most_exchanges = max(self.most_exchanges, len(self.sizes))
