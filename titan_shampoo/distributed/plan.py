"""Who does what in a step: one list of blocks, the owner of each, and the copies that move them.

Every rank computes the plan from names, shapes, placements and configuration alone. A block inside
one shard is worked on where it lies; a block cut by shard edges travels to its owner, and its
direction comes back; replicas divide their blocks and share the directions.

    gradient shard -> stack                                     block inside this shard, owned here
    gradient shard -> outbox -> all-to-all -> inbox -> stack    block cut by a shard edge
    stack -> inbox -> all-to-all -> outbox                      its direction, back
    stack, outbox -> shelf -> all-gather over replicas -> direction shard
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from titan_shampoo.distributed.assignment import assign_owners, refresh_turns
from titan_shampoo.distributed.copies import Copy, Memory, Piece, View, coalesce, pieces
from titan_shampoo.distributed.geometry import Grid
from titan_shampoo.distributed.layout import Region, Sharding, Team

BUCKET_NUMEL = 1 << 25
"""Elements of gradient in one bucket: what one exchange moves while another bucket is worked on."""


class Cost(NamedTuple):
    """Floating-point operations for one block."""

    step: float
    """In every step: factors and direction."""
    refresh: float
    """In a step that refreshes the block."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """What the plan needs to know of a parameter."""

    name: str
    shape: tuple[int, ...]
    grid: Grid
    team: Team
    sharding: Sharding
    group: int
    """Number of the parameter group; blocks of different groups are never stacked together."""
    dtype: torch.dtype
    """Dtype in which its blocks are worked on and travel."""
    period: int
    """Steps between two refreshes of a block."""
    cost: Callable[[tuple[int, ...]], Cost]
    """Cost of a block of the given shape."""

    def region(self, shard: int) -> Region:
        """The part that shard number ``shard`` holds."""
        return self.sharding.region(self.shape, self.grid, shard)


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
    """Extent without batch dims: what the mathematics sees."""
    turn: int
    """Step of the refresh period in which the block is due."""
    shards: tuple[int, ...]
    """Shards that hold a part of it."""
    replica: int
    """Row of the owner in the team."""
    shard: int
    """Column of the owner in the team."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.extent)

    @property
    def is_cut(self) -> bool:
        """Whether it travels to its owner."""
        return self.shards != (self.shard,)


@dataclass(slots=True)
class Stack:
    """Blocks of one shape that this rank owns, worked on together as ``(len(blocks), *shape)``."""

    group: int
    shape: tuple[int, ...]
    blocks: list[Block] = field(default_factory=list)


@dataclass(slots=True)
class Bucket:
    """Parameters whose blocks travel together, and how."""

    team: Team
    dtype: torch.dtype
    params: list[int]
    stacks: list[int]
    """Positions in the plan's list of stacks."""
    gather: list[Copy] = field(default_factory=list)
    """Gradient shards to stacks and outbox."""
    unpack: list[Copy] = field(default_factory=list)
    """Inbox to stacks; reversed on the way back."""
    share: list[Copy] = field(default_factory=list)
    """Stacks of blocks inside this shard to the rest of this replica's part of the shelf."""
    scatter: list[Copy] = field(default_factory=list)
    """Stacks (one replica), outbox and shelf to direction shards."""
    outbox_splits: list[int] = field(default_factory=list)
    """Elements sent to each shard of this replica."""
    inbox_splits: list[int] = field(default_factory=list)
    """Elements received from each shard of this replica."""
    shelf_width: int = 0
    """Elements that each replica contributes to the all-gather, padding included."""
    travels: bool = False
    """Whether any rank of the team sends or receives gradient pieces."""


@dataclass(slots=True)
class Plan:
    """The blocks of all parameters with their owners, and this rank's part of the work."""

    params: list[Parameter]
    blocks: list[Block]
    stacks: list[Stack]
    buckets: list[Bucket]

    def digest(self, team: Team) -> int:
        """Hash of all that the ranks of ``team`` must agree on, in [0, 2^62)."""
        shared = [param.team.ranks == team.ranks for param in self.params]
        params = [
            (p.name, p.shape, p.grid, p.period) for p in itertools.compress(self.params, shared)
        ]
        blocks = [block for block in self.blocks if shared[block.param]]
        # Numbers of parameters may differ: other teams' come between.
        places = [(b.index, b.turn, b.shards, b.replica, b.shard) for b in blocks]
        text = repr((params, places)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 2


def make_plan(params: Sequence[Parameter]) -> Plan:
    """The plan of this rank for ``params``; the same on all ranks but for the rank's own part."""
    params = list(params)
    blocks = _assigned(params, _all_blocks(params))
    by_param: list[list[Block]] = [[] for _ in params]
    for block in blocks:
        by_param[block.param].append(block)
    stacks: list[Stack] = []
    buckets = []
    for members in _bucket_members(params):
        first = params[members[0]]
        bucket = Bucket(first.team, first.dtype, members, [])
        its_blocks = [block for param in members for block in by_param[param]]
        _add_stacks(bucket, stacks, params, its_blocks)
        _Traffic(params, its_blocks, bucket, stacks).fill_in()
        buckets.append(bucket)
    return Plan(params, blocks, stacks, buckets)


def _all_blocks(params: Sequence[Parameter]) -> list[Block]:
    """All blocks with their refresh turns, owners not yet chosen."""
    blocks = []
    for number, param in enumerate(params):
        regions = [param.region(shard) for shard in range(param.team.num_shards)]
        for index, position in enumerate(param.grid.positions()):
            start, extent = param.grid.block_start(position), param.grid.block_extent(position)
            shards = tuple(
                s for s, region in enumerate(regions) if _overlaps(region, start, extent)
            )
            shape = param.grid.block_shape(position)
            blocks.append(Block(number, index, start, extent, shape, 0, shards, 0, 0))
    return blocks


def _overlaps(region: Region, start: tuple[int, ...], extent: tuple[int, ...]) -> bool:
    return all(
        any(a < first + length and first < b for a, b in intervals)
        for intervals, first, length in zip(region, start, extent, strict=True)
    )


def _assigned(params: Sequence[Parameter], blocks: list[Block]) -> list[Block]:
    """The blocks with turns and owners."""
    costs = [params[block.param].cost(block.shape) for block in blocks]
    turns = [0] * len(blocks)
    loads: dict[int, list[float]] = {}
    # Group by group: a group that is added later must not move the turns of those before.
    for period, group in sorted({(param.period, param.group) for param in params}):
        claims = [(params[block.param].period, params[block.param].group) for block in blocks]
        chosen = [i for i, claim in enumerate(claims) if claim == (period, group)]
        load = loads.setdefault(period, [0.0] * period)
        spread = refresh_turns([costs[i].refresh for i in chosen], load)
        for i, turn in zip(chosen, spread, strict=True):
            turns[i] = turn
    candidates = []
    for block in blocks:
        ranks = params[block.param].team.ranks
        candidates.append([row[shard] for row in ranks for shard in block.shards])
    rates = [cost.step + cost.refresh / params[block.param].period
             for cost, block in zip(costs, blocks, strict=True)]  # fmt: skip
    num_ranks = 1 + max((rank for ranks in candidates for rank in ranks), default=0)
    owners = assign_owners(rates, candidates, num_ranks)
    return [
        _with_owner(block, turn, owner, params[block.param].team)
        for block, turn, owner in zip(blocks, turns, owners, strict=True)
    ]


def _with_owner(block: Block, turn: int, owner: int, team: Team) -> Block:
    replica = next(r for r, row in enumerate(team.ranks) if owner in row)
    shard = team.ranks[replica].index(owner)
    return Block(block.param, block.index, block.start, block.extent, block.shape,
                 turn, block.shards, replica, shard)  # fmt: skip


def _bucket_members(params: Sequence[Parameter]) -> list[list[int]]:
    """Parameters of one team and dtype, in order, of at most BUCKET_NUMEL elements together."""
    buckets: list[list[int]] = []
    latest: dict[tuple[object, ...], int] = {}
    for number, param in enumerate(params):
        key = (param.team.ranks, param.dtype)
        if key in latest:
            members = buckets[latest[key]]
            numel = sum(math.prod(params[i].shape) for i in [*members, number])
            if len(param.team.ranks) * len(param.team.ranks[0]) == 1 or numel <= BUCKET_NUMEL:
                members.append(number)
                continue
        latest[key] = len(buckets)
        buckets.append([number])
    return buckets


def _add_stacks(
    bucket: Bucket, stacks: list[Stack], params: Sequence[Parameter], blocks: list[Block]
) -> None:
    """One stack per group and block shape for the blocks that this rank owns."""
    me = (bucket.team.replica, bucket.team.shard)
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    for block in blocks:
        if (block.replica, block.shard) != me:
            continue
        key = (params[block.param].group, block.shape)
        if key not in numbers:
            numbers[key] = len(stacks)
            stacks.append(Stack(*key))
        stacks[numbers[key]].blocks.append(block)
    bucket.stacks = list(numbers.values())


class _Traffic:
    """The copies and message sizes of this rank for one bucket."""

    def __init__(
        self, params: Sequence[Parameter], blocks: list[Block], bucket: Bucket, stacks: list[Stack]
    ) -> None:
        self.params, self.blocks, self.bucket = params, blocks, bucket
        self.places = {
            (block.param, block.index): (("stack", number), position * block.numel)
            for number in bucket.stacks
            for position, block in enumerate(stacks[number].blocks)
        }

    def fill_in(self) -> None:
        """Complete the bucket."""
        bucket, team = self.bucket, self.bucket.team
        bucket.travels = any(block.is_cut for block in self.blocks)
        sent, bucket.outbox_splits = self.outbox(team.replica)
        received, bucket.inbox_splits = self.inbox()
        resident = self.resident(team.replica)
        bucket.gather = [
            Copy(self.shard(b), p.in_shard, ("outbox", 0), view) for b, p, view in sent
        ]
        bucket.unpack = [Copy(("inbox", 0), view, *self.place(b, p)) for b, p, view in received]
        local = [Copy(self.shard(b), p.in_shard, *self.place(b, p)) for b, p, _ in resident]
        if team.num_replicas == 1:
            bucket.scatter = [copy.reversed() for copy in bucket.gather + local]
        else:
            bucket.share = [Copy(*self.place(b, p), ("shelf", team.replica), view)
                            for b, p, view in resident]  # fmt: skip
            bucket.shelf_width = max(map(self.shelf_length, range(team.num_replicas)))
            for replica in range(team.num_replicas):
                shelf = ("shelf", replica)
                packets = self.outbox(replica)[0] + self.resident(replica)
                bucket.scatter += [Copy(shelf, v, self.shard(b), p.in_shard) for b, p, v in packets]
        bucket.gather += local
        for name in ("gather", "unpack", "share", "scatter"):
            setattr(bucket, name, coalesce(getattr(bucket, name)))

    def shard(self, block: Block) -> Memory:
        """This rank's shard of the parameter of ``block``."""
        return ("param", block.param)

    def place(self, block: Block, piece: Piece) -> tuple[Memory, View]:
        """Where a piece of a block that this rank owns lies in its stack."""
        memory, offset = self.places[block.param, block.index]
        return memory, piece.in_block.shifted(offset)

    def outbox(self, replica: int) -> tuple[list[tuple[Block, Piece, View]], list[int]]:
        """Pieces of this shard that travel to owners in ``replica``; elements for each owner."""
        team = self.bucket.team
        packets: list[tuple[Block, Piece, View]] = []
        splits = [0] * team.num_shards
        cut = [block for block in self.blocks if block.is_cut and block.replica == replica]
        for block in sorted(cut, key=lambda block: block.shard):
            region = self.params[block.param].region(team.shard)
            for piece in pieces(region, block.start, block.extent):
                packets.append((block, piece, piece.packed(sum(splits))))
                splits[block.shard] += piece.numel
        return packets, splits

    def inbox(self) -> tuple[list[tuple[Block, Piece, View]], list[int]]:
        """Pieces of cut blocks that this rank owns, by their shard; elements from each shard."""
        team = self.bucket.team
        packets: list[tuple[Block, Piece, View]] = []
        splits = [0] * team.num_shards
        mine = [b for b in self.blocks
                if b.is_cut and (b.replica, b.shard) == (team.replica, team.shard)]  # fmt: skip
        for shard, block in itertools.product(range(team.num_shards), mine):
            for piece in pieces(self.params[block.param].region(shard), block.start, block.extent):
                packets.append((block, piece, piece.packed(sum(splits))))
                splits[shard] += piece.numel
        return packets, splits

    def resident(self, replica: int) -> list[tuple[Block, Piece, View]]:
        """Blocks inside this shard that ``replica`` works on; on its shelf, behind the outbox."""
        team = self.bucket.team
        packets = []
        offset = sum(self.outbox(replica)[1])
        for block in self.blocks:
            if not block.is_cut and (block.replica, block.shard) == (replica, team.shard):
                region = self.params[block.param].region(team.shard)
                for piece in pieces(region, block.start, block.extent):
                    packets.append((block, piece, piece.packed(offset)))
                    offset += piece.numel
        return packets

    def shelf_length(self, replica: int) -> int:
        """Elements that ``replica`` has to share with the other replicas of this shard."""
        packets = self.outbox(replica)[0] + self.resident(replica)
        return sum(piece.numel for _, piece, _ in packets)
