"""Moves gradients to the stacks of their owners and directions back, as the plan says.

Knows no mathematics. Message sizes are planned, so every rank makes the same collectives in the
same order whether or not it owns anything.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.copies import Copy, Memory, View
from titan_shampoo.distributed.traffic import Bucket

# Renamed in torch 2.13; the old name warns there.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Exchange:
    """One bucket under way: gradients in, directions out.

    Call ``gather``, ``stacks``, ``scatter``, ``finish`` in this order; the collectives of
    ``gather`` and ``scatter`` run while other buckets are worked on.
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self._bucket = bucket
        team, dtype = bucket.team, bucket.dtype
        self._inbox = torch.empty(sum(bucket.inbox_splits), dtype=dtype, device=device)
        sent = sum(bucket.outbox_splits)
        # The part of this replica is written in place, outbox first: directions return to where
        # they left.
        width = max(bucket.shelf_width, sent)
        self._shelf = torch.empty(team.num_replicas, width, dtype=dtype, device=device)
        self._outbox = self._shelf[team.replica, :sent]
        self._work: dist.Work | None = None

    def gather(self, grads: Mapping[int, Tensor], stacks: Mapping[int, Tensor]) -> None:
        """Send the gradient shards on their way; ``grads`` and ``stacks`` are flat, by number."""
        run(self._bucket.gather, self._memory(grads, stacks))
        self._work = self._all_to_all(self._inbox, self._outbox, forth=True)

    def fill_stacks(self, stacks: Mapping[int, Tensor]) -> None:
        """Wait for the pieces of cut blocks and put them in their stacks."""
        self._wait()
        run(self._bucket.unpack, self._memory({}, stacks))

    def scatter(self, stacks: Mapping[int, Tensor]) -> None:
        """Send the directions in ``stacks`` on their way."""
        memory = self._memory({}, stacks)
        run((copy.reversed() for copy in self._bucket.unpack), memory)
        run(self._bucket.share, memory)
        self._work = self._all_to_all(self._outbox, self._inbox, forth=False)
        group = self._bucket.team.replica_group
        if group is not None and self._bucket.shelf_width > 0:
            self._wait()
            mine = self._shelf[self._bucket.team.replica].clone()
            self._work = all_gather(self._shelf.view(-1), mine, group=group, async_op=True)

    def finish(self, directions: Mapping[int, Tensor], stacks: Mapping[int, Tensor]) -> None:
        """Wait, and write this rank's shards of the directions, flat, by parameter number."""
        self._wait()
        run(self._bucket.scatter, self._memory(directions, stacks))

    def _memory(
        self, shards: Mapping[int, Tensor], stacks: Mapping[int, Tensor]
    ) -> dict[Memory, Tensor]:
        memory = {("inbox", 0): self._inbox, ("outbox", 0): self._outbox}
        memory |= {("shelf", replica): part for replica, part in enumerate(self._shelf)}
        memory |= {("param", number): shard for number, shard in shards.items()}
        memory |= {("stack", number): stacks[number].view(-1) for number in self._bucket.stacks}
        return memory

    def _all_to_all(self, output: Tensor, source: Tensor, *, forth: bool) -> dist.Work | None:
        if not self._bucket.travels:
            return None
        splits = [self._bucket.inbox_splits, self._bucket.outbox_splits]
        outputs, inputs = splits if forth else splits[::-1]
        group = self._bucket.team.shard_group
        return dist.all_to_all_single(output, source, outputs, inputs, group=group, async_op=True)

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


def run(copies: Iterable[Copy], memory: Mapping[Memory, Tensor]) -> None:
    """Do the copies; a shard that is not there counts as zero, and is not written.

    That keeps message sizes as planned when a parameter has no gradient.
    """
    for copy in copies:
        source, target = memory.get(copy.source), memory.get(copy.target)
        if target is None:
            continue
        if source is None:
            _view(target, copy.target_view).zero_()
        else:
            _view(target, copy.target_view).copy_(_view(source, copy.source_view))


def _view(flat: Tensor, view: View) -> Tensor:
    return flat.as_strided(view.size, view.stride, flat.storage_offset() + view.offset)
