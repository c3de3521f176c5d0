"""Owners of blocks, and the refresh slots in which blocks are due.

Both are longest-first packings of costs into bins. Every rank computes them from the same numbers,
so the ranks agree without a message. Slots come first and depend on the model alone, because they
decide the iterates. Owners depend on the mesh and decide only who computes.
"""

import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.03
"""Excess over the mean, relative to it, up to which blocks do not travel to relieve a rank."""

FLOPS_PER_BYTE = 100.0
"""Floating-point operations per byte sent from which a block may travel for balance.

About what one rank computes (batched products and factorisations of small blocks) while it sends a
byte: 100 GFLOP/s beside 1 GB/s on processors, 20 TFLOP/s beside 200 GB/s inside a machine of
accelerators. Matrix blocks from 64 up are above it.
"""


class Claim(NamedTuple):
    """Cost of the refreshes of one parameter."""

    name: str
    group: int
    """Number of its parameter group."""
    period: int
    """Steps between two refreshes of a block."""
    costs: tuple[float, ...]
    """Floating-point operations of one refresh of each of its blocks."""


def spread_slots(claims: Sequence[Claim]) -> list[list[int]]:
    """Slots in ``[0, period)`` of the blocks of each parameter, such that slots cost the same.

    They do not depend on the order of ``claims``. Groups are packed one after the other, so that a
    group that is added later moves no earlier slot; the parameters of a group are sorted by name.
    """
    slots: list[list[int]] = [[] for _ in claims]
    loads: dict[int, list[float]] = {}
    groups: dict[tuple[int, int], list[int]] = {}
    for number, claim in enumerate(claims):
        groups.setdefault((claim.period, claim.group), []).append(number)
    for (period, _), members in sorted(groups.items()):
        members.sort(key=lambda number: _natural(claims[number].name))
        load = loads.setdefault(period, [0.0] * period)
        spread = iter(pack_slots([c for m in members for c in claims[m].costs], load))
        for member in members:
            slots[member] = [next(spread) for _ in claims[member].costs]
    return slots


def _natural(name: str) -> list[str | int]:
    """Sort key that puts ``layers.10`` after ``layers.9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def pack_slots(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Slot in ``[0, len(loads))`` of each block, such that all slots cost about the same.

    Args:
        costs: Cost of one refresh of each block.
        loads: Cost of each slot of the period so far; updated in place.
    """
    slots = [0] * len(costs)
    queue = [(load, slot) for slot, load in enumerate(loads)]
    heapq.heapify(queue)
    for block in sorted(range(len(costs)), key=lambda block: (-costs[block], block)):
        load, slot = queue[0]
        slots[block] = slot
        heapq.heapreplace(queue, (load + costs[block], slot))
    for load, slot in queue:
        loads[slot] = load
    return slots


@dataclass(frozen=True, slots=True)
class Job:
    """The blocks of one parameter as work to be assigned to ranks."""

    ranks: NDArray[np.int64]
    """Ranks that hold the parameter, ``(replicas, shards)``."""
    holders: Sequence[tuple[int, ...]]
    """For each block, the columns of ``ranks`` that hold a part of it."""
    rates: NDArray[np.float64]
    """Floating-point operations of each block per step, refreshes included at their rate."""
    refreshes: NDArray[np.float64]
    """Floating-point operations of one refresh of each block."""
    slots: NDArray[np.int64]
    """Refresh slot of each block."""
    period: int
    """Number of slots."""
    may_travel: NDArray[np.bool_]
    """Blocks that may go to a rank without a part of them."""


def assign_owners(jobs: Sequence[Job]) -> list[NDArray[np.int64]]:
    """Owner of each block of each job, such that the work of the ranks is level.

    The largest blocks are assigned first. Each goes to a holder that stays within
    ``1 + TOLERANCE`` of the mean. Among these, the one with the least to refresh in that slot
    is chosen, so that ranks are level in every single step. If all holders would exceed that, the
    block goes to the least loaded holder or, if it may travel, to the least loaded rank of the
    placement group.

    Jobs of other ranks count only if all ranks of a job know them, so that its ranks agree. Experts
    on a part of the mesh know the work of the whole mesh, but not the other way round.
    """
    owners = [np.zeros(len(job.rates), np.int64) for job in jobs]
    groups: dict[frozenset[int], list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(frozenset(job.ranks.reshape(-1).tolist()), []).append(number)
    ledgers: dict[frozenset[int], _Ledger] = {}
    num_ranks = 1 + max((max(ranks) for ranks in groups), default=0)
    for ranks in sorted(groups, key=lambda ranks: (-len(ranks), sorted(ranks))):
        known = [ledger for others, ledger in ledgers.items() if ranks < others]
        members = groups[ranks]
        ledger = ledgers[ranks] = _Ledger([jobs[n] for n in members], known, num_ranks)
        for number, position, owner in ledger.give_all():
            owners[members[number]][position] = owner
    return owners


class _Ledger:
    """Load of every rank so far, for the jobs of one set of ranks."""

    def __init__(self, jobs: Sequence[Job], known: Iterable["_Ledger"], num_ranks: int) -> None:
        self.jobs = jobs
        self.totals = np.zeros(num_ranks)
        self.refreshes = {
            period: np.zeros((period, num_ranks)) for period in {job.period for job in jobs}
        }
        self.own = np.zeros(num_ranks)
        self.own_refreshes = {period: array.copy() for period, array in self.refreshes.items()}
        for other in known:
            self.totals += other.own
            for period, array in other.own_refreshes.items():
                if period in self.refreshes:
                    self.refreshes[period] += array
        ranks = jobs[0].ranks.reshape(-1)
        self.level = (self.totals[ranks].sum() + sum(job.rates.sum() for job in jobs)) / len(ranks)
        self.candidates: dict[tuple[int, tuple[int, ...]], NDArray[np.int64]] = {}

    def give_all(self) -> Iterator[tuple[int, int, int]]:
        """Triples (job, block, owner) of all blocks, the largest first."""
        entries = [(n, k) for n, job in enumerate(self.jobs) for k in range(len(job.rates))]
        rates = np.concatenate([job.rates for job in self.jobs])
        slots = np.concatenate([job.slots for job in self.jobs])
        # lexsort's last key comes first; equal blocks stay in order.
        for entry in np.lexsort((slots, -rates)).tolist():
            number, position = entries[entry]
            yield number, position, self.give(number, position)

    def give(self, number: int, position: int) -> int:
        """The rank that gets a block; its load is updated."""
        job = self.jobs[number]
        rate, period, slot = job.rates[position], job.period, job.slots[position]
        holders = self._holders(number, position)
        limit = self.level * (1 + TOLERANCE)
        slot_loads = self.refreshes[period][slot]
        fitting = holders[self.totals[holders] + rate <= limit]
        if len(fitting):
            choice = np.lexsort((self.totals[fitting], slot_loads[fitting]))[0]
            owner = int(fitting[choice])
        else:
            owner = self._least_loaded(holders)
            if job.may_travel[position]:
                other = self._least_loaded(job.ranks.reshape(-1))
                owner = other if self.totals[other] < self.totals[owner] else owner
        for totals, refreshes in ((self.totals, self.refreshes), (self.own, self.own_refreshes)):
            totals[owner] += rate
            refreshes[period][slot, owner] += job.refreshes[position]
        return owner

    def _least_loaded(self, ranks: NDArray[np.int64]) -> int:
        return int(ranks[self.totals[ranks].argmin()])

    def _holders(self, number: int, position: int) -> NDArray[np.int64]:
        job = self.jobs[number]
        key = (number, job.holders[position])
        if key not in self.candidates:
            self.candidates[key] = job.ranks[:, job.holders[position]].reshape(-1)
        return self.candidates[key]
