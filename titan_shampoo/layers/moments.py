"""Second moments of layers, summed up where they are needed: at the owners of blocks.

Every rank has formed moments of its own tokens. Those of the blocks of one owner are one sum, over
the ranks that have different tokens; nobody else stores them.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.plan import Block, Plan
from titan_shampoo.layers.layer import Layer

BlockKey = tuple[int, int]
"""Numbers of a layer and of its block."""


class Moments:
    """The moments of layers, block by block.

    Args:
        layers: In the plan's order.
        plan: Their blocks and owners.
        two_sided: Whether outputs have moments, too.
    """

    def __init__(self, layers: Sequence[Layer], plan: Plan, *, two_sided: bool) -> None:
        self.layers, self.plan, self.two_sided = layers, plan, two_sided

    def collect(self, chosen: Sequence[int]) -> None:
        """Have the backward passes of the next step form moments of the chosen layers alone."""
        wanted = set(chosen)
        for number, layer in enumerate(self.layers):
            assert layer.tapped is not None, "moments are of layers that are tapped"
            layer.tapped.collects_moments = number in wanted

    def collected(self) -> list[int]:
        """The layers whose moments have been formed since they were reset."""
        tapped = ((number, layer.tapped) for number, layer in enumerate(self.layers))
        return [number for number, one in tapped if one is not None and one.collects_moments]

    def of_owned_blocks(self, chosen: Sequence[int]) -> dict[BlockKey, list[Tensor]]:
        """For each block here of the chosen layers: number of rows, sums of right and left moment.

        One sum of all blocks for each owner, one owner after the other: nobody else keeps it.
        """
        wanted = set(chosen)
        by_owner: dict[Any, dict[int, list[Block]]] = defaultdict(lambda: defaultdict(list))
        for block in self.plan.blocks:
            layer = self.layers[block.param]
            if block.param in wanted:
                by_owner[layer.tile.token_group, layer.dtype][self._owner(block)].append(block)
        found: dict[BlockKey, list[Tensor]] = {}
        for (group, _), owned in by_owner.items():
            for owner, blocks in sorted(owned.items()):
                is_mine = self._is_mine(blocks[0])
                # Elsewhere, another token group has the same moments and this owner.
                if is_mine or (group is not None and owner in dist.get_process_group_ranks(group)):
                    sums = self._summed(group, owner, blocks)
                    found.update(sums if is_mine else {})
        return found

    def here(self) -> list[Tensor]:
        """What this rank's layers have summed since they were reset."""
        tapped = [layer.tapped for layer in self.layers if layer.tapped is not None]
        both = [moment for one in tapped for moment in (one.input_moment, one.output_moment)]
        return [moment for moment in both if moment is not None]

    def bounds(self) -> list[Tensor]:
        """Of the entries of what layers have summed and of its sums over ranks, 0-dim float32.

        No entry of a sum of ``g g^T`` is larger than its trace, and the trace is finite only if all
        are. Norms would square squares: those of the moments of gradients of 1e10 overflow.
        """
        found = []
        for layer in self.layers:
            tapped, group = layer.tapped, layer.tile.token_group
            if tapped is None:
                continue
            num_ranks = 1 if group is None else group.size()
            if tapped.input_moment is not None:
                found.append(tapped.input_moment.diagonal().sum().double() * num_ranks)
            if tapped.output_moment is not None:
                count = layer.options["loss_normaliser"] or tapped.input_sum[-1].clamp(min=1)
                trace = tapped.output_moment.diagonal().sum().double() * num_ranks
                found.append(trace.maximum(trace * count * num_ranks / layer.gradient_divisor**2))
        return [bound.to(torch.float32) for bound in found]

    def formed_bytes(self) -> int:
        """Bytes of the moments of all layers on this rank."""
        return sum(
            leaf.numel() * leaf.dtype.itemsize
            for layer in self.layers
            if layer.tapped is not None
            for leaf in (layer.tapped.leaves.input_moment, layer.tapped.leaves.output_moment)
            if leaf is not None
        )

    def sum_bytes(self) -> list[list[int]]:
        """Bytes of each layer's moments in the sum for each owner, ``[sum][layer]``."""
        sums: dict[Any, list[int]] = defaultdict(lambda: [0] * len(self.layers))
        for block in self.plan.blocks:
            layer, (height, width) = self.layers[block.param], block.extent
            numel = 1 + width**2 + self.two_sided * height**2
            sums[self._owner(block), layer.dtype][block.param] += numel * layer.dtype.itemsize
        return list(sums.values())

    def _owner(self, block: Block) -> int:
        """The rank that owns a block."""
        return self.layers[block.param].tile.placement_group.ranks[block.replica][block.shard]

    def _is_mine(self, block: Block) -> bool:
        """Whether this rank owns a block."""
        placement_group = self.layers[block.param].tile.placement_group
        return (block.replica, block.shard) == (placement_group.replica, placement_group.shard)

    def _summed(
        self, group: dist.ProcessGroup | None, owner: int, blocks: Sequence[Block]
    ) -> dict[BlockKey, list[Tensor]]:
        """The sums of some blocks over ``group``; complete on their owner alone."""
        own = [list(self._parts(block)) for block in blocks]
        flat = torch.cat([part.reshape(-1) for parts in own for part in parts])
        if group is not None:
            dist.reduce(flat, dst=owner, group=group)
        pieces = iter(flat.split([part.numel() for parts in own for part in parts]))
        return {
            (block.param, block.index): [next(pieces).view(part.shape) for part in parts]
            for block, parts in zip(blocks, own, strict=True)
        }

    def _parts(self, block: Block) -> Iterator[Tensor]:
        """What this rank has summed for one block: rows, right moment, left moment."""
        layer = self.layers[block.param]
        tapped = layer.tapped
        assert tapped is not None
        (row, column), (height, width) = block.start, block.extent
        right = tapped.input_moment
        assert right is not None, "moments are collected in steps that accumulate"
        yield tapped.input_sum[-1:].to(layer.dtype)
        yield right[column : column + width, column : column + width].to(layer.dtype)
        if self.two_sided:
            left = tapped.output_moment
            assert left is not None
            yield left[row : row + height, row : row + height].to(layer.dtype)
