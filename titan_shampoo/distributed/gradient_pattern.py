"""Gradient pattern: the parameters that have a gradient on any rank, and the gradients' placements.

Ranks may differ: an expert without tokens has a gradient on some ranks, an unused branch on none. A
parameter takes its step if any rank of its placement group has a gradient. A shard without its part
counts as zero. A replica without it receives it from a replica that has it.

Agreement takes a collective, but only if the pattern has changed. Every rank remembers its pattern
of the last agreement. If it now has another one, it raises a flag in the all-reduce that every step
makes anyway. Without a flag, the last agreement still holds on all ranks.

If the host reads that all-reduce one step late, ranks without a change do not know in time that
others wait for them. A change on all ranks (a frozen parameter, an unused branch) still takes
effect at once, because each rank knows on its own to wait for the flags. A change on some ranks
takes effect on all in the next step; until then, the last agreement holds on all ranks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.gradients import ABSENT, IN_PLACE, gradient_in_place, placement_code
from titan_shampoo.distributed.layout import PlacementGroup


class GradientPattern:
    """The pattern on which the ranks last agreed; at first, all gradients are present and in place.

    Args:
        params: The parameters, in the same order on all ranks of a placement group.
        placement_groups: Placement group of each parameter.
        device: Device of the messages.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        placement_groups: Sequence[PlacementGroup],
        device: torch.device,
    ) -> None:
        self._params, self._placement_groups, self._device = params, placement_groups, device
        self._here = self._anywhere = [IN_PLACE] * len(placement_groups)
        self._givers: dict[int, int] = {}
        """Replica that sends a gradient to the replicas without it, by number of the parameter."""

    def codes(self) -> list[int]:
        """Presence and placement of each gradient on this rank, as a code."""
        return [placement_code(param) for param in self._params]

    def is_news(self, here: Sequence[int]) -> bool:
        """True if this rank's gradients differ from those of the last agreement."""
        return list(here) != self._here

    def parts_replicas(self, here: Sequence[int]) -> bool:
        """True if the gradient of a replicated parameter differs here: replicas would diverge."""
        changes = zip(self._placement_groups, here, self._here, strict=True)
        return any(
            now != before
            for placement_group, now, before in changes
            if placement_group.num_replicas > 1
        )

    def follow(
        self,
        here: Sequence[int],
        flags: Sequence[float],
        now: Callable[[], Sequence[float]] | None = None,
    ) -> bool:
        """Renew the agreement if due, and return True then; a collective of all ranks in each step.

        Args:
            here: Result of :meth:`codes`.
            flags: Whether the pattern is new to any rank, and whether it is unchanged on any rank.
                They are the flags of this step, or of the one before if the host reads late.
            now: Waits for the flags of this step; None if ``flags`` are those of this step.
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
        """Reduce the patterns of all ranks; called by all of them if any has a new one.

        One all-reduce per process group, of a few elements per parameter.

        Raises:
            ValueError: On all ranks of a placement group, if two of them have gradients of one
                parameter with different placements.
        """
        self._here = list(here)
        found = torch.tensor(self._here, dtype=torch.int64, device=self._device)
        found = found.repeat(len(_Answers._fields), 1)
        members: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for number, placement_group in enumerate(self._placement_groups):
            members.setdefault(placement_group.ranks, []).append(number)
        for numbers in members.values():
            found[:, numbers] = _reduced(found[0, numbers], self._placement_groups[numbers[0]])
        answers = _Answers(*found.tolist())
        codes = zip(self._params, answers.largest, answers.negative_smallest, strict=True)
        for param, code, negative in codes:
            if code != ABSENT and code != -negative:
                raise ValueError(f"got gradients of a parameter of shape {tuple(param.shape)} that "
                                 "are placed in different ways on different ranks, wanted one "
                                 "placement; redistribute them before step()")  # fmt: skip
        self._anywhere = answers.largest
        self._givers = {
            number: self._placement_groups[number].num_replicas - distance
            for number, distance in enumerate(answers.first_giver)
            if distance and answers.is_missing[number]
        }

    def untouched(self, here: Sequence[int]) -> list[Tensor]:
        """Parameters whose gradient :meth:`completed` returns unchanged on this rank.

        Args:
            here: Result of :meth:`codes`.
        """
        numbered = enumerate(zip(self._params, here, self._anywhere, strict=True))
        return [
            param
            for number, (param, code, agreed) in numbered
            if code == agreed == IN_PLACE and number not in self._givers
        ]

    def completed(self, here: Sequence[int]) -> dict[Tensor, Tensor]:
        """This rank's part of each gradient that any rank has, in the placement of the parameter.

        One redistribution for each gradient with another placement than its parameter, and one
        broadcast for each gradient that some replicas lack. All ranks take part, as agreed.

        Args:
            here: Result of :meth:`codes`.
        """
        grads: dict[Tensor, Tensor] = {}
        codes = zip(self._params, self._anywhere, here, strict=True)
        for number, (param, code, own) in enumerate(codes):
            if code == ABSENT:
                continue
            grads[param] = gradient_in_place(param, code, own)
            if number in self._givers:
                placement_group = self._placement_groups[number]
                shared = grads[param].contiguous().clone()
                dist.broadcast(
                    shared, group=placement_group.replica_group, group_src=self._givers[number]
                )
                grads[param] = shared
        return grads


class _Answers(NamedTuple):
    """Rows of the table that ranks reduce to the maximum; one entry per parameter."""

    largest: list[int]
    """Largest code of its gradient on any rank."""
    negative_smallest: list[int]
    """Minus the smallest code of its gradient on any rank with one."""
    first_giver: list[int]
    """Number of replicas minus the first replica with a gradient; 0 if no replica has one."""
    is_missing: list[int]
    """1 if any replica lacks the gradient."""


def _reduced(codes: Tensor, placement_group: PlacementGroup) -> Tensor:
    """The rows of ``_Answers`` for parameters of one placement group, ``(4, n)``.

    Args:
        codes: Codes of the gradients on this rank, ``(n,)``.
        placement_group: Placement group of the parameters.
    """
    is_here = codes != ABSENT
    negative = torch.where(is_here, -codes, torch.iinfo(codes.dtype).min)
    first_giver = torch.where(is_here, placement_group.num_replicas - placement_group.replica, 0)
    found = torch.stack([codes, negative, first_giver, (~is_here).to(codes.dtype)])
    if placement_group.replica_group is not None:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=placement_group.replica_group)
    if placement_group.shard_group is not None:
        # Replicas of one shard share their gradient, so only the codes are compared over shards.
        both_codes = found[:2].clone()
        dist.all_reduce(both_codes, op=dist.ReduceOp.MAX, group=placement_group.shard_group)
        found[:2] = both_codes
    return found


def decision_groups(
    placement_groups: Sequence[PlacementGroup],
    process_group: dist.ProcessGroup | None,
    pipeline_group: dist.ProcessGroup | None = None,
) -> list[dist.ProcessGroup]:
    """Process groups to reduce over, one after the other, to reach all ranks that train together.

    A single group if one has exactly these ranks: FSDP2's, DDP's, the flattened mesh of
    two-dimensional shardings, or all ranks. Otherwise (HSDP in a pipeline stage) the groups of the
    placement groups, then the group of the stages.

    Args:
        placement_groups: Placement group of each parameter.
        process_group: Ranks that hold plain tensors as replicas.
        pipeline_group: Ranks with the other stages of a pipeline; None without a pipeline.
    """
    if not dist.is_initialized():
        return []
    everyone = {
        rank
        for placement_group in placement_groups
        for row in placement_group.ranks
        for rank in row
    }
    num_stages = 1 if pipeline_group is None else pipeline_group.size()
    if num_stages > 1 and len(everyone) * num_stages == dist.get_world_size():
        assert dist.group.WORLD is not None
        return [dist.group.WORLD]
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    of_placements = [
        group
        for placement_group in placement_groups
        for group in (placement_group.shard_group, placement_group.replica_group)
    ]
    for group in [*of_placements, process_group, dist.group.WORLD]:
        if group is not None and group.size() > 1:
            groups.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    stages = [] if pipeline_group is None or num_stages == 1 else [pipeline_group]
    exact = [group for ranks, group in groups.items() if set(ranks) == everyone]
    if exact:
        return exact[:1] + stages
    in_order = [
        tuple(dist.get_process_group_ranks(group)) for group in of_placements if group is not None
    ]
    return [groups[ranks] for ranks in dict.fromkeys(in_order)] + stages
