"""Which parameters have a gradient on any of the ranks that hold them.

Ranks may differ: an expert that got no token has a gradient on some, an unused branch on none. A
parameter takes its step if any rank of its team has a gradient; what the others lack counts as
zero. To agree on that takes a collective, but only when something is new: every rank remembers what
it had when the ranks last agreed, and raises one flag, in the reduction that every step makes
anyway, if it now has anything else. Without a flag the answer is still the last one, on all ranks.

Where the host reads that reduction a step late, ranks to which nothing is news do not know in time
that others wait for them. News to all ranks (a frozen parameter, a branch that nobody used) is
still acted upon at once: each rank has a reason of its own to wait for the numbers. News to some is
acted upon by all in the next step; until then what was agreed before counts, on all ranks.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from titan_shampoo.distributed.layout import Team


class Presence:
    """The pattern of gradients that the ranks last agreed on; all present, at first.

    Args:
        teams: Who holds each parameter, in the same order on all ranks of a team.
        device: Where the process groups communicate.
    """

    def __init__(self, teams: Sequence[Team], device: torch.device) -> None:
        self._teams, self._device = teams, device
        self._here = self._anywhere = [True] * len(teams)

    def is_news(self, here: Sequence[bool]) -> bool:
        """Whether this rank has other gradients than when the ranks last agreed."""
        return list(here) != self._here

    def follow(
        self,
        here: Sequence[bool],
        flags: Sequence[float],
        now: Callable[[], Sequence[float]] | None = None,
    ) -> None:
        """Agree if it is time to; called by all ranks in each step.

        Args:
            here: Which parameters have a gradient on this rank.
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

    def agree(self, here: Sequence[bool]) -> None:
        """Find out what each team has; called by all ranks of all teams if it is news to any.

        One all-reduce per process group, of one element per parameter.
        """
        self._here = list(here)
        anywhere = torch.tensor(self._here, dtype=torch.int32, device=self._device)
        members: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for number, team in enumerate(self._teams):
            members.setdefault(team.ranks, []).append(number)
        for numbers in members.values():
            team, mask = self._teams[numbers[0]], anywhere[numbers]
            for group in (team.shard_group, team.replica_group):
                if group is not None:
                    dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=group)
            anywhere[numbers] = mask
        self._anywhere = [bool(value) for value in anywhere.tolist()]

    @property
    def anywhere(self) -> Sequence[bool]:
        """For each parameter, whether a rank of its team has a gradient."""
        return self._anywhere


def judges(
    teams: Sequence[Team], process_group: dist.ProcessGroup | None
) -> list[dist.ProcessGroup]:
    """Groups to reduce over, one after the other, so that all ranks that share parameters agree.

    One group wherever there is one of exactly these ranks: FSDP2's, DDP's, the flattened mesh of
    two-dimensional shardings, or all ranks. Else (HSDP in a stage of a pipeline) the groups of the
    teams in turn.

    Args:
        teams: Who holds each parameter.
        process_group: Ranks that hold plain tensors as replicas.
    """
    if not dist.is_initialized():
        return []
    everyone = {rank for team in teams for row in team.ranks for rank in row}
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    of_teams = [group for team in teams for group in (team.shard_group, team.replica_group)]
    for group in [*of_teams, process_group, dist.group.WORLD]:
        if group is not None and group.size() > 1:
            groups.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    exact = [group for ranks, group in groups.items() if set(ranks) == everyone]
    if exact:
        return exact[:1]
    turns = [tuple(dist.get_process_group_ranks(group)) for group in of_teams if group is not None]
    return [groups[ranks] for ranks in dict.fromkeys(turns)]
