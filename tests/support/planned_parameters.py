"""Parameters as the plan sees them, on ranks that need not exist, and shapes of known models."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch

from titan_shampoo.distributed.blocks import Alignment, Block, Cost, Parameter
from titan_shampoo.distributed.geometry import make_grid
from titan_shampoo.distributed.layout import PlacementGroup, Sharding
from titan_shampoo.functional.shampoo import ShampooRule
from titan_shampoo.models.resnet import ResNet, ResNetArgs

PERIOD = 10
_OPTIONS: dict[str, Any] = {
    "exponent": None, "betas": (0.9, 0.999), "grafting": "adam", "root_method": "eigh",
}  # fmt: skip


@cache
def shampoo_cost(shape: tuple[int, ...]) -> Cost:
    return Cost(*ShampooRule().cost(shape, _OPTIONS))


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of its convolutions, and of its last layer."""
    with torch.device("meta"):
        model = ResNet(ResNetArgs(depth=50))
    return [tuple(p.shape) for p in model.parameters() if p.ndim > 1]


def llama_8b() -> list[tuple[int, ...]]:
    """Shapes of the matrices of its layers; embedding and head are left to the fallback."""
    attention: list[tuple[int, ...]] = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
    return 32 * [*attention, (14336, 4096), (4096, 14336), (14336, 4096)]


def fsdp_parameters(
    shapes: Iterable[tuple[int, ...]],
    num_shards: int,
    *,
    block_size: int | tuple[int, int],
    num_replicas: int = 1,
    me: tuple[int, int] = (0, 0),
    alignment: Alignment = "global",
) -> list[Parameter]:
    """Parameters cut along their rows; ``me`` is this rank's (replica, shard)."""
    ranks = torch.arange(num_replicas * num_shards).view(num_replicas, num_shards)
    placement_group = PlacementGroup(tuple(map(tuple, ranks.tolist())), *me, None, None)
    sharding = Sharding((num_shards,), ((0, 0),))
    params = []
    for number, shape in enumerate(shapes):
        grid = make_grid(shape, block_size=block_size)
        if alignment == "shard":
            grid = grid.cut_at(sharding.edges(shape, grid))
        params.append(
            Parameter(str(number), shape, grid, placement_group, sharding, 0, torch.float32, PERIOD,
                      shampoo_cost, alignment)
        )  # fmt: skip
    return params


def loads(params: Sequence[Parameter], blocks: Sequence[Block]) -> torch.Tensor:
    """Operations of every rank in each step of the period, ``(period, ranks)``, float64."""
    placement_group = params[0].placement_group
    found = torch.zeros(
        PERIOD, len(placement_group.ranks) * len(placement_group.ranks[0]), dtype=torch.float64
    )
    for block in blocks:
        owner = placement_group.ranks[block.replica][block.shard]
        cost = shampoo_cost(block.shape)
        found[:, owner] += cost.step
        found[block.slot, owner] += cost.refresh
    return found
