"""Figures of a plan for every rank at once: work, memory, messages.

There is no loop over ranks: owners of blocks and overlaps of shards with blocks are tables, and the
figures are sums over them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titan_shampoo.distributed.advice import suggestions
from titan_shampoo.distributed.blocks import Block, Parameter, Tables
from titan_shampoo.distributed.plan import bucket_members

Figures = NDArray[np.float64]
"""One number per rank."""

MESSAGES = "in a step: messages"
"""The row of :meth:`Summary.rows` with message buffers, which optimizers use one at a time."""


@dataclass(slots=True)
class Summary:
    """Work, memory and messages of every rank; arrays are ``(ranks,)``."""

    ranks: NDArray[np.int64]
    """Rank number of each column."""
    blocks: Figures
    """Number of blocks that a rank owns."""
    step_flops: Figures
    """Floating-point operations of every step, without refreshes."""
    refresh_flops: dict[int, NDArray[np.float64]]
    """Operations of the refreshes in each slot, ``(period, ranks)``, by period."""
    state: dict[str, Figures]
    """Bytes of state by kind."""
    working: dict[str, Figures]
    """Bytes during a step: stacks, directions, messages (the most at any time)."""
    sent: Figures
    """Bytes sent to other ranks in a step."""
    collectives: int
    """Collectives in a step, without the one of the step status."""
    aligned: int
    """Blocks inside one shard that stay there."""
    cut: int
    """Blocks that travel because shard edges cut them."""
    balancing: int
    """Blocks that travel to relieve a rank."""
    suggestions: list[str] = field(default_factory=list)
    """Settings to change, in words."""

    @property
    def mean_flops(self) -> Figures:
        """Operations per step, averaged over the period."""
        return self.step_flops + sum(
            (slots.mean(axis=0) for slots in self.refresh_flops.values()),
            np.zeros_like(self.step_flops),
        )

    @property
    def imbalance(self) -> float:
        """Largest over mean work of a rank, over a whole period."""
        return _imbalance(self.mean_flops)

    @property
    def worst_imbalance(self) -> float:
        """Largest over mean work of a rank, in the worst single step of a period."""
        worst = self.imbalance
        for slots in self.refresh_flops.values():
            rest = self.mean_flops - slots.mean(axis=0)
            worst = max([worst, *(_imbalance(rest + slot) for slot in slots)])
        return worst

    @property
    def largest_refresh(self) -> Figures:
        """Operations of the refreshes in the most expensive step of the period."""
        zeros = np.zeros_like(self.step_flops)
        return sum((slots.max(axis=0) for slots in self.refresh_flops.values()), zeros)

    def rows(self) -> list[tuple[str, Figures, str]]:
        """Triples (label, figures, unit) for a table."""
        return [
            ("blocks owned", self.blocks, ""),
            ("arithmetic in every step", self.step_flops, "FLOP"),
            ("arithmetic of refreshes, per step", self.mean_flops - self.step_flops, "FLOP"),
            ("arithmetic of refreshes, largest step", self.largest_refresh, "FLOP"),
            *((f"state: {kind}", figures, "B") for kind, figures in self.state.items()),
            *((f"in a step: {kind}", figures, "B") for kind, figures in self.working.items()),
            ("sent in a step", self.sent, "B"),
        ]

    def notes(self) -> list[str]:
        """Sentences on balance, messages and suggestions, which are not in the table of ranks."""
        return [
            f"work per rank, largest / mean: {self.imbalance:.3f} over a period, "
            f"{self.worst_imbalance:.3f} in its worst step",
            f"blocks: {self.aligned} stay in their shard, {self.cut} travel because shard edges "
            f"cut them, {self.balancing} for balance",
            f"collectives in a step: {self.collectives}, and the check of the gradients",
            *self.suggestions,
        ]

    def as_json(self) -> dict[str, Any]:
        """The content of :meth:`notes`, for programs."""
        return {
            "imbalance": self.imbalance,
            "worst_imbalance": self.worst_imbalance,
            "blocks": {"aligned": self.aligned, "cut": self.cut, "balancing": self.balancing},
            "collectives": self.collectives,
            "suggestions": self.suggestions,
        }

    def __str__(self) -> str:
        return "\n".join([*table(self.rows()), *self.notes()])


def summarize(
    params: Sequence[Parameter],
    blocks: Sequence[Block],
    like_parameters: Mapping[str, Mapping[int, int]],
) -> Summary:
    """Figures of a plan for all ranks of its placement groups.

    Args:
        params: Parameters of the plan.
        blocks: Blocks of the plan.
        like_parameters: Bytes on each rank of state that is sharded like its parameter, by kind.
    """
    placement_groups = {param.placement_group.ranks for param in params}
    numbers = [
        rank for placement_group in placement_groups for row in placement_group for rank in row
    ]
    ranks = np.unique(numbers or [rank for held in like_parameters.values() for rank in held])
    sums = _Sums(ranks, params)
    by_param: list[list[Block]] = [[] for _ in params]
    for block in blocks:
        by_param[block.param].append(block)
    for members in bucket_members(params):
        sums.add_bucket([(params[number], by_param[number]) for number in members])
    for kind, held in like_parameters.items():
        sums.state[kind] = np.array([held.get(rank, 0) for rank in ranks.tolist()], np.float64)
    is_cut = np.array([block.is_cut for block in blocks], bool)
    abroad = np.array([block.shard not in block.shards for block in blocks], bool)
    balancing = int((is_cut & abroad & [len(b.shards) == 1 for b in blocks]).sum())
    return Summary(
        ranks=ranks,
        blocks=sums.blocks,
        step_flops=sums.step_flops,
        refresh_flops=sums.refresh_flops,
        state=sums.state,
        working=sums.working,
        sent=sums.sent,
        collectives=sums.collectives,
        aligned=int((~is_cut).sum()),
        cut=int(is_cut.sum()) - balancing,
        balancing=balancing,
        suggestions=suggestions(params, blocks),
    )


class _Sums:
    """Figures that are added up bucket by bucket."""

    def __init__(self, ranks: NDArray[np.int64], params: Sequence[Parameter]) -> None:
        self.tables = Tables()
        self.column = np.zeros(int(ranks.max(initial=0)) + 1, np.int64)
        self.column[ranks] = np.arange(len(ranks))
        self.num_ranks = len(ranks)
        self.blocks, self.step_flops, self.sent = (np.zeros(len(ranks)) for _ in range(3))
        self.refresh_flops = {
            period: np.zeros((period, len(ranks))) for period in {p.period for p in params}
        }
        self.state: dict[str, Figures] = {}
        kinds = ("blocks in stacks", "directions", "messages")
        self.working: dict[str, Figures] = {kind: np.zeros(len(ranks)) for kind in kinds}
        self._returning, self._current = np.zeros(len(ranks)), np.zeros((2, len(ranks)))
        self.collectives = 0

    def add_bucket(self, members: Sequence[tuple[Parameter, list[Block]]]) -> None:
        """Add the work, the memory and the messages of one bucket."""
        placement_group, size = members[0][0].placement_group, members[0][0].message_dtype.itemsize
        columns = self.column[np.array(placement_group.ranks)].reshape(-1)
        traffic = _Traffic(len(placement_group.ranks), len(placement_group.ranks[0]))
        for param, blocks in members:
            self._add_work(param, blocks)
            held, owned = traffic.add(self.tables.of(param)[0], blocks)
            self.working["directions"][columns] += param.dtype.itemsize * held.reshape(-1)
            self.working["blocks in stacks"][columns] += param.dtype.itemsize * owned.reshape(-1)
        sent, buffers, shared, num_collectives = traffic.totals()
        self.sent[columns] += size * sent.reshape(-1)
        self._add_messages(columns, size * buffers.reshape(-1), size * shared.reshape(-1))
        self.collectives += num_collectives

    def _add_messages(self, columns: NDArray[np.int64], buffers: Figures, shared: Figures) -> None:
        """Update the most bytes in flight at once, in the order of ``exchange.exchange_in_turn``.

        Args:
            columns: Columns of the ranks that take part in the bucket.
            buffers: Bytes of message buffers of each of them.
            shared: Bytes of the copy that is made when directions are shared with replicas.
        """
        # Bytes of the last bucket: before its directions are shared, and from then on.
        current, sharing = self._current[:, columns]
        events = [self._returning[columns] + current + buffers, sharing + buffers, buffers + shared]
        most = self.working["messages"]
        most[columns] = np.maximum(most[columns], np.max(events, axis=0))
        self._returning[columns] = sharing
        self._current[:, columns] = buffers, buffers + shared

    def _add_work(self, param: Parameter, blocks: list[Block]) -> None:
        ranks = np.array(param.placement_group.ranks)
        owners = self.column[ranks[[b.replica for b in blocks], [b.shard for b in blocks]]]
        costs = np.array(param.block_costs, np.float64).reshape(-1, 2)
        np.add.at(self.blocks, owners, 1)
        np.add.at(self.step_flops, owners, costs[:, 0])
        slots = [block.slot for block in blocks]
        np.add.at(self.refresh_flops[param.period], (slots, owners), costs[:, 1])
        by_shape = {shape: param.state(shape) for shape in set(param.block_shapes)}
        for kind in dict.fromkeys(kind for state in by_shape.values() for kind in state):
            figures = self.state.setdefault(kind, np.zeros(self.num_ranks))
            sizes = [by_shape[shape].get(kind, 0) for shape in param.block_shapes]
            np.add.at(figures, owners, np.array(sizes, np.float64))


class _Traffic:
    """Elements that each rank of a placement group ``(replicas, shards)`` sends and receives."""

    def __init__(self, num_replicas: int, num_shards: int) -> None:
        self.inbox, self.outbox, self.own_part, self.shared = (
            np.zeros((num_replicas, num_shards)) for _ in range(4)
        )

    def add(self, table: NDArray[np.int64], blocks: list[Block]) -> tuple[Figures, Figures]:
        """Add the blocks of one parameter; return the elements that each rank holds and owns of it.

        Args:
            table: Elements of each block on each shard, ``(shards, blocks)``.
            blocks: Blocks in the order of the table.
        """
        replicas = np.array([block.replica for block in blocks], np.int64)
        shards = np.array([block.shard for block in blocks], np.int64)
        is_cut = np.array([block.is_cut for block in blocks], bool)
        sizes, kept = table.sum(axis=0), table[shards, np.arange(len(blocks))]
        held, owned = np.zeros_like(self.inbox), np.zeros_like(self.inbox)
        held += table.sum(axis=1)
        np.add.at(owned, (replicas, shards), sizes)
        np.add.at(self.inbox, (replicas, shards), sizes * is_cut)
        np.add.at(self.own_part, (replicas, shards), kept * is_cut)
        np.add.at(self.shared, replicas, table.T)
        np.add.at(self.outbox, replicas, (table * is_cut).T)
        return held, owned

    def totals(self) -> tuple[Figures, Figures, Figures, int]:
        """Elements sent, in message buffers, and in the shared copy; number of collectives."""
        num_replicas = len(self.inbox)
        travels = bool(self.inbox.any())
        sent = self.outbox + self.inbox - 2 * self.own_part
        width = np.zeros_like(self.inbox)
        if num_replicas > 1:
            width += self.shared.max(axis=0)
        sent = sent + (num_replicas - 1) * width
        # The gather buffer of all replicas, and the inbox.
        buffers = num_replicas * np.maximum(width, self.outbox) + self.inbox
        return sent, buffers, width, 2 * travels + bool(width.any())


def _imbalance(work: Figures) -> float:
    mean = float(work.mean()) if len(work) else 0.0
    return float(work.max()) / mean if mean else 1.0


def table(rows: Iterable[tuple[str, Figures, str]]) -> list[str]:
    """Lines with the smallest, mean and largest figure over the ranks, in readable units."""
    lines = [f"{'per rank':<46}{'least':>14}{'mean':>14}{'most':>14}"]
    for what, figures, unit in rows:
        values = [readable(value, unit) for value in (figures.min(), figures.mean(), figures.max())]
        lines.append(f"{what:<46}" + "".join(f"{value:>14}" for value in values))
    return lines


def readable(value: float, unit: str) -> str:
    """A number with three digits: ``readable(3 * 2**20, "B")`` is ``"3.00 MiB"``.

    >>> readable(3 * 2**20, "B"), readable(2.5e12, "FLOP"), readable(7, "")
    ('3.00 MiB', '2.50 TFLOP', '7')
    """
    base, prefixes = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (
        1000, ("", "K", "M", "G", "T", "P")
    )  # fmt: skip
    if not unit:
        return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"
    power = 0 if value < 1 else min(int(math.log(value, base)), len(prefixes) - 1)
    digits = 0 if power == 0 else 2
    return f"{value / base**power:.{digits}f} {prefixes[power]}{unit}"
