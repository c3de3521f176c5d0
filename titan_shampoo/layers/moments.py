"""Second moments of layers, summed up where they are needed: at the owners of blocks.

Every rank has formed moments of its own tokens. Those of the blocks of one owner are one sum, over
the ranks that have different tokens; nobody else stores them.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.plan import Block, Plan
from titan_shampoo.layers.layer import Layer

BlockKey = tuple[int, int]
"""Numbers of a layer and of its block."""


class Sums(NamedTuple):
    """The moments of some blocks on their way to their owner."""

    blocks: Sequence[Block]
    flat: Tensor
    """All parts of all blocks."""
    shapes: list[torch.Size]
    """Of the parts."""


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

        One sum of all blocks for each owner; all of them are on their way together.
        """
        wanted = set(chosen)
        by_owner: dict[Any, dict[int, list[Block]]] = defaultdict(lambda: defaultdict(list))
        for block in self.plan.blocks:
            layer = self.layers[block.param]
            owner = layer.tile.team.ranks[block.replica][block.shard]
            if block.param in wanted:
                by_owner[layer.tile.token_group, layer.dtype][owner].append(block)
        under_way: list[Sums] = []
        for (group, _), owned in by_owner.items():
            for owner, blocks in sorted(owned.items()):
                # Elsewhere, another token group has the same moments and this owner.
                if self._sums_up_for(group, owner, blocks):
                    under_way.append(self._begun(group, owner, blocks))
        return {key: parts for sums in under_way for key, parts in self._completed(sums)}

    def here(self) -> list[Tensor]:
        """What this rank's layers have summed since they were reset."""
        tapped = [layer.tapped for layer in self.layers if layer.tapped is not None]
        both = [moment for one in tapped for moment in (one.input_moment, one.output_moment)]
        return [moment for moment in both if moment is not None]

    def _sums_up_for(
        self, group: dist.ProcessGroup | None, owner: int, blocks: Sequence[Block]
    ) -> bool:
        if group is not None:
            return owner in dist.get_process_group_ranks(group)
        team = self.layers[blocks[0].param].tile.team
        return (blocks[0].replica, blocks[0].shard) == (team.replica, team.shard)

    def _begun(self, group: dist.ProcessGroup | None, owner: int, blocks: Sequence[Block]) -> Sums:
        """Begin to sum up some blocks over ``group``."""
        parts = [part for block in blocks for part in self._parts(block)]
        flat = torch.cat([part.reshape(-1) for part in parts])
        if group is not None:
            dist.reduce(flat, dst=owner, group=group)
        return Sums(blocks, flat, [part.shape for part in parts])

    def _completed(self, sums: Sums) -> Iterator[tuple[BlockKey, list[Tensor]]]:
        """The sums of each block, complete on its owner alone."""
        parts = zip(sums.flat.split([s.numel() for s in sums.shapes]), sums.shapes, strict=True)
        count = 3 if self.two_sided else 2
        for block in sums.blocks:
            own = [part.view(shape) for part, shape in itertools.islice(parts, count)]
            yield (block.param, block.index), own

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
