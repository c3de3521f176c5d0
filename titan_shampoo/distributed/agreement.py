"""Whether all ranks made the same plan: asked once, before the first exchange could hang on it."""

import torch
import torch.distributed as dist

from titan_shampoo.distributed.plan import Plan


def check_agreement(plan: Plan, device: torch.device) -> None:
    """Compare the plan over the ranks of each team.

    Args:
        plan: This rank's.
        device: Where the process groups communicate.

    Raises:
        ValueError: On all ranks of a team, if two of them have different plans.
    """
    if device.type == "meta":  # planned only: there is nobody to compare with
        return
    for team in {param.team.ranks: param.team for param in plan.params}.values():
        digest = plan.digest(team)
        bounds = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
        for group in (team.shard_group, team.replica_group):
            if group is not None:
                dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
        largest, negative_smallest = bounds.tolist()
        if largest != -negative_smallest:
            names = [param.name for param in plan.params if param.team.ranks == team.ranks]
            raise ValueError(
                f"the ranks {team.ranks} have different parameters or options; this one has "
                f"{len(names)} from {names[0]} to {names[-1]}; give all ranks the same, or pass "
                "process_group: the ranks that hold plain tensors as replicas"
            )
