"""Figures of owners about their blocks, shared with all ranks of the same placement group.

For reports on demand; no step needs them.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.plan import Plan


def values_of_owners(values: Tensor, plan: Plan) -> Tensor:
    """One number for each block of the plan, on every rank, ``(blocks,)``; a collective.

    Args:
        values: Non-negative; zero for a block that this rank does not own.
        plan: The plan of this rank.
    """
    shared_values = values.clone()
    for placement_group in {
        param.placement_group.ranks: param.placement_group for param in plan.params
    }.values():
        # Block numbers may differ between ranks, as other placement groups add blocks in between;
        # their order does not.
        shared = [
            plan.params[block.param].placement_group.ranks == placement_group.ranks
            for block in plan.blocks
        ]
        chosen = torch.tensor(shared, device=values.device)
        part = shared_values[chosen]
        for group in (placement_group.shard_group, placement_group.replica_group):
            if group is not None:
                dist.all_reduce(part, op=dist.ReduceOp.MAX, group=group)
        shared_values[chosen] = part
    return shared_values
