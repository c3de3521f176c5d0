"""Which parameters have a gradient on any of the ranks that hold them, and how it is placed.

Ranks may differ: an expert that got no token has a gradient on some, an unused branch on none. A
parameter takes its step if any rank of its team has a gradient. A shard that lacks its part counts
as zero; a replica that lacks it takes it from one that has it. To agree on that takes a collective,
but only when something is new: every rank remembers what it had when the ranks last agreed, and
raises one flag, in the reduction that every step makes anyway, if it now has anything else. Without
a flag the answer is still the last one, on all ranks.

Where the host reads that reduction a step late, ranks to which nothing is news do not know in time
that others wait for them. News to all ranks (a frozen parameter, a branch that nobody used) is
still acted upon at once: each rank has a reason of its own to wait for the numbers. News to some is
acted upon by all in the next step; until then what was agreed before counts, on all ranks.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.gradients import ABSENT, IN_PLACE, gradient_in_place, placement_code
from titan_shampoo.distributed.layout import Team


class Presence:
    """The pattern of gradients that the ranks last agreed on; all there and in place, at first.

    Args:
        params: The parameters, in the same order on all ranks of a team.
        teams: Who holds each.
        device: Where the process groups communicate.
    """

    def __init__(
        self, params: Sequence[Tensor], teams: Sequence[Team], device: torch.device
    ) -> None:
        self._params, self._teams, self._device = params, teams, device
        self._here = self._anywhere = [IN_PLACE] * len(teams)
        self._givers: dict[int, int] = {}
        """Replica that the others take the gradient of a parameter from, where some lack it."""

    def codes(self) -> list[int]:
        """Whether and how each gradient is there on this rank."""
        return [placement_code(param) for param in self._params]

    def is_news(self, here: Sequence[int]) -> bool:
        """Whether this rank has other gradients than when the ranks last agreed."""
        return list(here) != self._here

    def parts_replicas(self, here: Sequence[int]) -> bool:
        """Whether that is so for a parameter with replicas, which must not part."""
        changes = zip(self._teams, here, self._here, strict=True)
        return any(now != before for team, now, before in changes if team.num_replicas > 1)

    def follow(
        self,
        here: Sequence[int],
        flags: Sequence[float],
        now: Callable[[], Sequence[float]] | None = None,
    ) -> bool:
        """Agree if it is time to, and say so; called by all ranks in each step.

        Args:
            here: What :meth:`codes` returned.
            flags: Whether it is news to any rank, and whether it is none to any rank; of this step,
                or of the one before where the host reads late.
            now: Waits for the flags of this step; None where ``flags`` are those already.
        """
        is_news, is_known = flags
        wanted = bool(is_news) if now is None else bool(is_news and is_known)
        if now is not None and not wanted and self.is_news(here):
            _, is_known = now()
            wanted = not is_known
        if wanted:
            self.agree(here)
        return wanted

    def agree(self, here: Sequence[int]) -> None:
        """Find out what each team has; called by all ranks of all teams if it is news to any.

        One all-reduce per process group, of a few elements per parameter.

        Raises:
            ValueError: On all ranks of a team that have gradients of one parameter that are placed
                in different ways.
        """
        self._here = list(here)
        found = torch.tensor(self._here, dtype=torch.int64, device=self._device).repeat(4, 1)
        members: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for number, team in enumerate(self._teams):
            members.setdefault(team.ranks, []).append(number)
        for numbers in members.values():
            found[:, numbers] = _agreed(found[0, numbers], self._teams[numbers[0]])
        anywhere, negative_lowest, first, lacks = found.tolist()
        for param, code, other in zip(self._params, anywhere, negative_lowest, strict=True):
            if code != ABSENT and code != -other:
                raise ValueError(f"the gradients of a parameter of shape {tuple(param.shape)} are "
                                 "placed in different ways on different ranks")  # fmt: skip
        self._anywhere = anywhere
        self._givers = {
            number: self._teams[number].num_replicas - first[number]
            for number in range(len(anywhere))
            if first[number] and lacks[number]
        }

    def untouched(self, here: Sequence[int]) -> list[Tensor]:
        """Parameters whose gradient on this rank is, as it is, what :meth:`completed` returns.

        Args:
            here: What :meth:`codes` returned.
        """
        numbered = enumerate(zip(self._params, here, self._anywhere, strict=True))
        return [
            param
            for number, (param, code, agreed) in numbered
            if code == agreed == IN_PLACE and number not in self._givers
        ]

    def completed(self, here: Sequence[int]) -> dict[Tensor, Tensor]:
        """This rank's part of each gradient that any rank has, where its parameter lies.

        One redistribution for each gradient that is placed unlike its parameter, one broadcast for
        each that some replicas lack: as agreed on, so that all ranks take part.

        Args:
            here: What :meth:`codes` returned.
        """
        grads: dict[Tensor, Tensor] = {}
        codes = zip(self._params, self._anywhere, here, strict=True)
        for number, (param, code, own) in enumerate(codes):
            if code == ABSENT:
                continue
            grads[param] = gradient_in_place(param, code, own)
            if number in self._givers:
                team = self._teams[number]
                shared = grads[param].contiguous().clone()
                dist.broadcast(shared, group=team.replica_group, group_src=self._givers[number])
                grads[param] = shared
        return grads


def _agreed(codes: Tensor, team: Team) -> Tensor:
    """What the ranks of a team have of some parameters, ``(4, n)``.

    First the largest code of a gradient on any rank, and minus the smallest. Then how far the first
    replica that has one is from the end, or 0; and whether any replica lacks one.

    Args:
        codes: What this rank has, ``(n,)``.
        team: Who holds the parameters.
    """
    is_here = codes != ABSENT
    negative = torch.where(is_here, -codes, torch.iinfo(codes.dtype).min)
    distance = torch.where(is_here, team.num_replicas - team.replica, 0)
    found = torch.stack([codes, negative, distance, (~is_here).to(codes.dtype)])
    if team.replica_group is not None:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=team.replica_group)
    if team.shard_group is not None:
        everywhere = found[:2].clone()
        dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=team.shard_group)
        found[:2] = everywhere
    return found


def judges(
    teams: Sequence[Team],
    process_group: dist.ProcessGroup | None,
    pipeline_group: dist.ProcessGroup | None = None,
) -> list[dist.ProcessGroup]:
    """Groups to reduce over, one after the other, so that all ranks that train together agree.

    One group wherever there is one of exactly these ranks: FSDP2's, DDP's, the flattened mesh of
    two-dimensional shardings, or all ranks. Else (HSDP in a stage of a pipeline) the groups of the
    teams in turn, and then that of the stages.

    Args:
        teams: Who holds each parameter.
        process_group: Ranks that hold plain tensors as replicas.
        pipeline_group: Ranks with the other stages of a pipeline; None without one.
    """
    if not dist.is_initialized():
        return []
    everyone = {rank for team in teams for row in team.ranks for rank in row}
    num_stages = 1 if pipeline_group is None else pipeline_group.size()
    if num_stages > 1 and len(everyone) * num_stages == dist.get_world_size():
        assert dist.group.WORLD is not None
        return [dist.group.WORLD]
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    of_teams = [group for team in teams for group in (team.shard_group, team.replica_group)]
    for group in [*of_teams, process_group, dist.group.WORLD]:
        if group is not None and group.size() > 1:
            groups.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    stages = [] if pipeline_group is None or num_stages == 1 else [pipeline_group]
    exact = [group for ranks, group in groups.items() if set(ranks) == everyone]
    if exact:
        return exact[:1] + stages
    turns = [tuple(dist.get_process_group_ranks(group)) for group in of_teams if group is not None]
    return [groups[ranks] for ranks in dict.fromkeys(turns)] + stages
