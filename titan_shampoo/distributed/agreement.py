"""Consistency check at construction: all ranks have the same parameters, options and layout.

A rank describes each parameter by a few named values. The ranks that hold the parameter compare a
hash of the description. If the hashes differ, these ranks exchange their descriptions, and all of
them raise the same error, which names the difference. Otherwise a later collective could hang.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

CheckedValues = Mapping[str, object]
"""Values by name; equal values have the same ``repr`` on all ranks."""

_FOUND_ELSEWHERE = "parameters or options of other ranks differ; see the errors of those ranks"


class CheckedParameter(NamedTuple):
    """The description of a parameter on this rank."""

    name: str
    param: Tensor
    group: int
    """Number of its parameter group on this rank; the numbering may differ on other ranks."""
    facts: CheckedValues


@dataclass(slots=True)
class ConsistencyCheck:
    """A comparison between ranks that must have equal descriptions."""

    groups: Sequence[dist.ProcessGroup]
    """Process groups that connect all of the ranks when one is reduced after the other."""
    device: torch.device
    """Device of their messages."""
    advice: str = "give all ranks the same"
    known: dict[str, dict[str, object]] = field(default_factory=dict)
    """Descriptions by name of the parameter, in the order of messages."""
    _numbers: dict[int, int] = field(default_factory=dict)

    def add(self, one: CheckedParameter) -> None:
        """Add a parameter; its group is numbered among the groups that these ranks share."""
        number = self._numbers.setdefault(one.group, len(self._numbers))
        self.known[one.name] = {**one.facts, "number of its parameter group": number}

    def compare(self, *, is_wrong: bool) -> tuple[bool, str]:
        """True if any rank has found an error, and the difference that this rank has found, or "".

        Args:
            is_wrong: True if this rank has found an error before.
        """
        text = repr(list(self.known.items())).encode()
        digest = int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 2
        bounds = torch.tensor([digest, -digest, is_wrong], dtype=torch.int64, device=self.device)
        for group in self.groups:
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
        largest, negative_smallest, wrong = bounds.tolist()
        if largest == -negative_smallest:
            return bool(wrong), ""
        return True, f"{_difference(self._of_all_ranks())}; {self.advice}"

    def _of_all_ranks(self) -> list["_OneRank"]:
        """Descriptions on all ranks, by rank."""
        values = {
            name: {what: repr(value) for what, value in facts.items()}
            for name, facts in self.known.items()
        }
        by_rank = [_OneRank(dist.get_rank(), values)]
        for group in self.groups:
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, by_rank, group=group)
            by_rank = [one for part in parts for one in part]
        return sorted(by_rank, key=lambda one: one.rank)


def check_agreement(
    known: Iterable[CheckedParameter],
    replicas: dist.ProcessGroup | None,
    stages: ConsistencyCheck | None,
) -> None:
    """Compare the descriptions of parameters between the ranks that hold them.

    Every rank with a parameter must call it. The collectives depend on the meshes alone, not on
    placements or descriptions, so that ranks that differ in those still meet.

    Args:
        known: Description of each parameter of this rank, in the order of messages.
        replicas: Ranks that hold plain tensors as replicas; None for this one alone.
        stages: Comparison between all stages of a pipeline; None without a pipeline.

    Raises:
        ValueError: On all ranks, if any two of them differ.
    """
    if not dist.is_initialized():
        return
    checks = _checks(known, replicas)
    if stages is not None:
        checks.append(stages)
    is_wrong, sentences = False, []
    for check in checks:  # do not stop at the first error: other ranks wait in the next ones
        is_wrong, sentence = check.compare(is_wrong=is_wrong)
        sentences += [sentence] if sentence else []
    if is_wrong:
        raise ValueError(sentences[0] if sentences else _FOUND_ELSEWHERE)


def _checks(
    known: Iterable[CheckedParameter], replicas: dist.ProcessGroup | None
) -> list[ConsistencyCheck]:
    """One comparison per set of ranks, the smallest set first, in the same order everywhere."""
    checks: dict[tuple[int, ...], ConsistencyCheck] = {}
    for one in known:
        if one.param.device.type == "meta":  # a plan without ranks
            continue
        ranks, groups = _holders(one.param, replicas)
        if not groups:
            continue
        check = checks.setdefault(ranks, ConsistencyCheck(groups, _device(one.param)))
        check.add(one)
        if not isinstance(one.param, DTensor):
            check.advice = ("give all ranks the same, or pass process_group: the ranks that hold "
                             "plain tensors as replicas")  # fmt: skip
    return [checks[ranks] for ranks in sorted(checks, key=lambda ranks: (len(ranks), ranks))]


def _holders(
    param: Tensor, replicas: dist.ProcessGroup | None
) -> tuple[tuple[int, ...], list[dist.ProcessGroup]]:
    """The ranks that hold a parameter, and their process groups, whatever its placement."""
    groups: list[dist.ProcessGroup] = []
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        ranks = mesh.mesh.flatten().tolist()
        groups = [mesh.get_group(axis) for axis, size in enumerate(mesh.shape) if size > 1]
    else:
        ranks = [] if replicas is None else dist.get_process_group_ranks(replicas)
        groups = [replicas] if replicas is not None and len(ranks) > 1 else []
    if groups and len(ranks) == dist.get_world_size():
        # Ranks then meet even if their meshes differ, or if only some of them have a mesh.
        assert dist.group.WORLD is not None
        groups = [dist.group.WORLD]
    return tuple(sorted(ranks)), groups


def _device(param: Tensor) -> torch.device:
    """Device of the messages for a parameter; an offloaded parameter is refused later."""
    if isinstance(param, DTensor) and param.device.type != param.device_mesh.device_type:
        return torch.device(param.device_mesh.device_type)
    return param.device


class _OneRank(NamedTuple):
    """The descriptions on one rank, as exchanged."""

    rank: int
    known: dict[str, dict[str, str]]
    """Descriptions as in :class:`ConsistencyCheck`, with each value as its ``repr``."""


def _difference(by_rank: Sequence[_OneRank]) -> str:
    """The first difference between the first rank and the first rank that disagrees with it."""
    here = by_rank[0]
    there = next(one for one in by_rank if list(one.known.items()) != list(here.known.items()))
    for first, second in ((here, there), (there, here)):
        for name in first.known:
            if name not in second.known:
                return f"{name}: is on rank {first.rank} and not on rank {second.rank}"
    for name, mine in here.known.items():
        theirs = there.known[name]
        for what in {**mine, **theirs}:
            values = mine.get(what), theirs.get(what)
            if values[0] != values[1]:
                return (f"{name}: {what} is {values[0]} on rank {here.rank} and {values[1]} on "
                        f"rank {there.rank}")  # fmt: skip
    places = zip(here.known, there.known, strict=True)
    name, other = next((mine, theirs) for mine, theirs in places if mine != theirs)
    return f"{name}: rank {here.rank} has it in the position of {other} on rank {there.rank}"
