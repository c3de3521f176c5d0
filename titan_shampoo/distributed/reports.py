"""What owners know of their blocks, told to all ranks that hold a part of the same parameters.

For figures that a person asks for now and then; no step needs them.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.plan import Plan


def told_by_owners(values: Tensor, plan: Plan) -> Tensor:
    """One number for each block of the plan, on every rank, ``(blocks,)``; every rank must ask.

    Args:
        values: At least zero; zero for a block that this rank does not own.
        plan: This rank's.
    """
    told = values.clone()
    for team in {param.team.ranks: param.team for param in plan.params}.values():
        # Numbers of blocks may differ between ranks, as other teams' come between; order does not.
        shared = [plan.params[block.param].team.ranks == team.ranks for block in plan.blocks]
        chosen = torch.tensor(shared, device=values.device)
        part = told[chosen]
        for group in (team.shard_group, team.replica_group):
            if group is not None:
                dist.all_reduce(part, op=dist.ReduceOp.MAX, group=group)
        told[chosen] = part
    return told
