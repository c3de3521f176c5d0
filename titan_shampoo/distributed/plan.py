"""Plan of a step: one list of blocks, the owner of each, and the copies that move them.

Every rank computes the plan from names, shapes, placements and configuration alone. The owner of a
block inside one shard is usually the rank of that shard. A block cut by shard edges travels to its
owner, and its direction travels back. A block can also travel to a rank with less work, where that
pays. Replicas divide their blocks and share the directions.
    gradient shard -> stack                                     block inside this shard, owned here
    gradient shard -> outbox -> all-to-all -> inbox -> stack    block owned by another shard's rank
    stack -> inbox -> all-to-all -> outbox                      its direction, back
    stack, outbox -> gather buffer -> all-gather over replicas -> direction shard
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from titan_shampoo.distributed.blocks import Block, Cost, Parameter, assigned_blocks
from titan_shampoo.distributed.traffic import Bucket, Stack, Traffic, add_stacks

__all__ = [
    "Block",
    "Bucket",
    "Cost",
    "Holding",
    "Parameter",
    "Plan",
    "Stack",
    "bucket_members",
    "make_plan",
]

BUCKET_NUMEL = 1 << 25
"""Elements of gradient in one bucket: one exchange, during which another bucket is computed."""


@dataclass(slots=True)
class Holding:
    """The blocks of one shape of one parameter, and those of them that this rank owns."""

    shape: tuple[int, ...]
    count: int = 0
    """Blocks of this shape on all ranks."""
    places: list[int] = field(default_factory=list)
    """Positions of this rank's blocks among them, ascending."""
    indices: list[int] = field(default_factory=list)
    """Positions of this rank's blocks in the parameter's grid."""
    stack: int = 0
    """Stack with this rank's blocks, one after the other."""
    first: int = 0
    """Position of the first block in the stack."""

    @property
    def suffix(self) -> str:
        """Suffix of the state keys of these blocks."""
        return "x".join(map(str, self.shape))

    def part_of(self, stack: Tensor) -> Tensor:
        """State of this rank's blocks, ``(len(places), ...)``, as a view."""
        return stack[self.first : self.first + len(self.places)]


@dataclass(slots=True)
class Plan:
    """The blocks of all parameters with their owners, and this rank's part of the work."""

    params: list[Parameter]
    blocks: list[Block]
    stacks: list[Stack]
    buckets: list[Bucket]

    def holdings(self) -> list[list[Holding]]:
        """The blocks of each parameter by shape, and those of them that this rank owns."""
        found: list[dict[tuple[int, ...], Holding]] = [{} for _ in self.params]
        places = {}
        for block in self.blocks:
            holding = found[block.param].setdefault(block.shape, Holding(block.shape))
            places[block.param, block.index] = holding.count
            holding.count += 1
        for number, stack in enumerate(self.stacks):
            for position, block in enumerate(stack.blocks):
                holding = found[block.param][block.shape]
                if not holding.places:
                    holding.stack, holding.first = number, position
                holding.places.append(places[block.param, block.index])
                holding.indices.append(block.index)
        return [list(by_shape.values()) for by_shape in found]

    def facts(self) -> list[dict[str, object]]:
        """Description of each parameter that all ranks of its placement group must share."""
        found: list[dict[str, object]] = [
            {
                "block grid": param.grid,
                "sharding": param.sharding,
                "dtype of its blocks": param.dtype,
                "dtype of its messages": param.message_dtype,
            }
            for param in self.params
        ]
        for b in self.blocks:
            found[b.param][f"refresh slot and owner of block {b.index}"] = (
                b.slot,
                b.replica,
                b.shard,
            )
        return found


def make_plan(params: Sequence[Parameter], slots: Sequence[Sequence[int]] | None = None) -> Plan:
    """Plan of this rank for ``params``; only the rank's own part differs between ranks.

    Args:
        params: All parameters of this rank.
        slots: Refresh slot of every block of each parameter; None if no other rank has parameters
            that share the period.
    """
    params = list(params)
    blocks = assigned_blocks(params, slots)
    by_param: list[list[Block]] = [[] for _ in params]
    for block in blocks:
        by_param[block.param].append(block)
    stacks: list[Stack] = []
    buckets = []
    for members in bucket_members(params):
        first = params[members[0]]
        bucket = Bucket(first.placement_group, first.message_dtype, members, [])
        its_blocks = [block for param in members for block in by_param[param]]
        add_stacks(bucket, stacks, params, its_blocks)
        Traffic(params, its_blocks, bucket, stacks).fill_in()
        buckets.append(bucket)
    return Plan(params, blocks, stacks, buckets)


def bucket_members(params: Sequence[Parameter]) -> list[list[int]]:
    """Parameters by placement group and message dtype, in order, up to BUCKET_NUMEL elements."""
    buckets: list[list[int]] = []
    latest: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for number, param in enumerate(params):
        key = (param.placement_group.ranks, param.message_dtype)
        members, filled = latest.get(key, ([], 0))
        filled += math.prod(param.shape)
        is_alone = len(param.placement_group.ranks) * len(param.placement_group.ranks[0]) == 1
        if not members or not (is_alone or filled <= BUCKET_NUMEL):
            members, filled = [], math.prod(param.shape)
            buckets.append(members)
        members.append(number)
        latest[key] = members, filled
    return buckets
