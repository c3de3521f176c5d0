"""The blocks of all parameters, with their owners and refresh slots.

Every rank computes the same list from names, shapes, placements and configuration alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from titan_shampoo.distributed.assignment import (
    FLOPS_PER_BYTE,
    Claim,
    Job,
    assign_owners,
    spread_slots,
)
from titan_shampoo.distributed.geometry import Grid
from titan_shampoo.distributed.layout import PlacementGroup, Region, Sharding
from titan_shampoo.distributed.overlap import Counts, holders, overlap_table

Alignment = Literal["global", "shard"]


class Cost(NamedTuple):
    """Floating-point operations for one block."""

    step: float
    """Operations in every step, for factors and direction."""
    refresh: float
    """Operations of one refresh."""

    def per_step(self, period: int) -> float:
        """Operations per step, averaged over the steps between two refreshes."""
        return self.step + self.refresh / period


def _no_state(shape: tuple[int, ...]) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class Parameter:
    """A parameter as the plan sees it: its blocks, placement, costs and dtypes."""

    name: str
    shape: tuple[int, ...]
    grid: Grid
    placement_group: PlacementGroup
    sharding: Sharding
    group: int
    """Number of the parameter group; a stack holds blocks of one group only."""
    dtype: torch.dtype
    """Dtype of the computations on its blocks."""
    period: int
    """Steps between two refreshes of a block."""
    cost: Callable[[tuple[int, ...]], Cost]
    """Cost of a block of the given shape."""
    alignment: Alignment = "global"
    """"global": blocks may travel to other ranks; "shard": a block never leaves its shard."""
    state: Callable[[tuple[int, ...]], dict[str, int]] = _no_state
    """Bytes of state of a block of the given shape, by kind; for reports only."""
    is_staggered: bool = True
    """True if its blocks have different refresh slots; False if all are refreshed in one step."""
    communication_dtype: torch.dtype | None = None
    """Dtype of the messages with its gradients and directions; None for ``dtype``."""

    @property
    def message_dtype(self) -> torch.dtype:
        """Dtype of its messages."""
        return self.communication_dtype or self.dtype

    def region(self, shard: int) -> Region:
        """The part of the parameter in shard number ``shard``."""
        return self.sharding.region(self.shape, self.grid, shard)

    @cached_property
    def block_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each block, without batch dims."""
        return [self.grid.block_shape(position) for position in self.grid.positions()]

    @cached_property
    def block_costs(self) -> list[Cost]:
        """Cost of each block."""
        by_shape = {shape: self.cost(shape) for shape in set(self.block_shapes)}
        return [by_shape[shape] for shape in self.block_shapes]

    @property
    def claim(self) -> Claim:
        """Cost of its refreshes, for :func:`assignment.spread_slots`."""
        refreshes = tuple(cost.refresh for cost in self.block_costs)
        return Claim(self.name, self.group, self.period, refreshes)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of one parameter."""

    param: int
    """Position of the parameter in the plan's list."""
    index: int
    """Row-major position in the parameter's grid."""
    start: tuple[int, ...]
    """First index along each merged dim."""
    extent: tuple[int, ...]
    """Extent along each merged dim, 1 along batch dims."""
    shape: tuple[int, ...]
    """Extent without batch dims: the shape of the matrix or tensor that is preconditioned."""
    slot: int
    """Step of the refresh period in which the block is due."""
    shards: tuple[int, ...]
    """Shards that hold a part of the block."""
    replica: int
    """Row of the owner in the placement group."""
    shard: int
    """Column of the owner in the placement group."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.extent)

    @property
    def is_cut(self) -> bool:
        """True if a part of it travels to its owner."""
        return self.shards != (self.shard,)


def assigned_blocks(
    params: Sequence[Parameter], slots: Sequence[Sequence[int]] | None = None
) -> list[Block]:
    """The blocks of all parameters, in order, with refresh slots and owners; equal on all ranks.

    Args:
        params: All parameters of this rank.
        slots: Refresh slot of every block of each parameter; None if no other rank has parameters
            that share the period.
    """
    if slots is None:
        slots = spread_slots([param.claim for param in params])
    slots = [
        own if param.is_staggered else [0] * len(own)
        for param, own in zip(params, slots, strict=True)
    ]
    tables = Tables()
    jobs = [_job(param, tables, own) for param, own in zip(params, slots, strict=True)]
    blocks = []
    for number, (param, job, ranks) in enumerate(
        zip(params, jobs, assign_owners(jobs), strict=True)
    ):
        places = {
            rank: (replica, shard)
            for replica, row in enumerate(param.placement_group.ranks)
            for shard, rank in enumerate(row)
        }
        shapes, own, owners = param.block_shapes, slots[number], ranks.tolist()
        for index, position in enumerate(param.grid.positions()):
            start, extent = param.grid.block_start(position), param.grid.block_extent(position)
            blocks.append(Block(number, index, start, extent, shapes[index], own[index],
                                job.holders[index], *places[owners[index]]))  # fmt: skip
    return blocks


class Tables:
    """Overlaps and holders, computed once for parameters with equal shape, grid and sharding."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Counts, list[tuple[int, ...]]]] = {}

    def of(self, param: Parameter) -> tuple[Counts, list[tuple[int, ...]]]:
        """Table (shards, blocks) of common elements, and the shards that hold each block."""
        key = (param.sharding, param.shape, param.grid)
        if key not in self._known:
            table = overlap_table(param.sharding, param.shape, param.grid)
            self._known[key] = (table, holders(table))
        return self._known[key]


def _job(param: Parameter, tables: Tables, slots: Sequence[int]) -> Job:
    """The blocks of a parameter as work; FLOPS_PER_BYTE decides which blocks may travel."""
    table, shards = tables.of(param)
    steps, refreshes = np.array(param.block_costs, np.float64).reshape(-1, 2).T
    rates = steps + refreshes / param.period
    # A holder would send the rest of the block as well, so only its own part is saved.
    spared = 2 * param.message_dtype.itemsize * table.max(axis=0, initial=0)
    pays: NDArray[np.bool_] = rates >= FLOPS_PER_BYTE * spared
    return Job(
        ranks=np.array(param.placement_group.ranks, np.int64),
        holders=shards,
        rates=rates,
        refreshes=refreshes,
        slots=np.array(slots, np.int64),
        period=param.period,
        may_travel=pays & (param.alignment == "global"),
    )
