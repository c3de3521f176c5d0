"""Work grows like the number of parameters, and not like its square.

Counted are the lines that each function of the library executes, with so many parameters and with
twice as many: seconds would depend on the machine. Loops inside torch and C are not seen.
"""

import collections
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import titan_shampoo
from tests.support.ranks import run_on_ranks

METHODS = ("Shampoo", "SOAP", "KLShampoo", "Eva", "EvaF", "EvaS", "FOOF", "KFAC")
LOOK_INTO_LAYERS = ("Eva", "EvaF", "FOOF", "KFAC")
GROUPINGS = {
    "one group": {"alike": True},
    "a group each, without names": {"alike": False},
}
FEW = 24
SLACK = 40
"""Lines that a function may execute more often than twice as often: turns, and what is kept."""

Lines = collections.Counter[str]


class Layers(torch.nn.Module):
    """Layers side by side, every other one with a bias, of one shape or of as many as layers."""

    def __init__(self, count: int, *, alike: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(2, 2 if alike else 2 + number, bias=number % 2 == 0)
            for number in range(count)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(inputs).square().mean() for layer in self.layers]).sum()


def counted(work: Callable[[], Any]) -> Lines:
    """How many lines each function of the library executes in ``work``."""
    lines: Lines = collections.Counter()

    def of_frame(frame: FrameType, event: str, _arg: object) -> Any:
        if event == "line":
            lines[f"{frame.f_code.co_filename}: {frame.f_code.co_qualname}"] += 1
        return of_frame

    def of_call(frame: FrameType, _event: str, _arg: object) -> Any:
        return of_frame if "/titan_shampoo/" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(of_call)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def groups_of(model: torch.nn.Module, grouping: str) -> list[Any]:
    named = list(model.named_parameters())
    if grouping == "one group":
        return named
    groups: dict[str, list[Any]] = collections.defaultdict(list)
    for name, param in named:
        groups[name.rpartition(".")[0]].append((name, param))
    if grouping == "a group each":
        return [{"params": group} for group in groups.values()]
    return [{"params": [param for _, param in group]} for group in groups.values()]


def lines_of_all(method: str, count: int, grouping: str, *, alike: bool, sharded: bool = False
                 ) -> dict[str, Lines]:  # fmt: skip
    """Lines by what is done: construction, two steps, state out and in, the plan."""
    torch.manual_seed(0)
    model = Layers(count, alike=alike)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    options = {"model": model} if method in LOOK_INTO_LAYERS else {}
    found, made = {}, []
    groups = groups_of(model, grouping)

    def make() -> None:
        made.append(getattr(titan_shampoo, method)(groups, lr=1e-3, **options))

    found["construction"] = counted(make)
    optimizer = made[0]
    for step in (1, 2):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).backward()
        found[f"step {step}"] = counted(optimizer.step)
    found["state_dict"] = counted(optimizer.state_dict)
    state = optimizer.state_dict()
    found["load_state_dict"] = counted(lambda: optimizer.load_state_dict(state))
    found["sharded_state"] = counted(optimizer.sharded_state)
    if hasattr(optimizer, "plan_summary"):
        found["plan_summary"] = counted(lambda: str(optimizer.plan_summary()))
    return found


def more_than_twice(few: dict[str, Lines], many: dict[str, Lines]) -> list[str]:
    return [
        f"{what}: {function}: {few[what][function]} lines, then {lines}"
        for what, functions in many.items()
        for function, lines in functions.items()
        # Which of few stacks of one block are refreshed in a step is a matter of turns.
        if lines > 2 * few[what][function] + SLACK and "refresh" not in function
            ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:without names")
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("method", METHODS)
def test_twice_the_parameters_are_twice_the_work(method: str, grouping: str) -> None:
    few, many = (
        lines_of_all(method, count, grouping, **GROUPINGS[grouping]) for count in (FEW, 2 * FEW)
    )
    assert many["construction"], "nothing was counted"
    assert not more_than_twice(few, many)


def _lines_on_ranks(method: str) -> list[str]:
    few, many = (
        lines_of_all(method, count, "a group each", alike=True, sharded=True)
        for count in (FEW, 2 * FEW)
    )
    return more_than_twice(few, many)


@pytest.mark.parametrize("method", ["Shampoo", "EvaF", "EvaS", "KFAC"])
def test_twice_the_parameters_are_twice_the_work_on_two_ranks(method: str) -> None:
    assert run_on_ranks(2, _lines_on_ranks, method, timeout=120) == [[], []]
