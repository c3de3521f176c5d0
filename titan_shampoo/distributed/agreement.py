"""Whether all ranks were given the same: asked at construction, before any message could hang.

What a rank knows of a parameter is a handful of named facts. A hash of them is compared over the
ranks that hold the parameter; where it differs, those ranks tell each other what they know, and all
of them raise the same sentence, which names what differs.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Facts = Mapping[str, object]
"""Values by what they are of; equal values are written alike (``repr``) on all ranks."""

_TOLD_ELSEWHERE = "parameters or options of other ranks differ, as those ranks say"


class Known(NamedTuple):
    """What this rank knows of a parameter."""

    name: str
    param: Tensor
    group: int
    """Number of its parameter group; other parameters' may come between on other ranks."""
    facts: Facts


@dataclass(slots=True)
class Circle:
    """Ranks that must know the same."""

    groups: Sequence[dist.ProcessGroup]
    """Reduced over in turn, they connect all of the ranks."""
    device: torch.device
    """Where these communicate."""
    advice: str = "give all ranks the same"
    known: dict[str, dict[str, object]] = field(default_factory=dict)
    """Facts by name of a parameter; in one order on all ranks, as messages follow it."""
    _numbers: dict[int, int] = field(default_factory=dict)

    def add(self, one: Known) -> None:
        """Take a parameter in; groups are numbered among those that these ranks share."""
        number = self._numbers.setdefault(one.group, len(self._numbers))
        self.known[one.name] = {**one.facts, "number of its parameter group": number}

    def compare(self, *, is_wrong: bool) -> tuple[bool, str]:
        """Whether anything is wrong, here or elsewhere, and what differs here (or nothing).

        Args:
            is_wrong: Whether this rank knows of something already.
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

    def _of_all_ranks(self) -> list["_Told"]:
        """What each rank knows, by rank."""
        values = {
            name: {what: repr(value) for what, value in facts.items()}
            for name, facts in self.known.items()
        }
        told = [_Told(dist.get_rank(), values)]
        for group in self.groups:
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, told, group=group)
            told = [one for part in parts for one in part]
        return sorted(told, key=lambda one: one.rank)


def check_agreement(
    known: Iterable[Known], replicas: dist.ProcessGroup | None, stages: Circle | None
) -> None:
    """Compare what ranks know of the parameters that they hold together.

    Every rank that holds one must call it. Collectives depend on the meshes alone: not on how
    parameters are placed, nor on what is known of them.

    Args:
        known: Of each parameter of this rank, in the order of messages.
        replicas: Ranks that hold plain tensors as replicas; None for this one alone.
        stages: What all stages of a pipeline must know; None without one.

    Raises:
        ValueError: On all ranks alike, if two of them know different things.
    """
    if not dist.is_initialized():
        return
    circles = _circles(known, replicas)
    if stages is not None:
        circles.append(stages)
    is_wrong, sentences = False, []
    for circle in circles:  # to the end: others wait in the next ones, and are told there
        is_wrong, sentence = circle.compare(is_wrong=is_wrong)
        sentences += [sentence] if sentence else []
    if is_wrong:
        raise ValueError(sentences[0] if sentences else _TOLD_ELSEWHERE)


def _circles(known: Iterable[Known], replicas: dist.ProcessGroup | None) -> list[Circle]:
    """Parameters by the ranks that hold them; the fewest ranks first, in one order everywhere."""
    circles: dict[tuple[int, ...], Circle] = {}
    for one in known:
        if one.param.device.type == "meta":  # planned only: there is nobody to compare with
            continue
        ranks, groups = _holders(one.param, replicas)
        if not groups:
            continue
        circle = circles.setdefault(ranks, Circle(groups, _device(one.param)))
        circle.add(one)
        if not isinstance(one.param, DTensor):
            circle.advice = ("give all ranks the same, or pass process_group: the ranks that hold "
                             "plain tensors as replicas")  # fmt: skip
    return [circles[ranks] for ranks in sorted(circles, key=lambda ranks: (len(ranks), ranks))]


def _holders(
    param: Tensor, replicas: dist.ProcessGroup | None
) -> tuple[tuple[int, ...], list[dist.ProcessGroup]]:
    """The ranks that hold a parameter, and what connects them, however it is placed there."""
    groups: list[dist.ProcessGroup] = []
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        ranks = mesh.mesh.flatten().tolist()
        groups = [mesh.get_group(axis) for axis, size in enumerate(mesh.shape) if size > 1]
    else:
        ranks = [] if replicas is None else dist.get_process_group_ranks(replicas)
        groups = [replicas] if replicas is not None and len(ranks) > 1 else []
    if groups and len(ranks) == dist.get_world_size():
        # So that ranks meet even where one has a mesh and another has none, or another one.
        assert dist.group.WORLD is not None
        groups = [dist.group.WORLD]
    return tuple(sorted(ranks)), groups


def _device(param: Tensor) -> torch.device:
    """Where the ranks of a parameter communicate; it may be offloaded, which is refused later."""
    if isinstance(param, DTensor) and param.device.type != param.device_mesh.device_type:
        return torch.device(param.device_mesh.device_type)
    return param.device


class _Told(NamedTuple):
    """What a rank has told the others."""

    rank: int
    known: dict[str, dict[str, str]]
    """As of :class:`Circle`, written out."""


def _difference(told: Sequence[_Told]) -> str:
    """The first difference between the first rank and the first that knows other things."""
    here = told[0]
    there = next(one for one in told if list(one.known.items()) != list(here.known.items()))
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
    return f"{name}: comes where {other} comes on rank {there.rank}, on rank {here.rank}"
