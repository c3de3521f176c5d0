"""Messages of a step: gradients to the stacks of the owners, and directions back.

No mathematics here. Message sizes are planned, so every rank makes the same collectives in the
same order, with blocks of its own or without.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.copies import Copy, Memory, View
from titan_shampoo.distributed.traffic import Bucket

# Renamed in torch 2.13, where the old name warns.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def exchange_in_turn(
    buckets: Sequence[Bucket],
    device: torch.device,
    grads: Mapping[int, Tensor],
    stacks: Mapping[int, Tensor],
    directions: Mapping[int, Tensor],
    replace: Callable[[int], None],
) -> None:
    """Send gradients to the owners, bucket by bucket, and directions back.

    While a bucket is computed, the gradients of the next one and the directions of the previous one
    travel. At most three buckets have message buffers at a time.

    Args:
        buckets: Buckets of the plan, in the order of the collectives on all ranks.
        device: Device of all memory.
        grads: This rank's shards of the gradients, flat, by parameter number.
        stacks: Memory for the blocks that this rank owns, flat, by number of the stack.
        directions: Memory for this rank's shards of the directions, flat, by parameter number.
        replace: Replaces the gradients in a stack by directions.
    """

    def begun(bucket: Bucket) -> Exchange:
        exchange = Exchange(bucket, device)
        exchange.gather(grads, stacks)
        return exchange

    ahead = map(begun, buckets)
    coming, returning = next(ahead, None), None
    while coming is not None:
        current, coming = coming, next(ahead, None)
        current.fill_stacks(stacks)
        for number in current.bucket.stacks:
            replace(number)
        if returning is not None:
            returning.finish(directions, stacks)
        returning = current  # frees the buffers of the bucket before
        returning.scatter(stacks)
    if returning is not None:
        returning.finish(directions, stacks)


class Exchange:
    """The messages of one bucket: gradients in, directions out.

    Call ``gather``, ``fill_stacks``, ``scatter``, ``finish`` in this order. The collectives of
    ``gather`` and ``scatter`` run while other buckets are computed.
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self.bucket = bucket
        placement_group, dtype = bucket.placement_group, bucket.dtype
        self._inbox = torch.empty(sum(bucket.inbox_splits), dtype=dtype, device=device)
        sent = sum(bucket.outbox_splits)
        # This replica's row of the gather buffer starts with the outbox, so that the directions of
        # cut blocks return to their place in it.
        width = max(bucket.gather_width, sent)
        self._gather_buffer = torch.empty(
            placement_group.num_replicas, width, dtype=dtype, device=device
        )
        self._outbox = self._gather_buffer[placement_group.replica, :sent]
        self._work: dist.Work | None = None

    def gather(self, grads: Mapping[int, Tensor], stacks: Mapping[int, Tensor]) -> None:
        """Start to send the gradient shards; ``grads`` and ``stacks`` are flat, by number."""
        run(self.bucket.gather, self._memory(grads, stacks))
        self._work = self._all_to_all(self._inbox, self._outbox, forth=True)

    def fill_stacks(self, stacks: Mapping[int, Tensor]) -> None:
        """Wait for the pieces of cut blocks and copy them to their stacks."""
        self._wait()
        run(self.bucket.unpack, self._memory({}, stacks))

    def scatter(self, stacks: Mapping[int, Tensor]) -> None:
        """Start to send the directions in ``stacks``."""
        memory = self._memory({}, stacks)
        run((copy.reversed() for copy in self.bucket.unpack), memory)
        run(self.bucket.share, memory)
        self._work = self._all_to_all(self._outbox, self._inbox, forth=False)
        group = self.bucket.placement_group.replica_group
        if group is not None and self.bucket.gather_width > 0:
            self._wait()
            mine = self._gather_buffer[self.bucket.placement_group.replica].clone()
            self._work = all_gather(self._gather_buffer.view(-1), mine, group=group, async_op=True)

    def finish(self, directions: Mapping[int, Tensor], stacks: Mapping[int, Tensor]) -> None:
        """Wait, then write this rank's shards of the directions, flat, by parameter number."""
        self._wait()
        run(self.bucket.scatter, self._memory(directions, stacks))

    def _memory(
        self, shards: Mapping[int, Tensor], stacks: Mapping[int, Tensor]
    ) -> dict[Memory, Tensor]:
        memory = {("inbox", 0): self._inbox, ("outbox", 0): self._outbox}
        memory |= {("gathered", replica): part for replica, part in enumerate(self._gather_buffer)}
        memory |= {("param", number): shard for number, shard in shards.items()}
        memory |= {("stack", number): stacks[number] for number in self.bucket.stacks}
        return memory

    def _all_to_all(self, output: Tensor, source: Tensor, *, forth: bool) -> dist.Work | None:
        if not self.bucket.travels:
            return None
        splits = [self.bucket.inbox_splits, self.bucket.outbox_splits]
        outputs, inputs = splits if forth else splits[::-1]
        group = self.bucket.placement_group.shard_group
        return dist.all_to_all_single(output, source, outputs, inputs, group=group, async_op=True)

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


def run(copies: Iterable[Copy], memory: Mapping[Memory, Tensor]) -> None:
    """Run the copies; a missing shard is read as zeros and not written.

    Message sizes therefore stay as planned when a parameter has no gradient.
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
