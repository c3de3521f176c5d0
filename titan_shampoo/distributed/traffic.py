"""This rank's part of the work: its stacks, and the copies and message sizes of each bucket."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from titan_shampoo.distributed.blocks import Block, Parameter
from titan_shampoo.distributed.copies import Copy, Memory, Piece, View, coalesce, pieces
from titan_shampoo.distributed.layout import PlacementGroup

Packet = tuple[Block, Piece, View]
"""A piece of a block, and its place in a message."""


@dataclass(slots=True)
class Stack:
    """Blocks of one shape that this rank owns, computed together as ``(len(blocks), *shape)``."""

    group: int
    shape: tuple[int, ...]
    blocks: list[Block] = field(default_factory=list)


@dataclass(slots=True)
class Bucket:
    """Parameters whose blocks travel together, with their copies and message sizes."""

    placement_group: PlacementGroup
    dtype: torch.dtype
    params: list[int]
    stacks: list[int]
    """Positions in the plan's list of stacks."""
    gather: list[Copy] = field(default_factory=list)
    """Gradient shards to stacks and outbox."""
    unpack: list[Copy] = field(default_factory=list)
    """Inbox to stacks; reversed for the directions."""
    share: list[Copy] = field(default_factory=list)
    """Stacks of blocks inside this shard to this replica's row of the gather buffer."""
    scatter: list[Copy] = field(default_factory=list)
    """Stacks (one replica), outbox and gather buffer to direction shards."""
    outbox_splits: list[int] = field(default_factory=list)
    """Elements sent to each shard of this replica."""
    inbox_splits: list[int] = field(default_factory=list)
    """Elements received from each shard of this replica."""
    gather_width: int = 0
    """Elements that each replica contributes to the all-gather, padding included."""
    travels: bool = False
    """True if any rank of the placement group sends or receives gradient pieces."""


def add_stacks(
    bucket: Bucket, stacks: list[Stack], params: Sequence[Parameter], blocks: list[Block]
) -> None:
    """One stack per group, block shape and dtype for the blocks that this rank owns."""
    me = (bucket.placement_group.replica, bucket.placement_group.shard)
    numbers: dict[tuple[int, tuple[int, ...], torch.dtype], int] = {}
    for block in blocks:
        if (block.replica, block.shard) != me:
            continue
        param = params[block.param]
        key = (param.group, block.shape, param.dtype)
        if key not in numbers:
            numbers[key] = len(stacks)
            stacks.append(Stack(param.group, block.shape))
        stacks[numbers[key]].blocks.append(block)
    bucket.stacks = list(numbers.values())


class Traffic:
    """The copies and message sizes of this rank for one bucket."""

    def __init__(
        self, params: Sequence[Parameter], blocks: list[Block], bucket: Bucket, stacks: list[Stack]
    ) -> None:
        placement_group = bucket.placement_group
        self.params, self.bucket = params, bucket
        self.travels = any(block.is_cut for block in blocks)
        self.here = [block for block in blocks if placement_group.shard in block.shards]
        """Blocks with a part on this rank."""
        self.mine = [
            b
            for b in blocks
            if (b.replica, b.shard) == (placement_group.replica, placement_group.shard)
        ]
        """Blocks that this rank owns."""
        self.places = {
            (block.param, block.index): (("stack", number), position * block.numel)
            for number in bucket.stacks
            for position, block in enumerate(stacks[number].blocks)
        }

    def fill_in(self) -> None:
        """Compute all fields of the bucket."""
        bucket, placement_group = self.bucket, self.bucket.placement_group
        bucket.travels = self.travels
        outboxes = [self.outbox(replica) for replica in range(placement_group.num_replicas)]
        residents = [
            self.resident(replica, sum(splits)) for replica, (_, splits) in enumerate(outboxes)
        ]
        sent, bucket.outbox_splits = outboxes[placement_group.replica]
        received, bucket.inbox_splits = self.inbox()
        resident = residents[placement_group.replica]
        bucket.gather = [
            Copy(self.shard(b), p.in_shard, ("outbox", 0), view) for b, p, view in sent
        ]
        bucket.unpack = [Copy(("inbox", 0), view, *self.place(b, p)) for b, p, view in received]
        local = [Copy(self.shard(b), p.in_shard, *self.place(b, p)) for b, p, _ in resident]
        if placement_group.num_replicas == 1:
            bucket.scatter = [copy.reversed() for copy in bucket.gather + local]
        else:
            bucket.share = [Copy(*self.place(b, p), ("gathered", placement_group.replica), view)
                            for b, p, view in resident]  # fmt: skip
            buffers = [[*box, *rest] for (box, _), rest in zip(outboxes, residents, strict=True)]
            bucket.gather_width = max(sum(p.numel for _, p, _ in buffer) for buffer in buffers)
            bucket.scatter = [
                Copy(("gathered", replica), view, self.shard(b), p.in_shard)
                for replica, buffer in enumerate(buffers)
                for b, p, view in buffer
            ]
        bucket.gather += local
        for name in ("gather", "unpack", "share", "scatter"):
            setattr(bucket, name, coalesce(getattr(bucket, name)))

    def shard(self, block: Block) -> Memory:
        """This rank's shard of the parameter of ``block``."""
        return ("param", block.param)

    def place(self, block: Block, piece: Piece) -> tuple[Memory, View]:
        """Place of a piece of a block that this rank owns, in its stack."""
        memory, offset = self.places[block.param, block.index]
        return memory, piece.in_block.shifted(offset)

    def outbox(self, replica: int) -> tuple[list[Packet], list[int]]:
        """Pieces of this shard that travel to owners in ``replica``; elements for each owner."""
        placement_group = self.bucket.placement_group
        cut = [block for block in self.here if block.is_cut and block.replica == replica]
        splits = [0] * placement_group.num_shards
        packets: list[Packet] = []
        filled = 0
        for block in sorted(cut, key=lambda block: block.shard):
            for piece in self._pieces(block, placement_group.shard):
                packets.append((block, piece, piece.packed(filled)))
                splits[block.shard] += piece.numel
                filled += piece.numel
        return packets, splits

    def inbox(self) -> tuple[list[Packet], list[int]]:
        """Pieces of blocks that come to this rank, by shard; elements from each shard."""
        splits = [0] * self.bucket.placement_group.num_shards
        packets: list[Packet] = []
        filled = 0
        arriving = [(shard, b) for b in self.mine if b.is_cut for shard in b.shards]
        for shard, block in sorted(arriving, key=lambda pair: pair[0]):
            for piece in self._pieces(block, shard):
                packets.append((block, piece, piece.packed(filled)))
                splits[shard] += piece.numel
                filled += piece.numel
        return packets, splits

    def resident(self, replica: int, offset: int) -> list[Packet]:
        """Blocks inside this shard with their owner in ``replica``, packed from ``offset``."""
        packets: list[Packet] = []
        for block in self.here:
            if not block.is_cut and block.replica == replica:
                for piece in self._pieces(block, self.bucket.placement_group.shard):
                    packets.append((block, piece, piece.packed(offset)))
                    offset += piece.numel
        return packets

    def _pieces(self, block: Block, shard: int) -> list[Piece]:
        return pieces(self.params[block.param].region(shard), block.start, block.extent)
