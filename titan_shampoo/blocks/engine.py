"""The step of every method that works on blocks: mathematics meets distribution.

The plan says which blocks this rank owns and how they get here, the schedule what is due, the rule
what to do with a stack of blocks.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titan_shampoo.block_memory import as_blocks
from titan_shampoo.blocks.ready import Ready
from titan_shampoo.blocks.schedule import Mask, Schedule, Times, schedule, start_step
from titan_shampoo.blocks.state import REFRESHES, BlockState, Member
from titan_shampoo.distributed.exchange import exchange_in_turn
from titan_shampoo.distributed.layout import local_tensor
from titan_shampoo.distributed.plan import Plan, Stack
from titan_shampoo.functional.descent import as_tensors, coupled_gradient, descend_, rates
from titan_shampoo.functional.rule import BEYOND, CONDITION, Clock, Rule, State
from titan_shampoo.repair import Repairs, take_, worst_failure
from titan_shampoo.workspace import Workspace

CPU_TILE_NUMEL = 1 << 19
"""Elements of gradient per thread that are worked on at once, so that they stay in caches."""

MAX_KEPT = 10_000
"""Index tensors that are kept on the device; patterns of missing gradients could be without end."""


MAX_GRAPHS = 1024
"""Compiled graphs of one function; torch gives up at 8, ResNet-50 has more shapes of blocks."""


class Engine:
    """State and step of the parameters that one rule preconditions.

    Args:
        members: Parameters in the plan's order.
        rule: The mathematics.
        plan: Blocks, owners and copies for ``members``.
        compiled: Whether the arithmetic of a step is compiled, refreshes aside.
    """

    def __init__(
        self, members: Sequence[Member], rule: Rule, plan: Plan, *, compiled: bool = False
    ) -> None:
        self.members, self.rule, self.plan = members, rule, plan
        self.device = members[0].param.device
        self.step_count = torch.zeros(len(members), dtype=torch.int64, device=self.device)
        """Steps that each parameter has taken; bias corrections count from it."""
        self.cursor = torch.zeros(len(members), dtype=torch.int64)
        """Steps with a gradient, on the host, skipped ones included: the schedule's time."""
        self._last_cursor = self.cursor.clone()
        self._ready = Ready()
        self.state = BlockState(members, rule, plan, self.device)
        self.momentum = [
            self._empty_momentum(number) if member.options["momentum"] > 0 else None
            for number, member in enumerate(members)
        ]
        self.failed_refreshes = torch.zeros((), dtype=torch.int64, device=self.device)
        """Refreshes that were not taken since the start."""
        self._repairs = Repairs(self._block_name, self._refresh_anew)
        self._compiled = compiled
        self._kept: dict[str, Tensor] = {}
        self._workspace = Workspace(self.device)
        self._members_of = [
            np.array([block.param for block in stack.blocks]) for stack in plan.stacks
        ]
        self._turns_of = [np.array([block.slot for block in stack.blocks]) for stack in plan.stacks]

    @torch.no_grad()
    def step(self, grads: Mapping[int, Tensor], taken: Tensor | None = None) -> None:
        """One step for the parameters whose local gradients are given, by number.

        Args:
            grads: Local gradients by number of the parameter.
            taken: Whether anything is to change at all, 0-dim bool on the device; None where the
                host knows that it is.
        """
        present = self.pass_time(grads)
        moving = self._on_device(present)
        self.step_count += moving if taken is None else moving & taken
        grads = self._flat(self._decayed_gradients(grads))
        stacks = dict(
            enumerate(self._workspace.tensors("stack", map(self._stack_size, self.plan.stacks)))
        )
        sizes = [(grad.shape, self.plan.params[number].dtype) for number, grad in grads.items()]
        directions = dict(zip(grads, self._workspace.tensors("direction", sizes), strict=True))

        def replace(number: int) -> None:
            blocks = as_blocks(stacks[number], self.plan.stacks[number].shape)
            self._replace_by_directions(number, blocks, present, taken)

        exchange_in_turn(self.plan.buckets, self.device, grads, stacks, directions, replace)
        self._apply(directions, taken)

    def pass_time(self, grads: Mapping[int, Tensor]) -> Mask:
        """Let the schedule go on for the parameters with a gradient; returns which they are."""
        present = np.zeros(len(self.members), dtype=bool)
        present[list(grads)] = True
        if not torch.equal(self.cursor, self._last_cursor):  # state has been loaded
            self._ready.forget()
        self.cursor += torch.from_numpy(present)
        self._last_cursor.copy_(self.cursor)
        return present

    def _replace_by_directions(
        self, number: int, grad: Tensor, present: Mask, taken: Tensor | None
    ) -> None:
        """Gradients of one stack become directions; zero for parameters without a gradient."""
        here = present[self._members_of[number]]
        if not here.all():
            grad[self._on_device(np.flatnonzero(~here))] = 0
        if taken is not None:
            grad.copy_(grad.where(taken, 0.0))
        options = self.members[self._members_of[number][0]].options
        time = self.cursor.numpy()[self._members_of[number]]
        now = schedule(time, self._turns_of[number], options)
        due = here & now.due
        work = self._plain_work()
        if due.any():
            for state, part, clock in self._parts(number, grad, here, now, taken):
                self.rule.accumulate_(state, part, clock, options)
            # All at once, as small matrices are decomposed side by side.
            self._refresh(number, np.flatnonzero(due), now, taken, options)
            work = type(self.rule).direction
        for state, part, clock in self._parts(number, grad, here, now, taken):
            direction = work(self.rule, state, part, clock, options)
            part.copy_(direction if taken is None else direction.where(taken, 0.0))

    def _parts(
        self, number: int, grad: Tensor, here: Mask, now: Schedule, taken: Tensor | None
    ) -> Iterator[tuple[State, Tensor, Clock]]:
        """State, gradient and time of the blocks that are worked on together."""
        for tile in self._tiles(grad, here):
            state = {name: value[tile] for name, value in self.state.stacks[number].items()}
            measured = now.measured[tile]
            clock = self._clock(number, tile, now, self._ready_blocks(number, state))
            yield (
                state,
                grad[tile],
                clock._replace(
                    measured=None if measured.all() else self._on_device(np.flatnonzero(measured)),
                    taken=taken,
                ),
            )

    def _tiles(self, grad: Tensor, here: Mask) -> Iterator[slice]:
        """Runs of blocks that are ``here`` and worked on together, in place.

        All neighbours, or on a CPU what its caches hold.
        """
        count = len(grad)
        if self.device.type == "cpu":
            room = CPU_TILE_NUMEL * torch.get_num_threads()
            count = max(1, room // max(1, grad[0].numel()))
        edges = np.flatnonzero(np.diff(here, prepend=False, append=False))
        for first, last in edges.reshape(-1, 2).tolist():
            for start in range(first, last, count):
                yield slice(start, min(start + count, last))

    def _clock(
        self, number: int, blocks: slice | Times, now: Schedule, ready: Tensor | bool
    ) -> Clock:
        members = self._members_of[number][blocks]
        step = self.step_count[self._on_device(members)]
        return Clock(step, ready, self._on_device(now.first[blocks] == 1))

    def _plain_work(self) -> Callable[..., Tensor]:
        return _compiled(plain_work) if self._compiled else plain_work

    def _refresh(
        self,
        number: int,
        due: Times,
        now: Schedule,
        taken: Tensor | None,
        options: Mapping[str, Any],
    ) -> None:
        """New roots or bases for the blocks at ``due``, where they are finite."""
        state, positions = self.state.stacks[number], self._on_device(due)
        ready = self._ready_blocks(number, state) is True or state[REFRESHES.name][positions] > 0
        clock = self._clock(number, due, now, ready)
        new = self.rule.refresh(state, positions, clock, self.plan.stacks[number].shape, options)
        self.failed_refreshes += take_(state, positions, new, taken)

    def _decayed_gradients(self, grads: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The gradients with coupled weight decay added, never in place."""
        members = self.members
        return {
            n: coupled_gradient(grad, local_tensor(members[n].param), members[n].options)
            for n, grad in grads.items()
        }

    @staticmethod
    def _flat(grads: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {number: grad.contiguous().view(-1) for number, grad in grads.items()}

    def _apply(self, directions: Mapping[int, Tensor], taken: Tensor | None) -> None:
        """Weight decay, heavy ball and the parameter update, group by group."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for number in directions:
            key = (id(self.members[number].options), self._rests(number))
            groups.setdefault(key, []).append(number)
        for (_, rests), numbers in groups.items():
            options = self.members[numbers[0]].options
            params = [local_tensor(self.members[number].param) for number in numbers]
            steps = [directions[n].view(p.shape) for n, p in zip(numbers, params, strict=True)]
            buffers = []
            if options["momentum"] > 0:
                held = (self.momentum[number] for number in numbers)
                buffers = [local_tensor(buffer) for buffer in held if buffer is not None]
            speed = rates(options, rests=rests)
            if taken is not None or self._compiled:
                speed = as_tensors(speed, taken, steps[0])
            descend = _compiled(descend_) if self._compiled else descend_
            descend(params, steps, buffers, speed,
                    dampening=options["dampening"], nesterov=options["nesterov"])  # fmt: skip

    def _rests(self, number: int) -> bool:
        """Whether this step leaves out a parameter's weight decay; see ``Rule.rests_at_first``.

        All of it, though blocks that are refreshed in a later step do move.
        """
        options = self.members[number].options
        is_first = self.cursor.numpy()[number] == 1
        return self.rule.rests_at_first and start_step(options) == 1 and bool(is_first)

    def _empty_momentum(self, number: int) -> Tensor:
        dtype = self.plan.params[number].dtype
        return torch.zeros_like(self.members[number].param, dtype=dtype)

    def _stack_size(self, stack: Stack) -> tuple[torch.Size, torch.dtype]:
        size = torch.Size((len(stack.blocks) * math.prod(stack.shape),))
        return size, self.plan.params[stack.blocks[0].param].dtype

    def _ready_blocks(self, number: int, state: State) -> Tensor | bool:
        """Which blocks of a part of a stack have been refreshed, or one answer for all."""
        if self._ready.is_complete(number, self.state.stacks[number][REFRESHES.name]):
            return True
        ready = state[REFRESHES.name] > 0
        return ready if self.device.type != "cpu" or ready.any() else False

    def _on_device(self, values: NDArray[Any]) -> Tensor:
        """``values`` on the device; kept, as few occur, so that steps do not wait for copies."""
        key = values.dtype.str + values.tobytes().hex()
        if key not in self._kept:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = torch.from_numpy(values.copy()).to(self.device)
        return self._kept[key]

    def common_state(self, number: int) -> dict[str, Tensor]:
        """State of one parameter that every rank with a part of it holds."""
        buffer = self.momentum[number]
        state = {"step": self.step_count[number], "cursor": self.cursor[number]}
        return state if buffer is None else state | {"momentum": buffer}

    def worst_failure(self) -> Tensor:
        """Largest number of failed refreshes in a row of any block here, 0-dim, on the device."""
        return worst_failure(self.state.stacks, self.device)

    def beyond(self) -> Tensor:
        """Whether a direction of any block here rested since this was asked last, 0-dim."""
        flags = [state[BEYOND] for state in self.state.stacks if BEYOND in state]
        if not flags:
            return torch.zeros((), device=self.device)
        found = torch.stack([flag.any() for flag in flags]).any()
        torch._foreach_zero_(flags)
        return found

    def repair(self) -> list[str]:
        """Repeat failed refreshes in float64; returns what is to be said, each block once."""
        return self._repairs.repeat(self.state.stacks)

    def _block_name(self, number: int, position: int) -> str:
        block = self.plan.stacks[number].blocks[position]
        return f"{self.members[block.param].name}, block {block.index}"

    def _refresh_anew(self, number: int, wide: State, failing: Tensor) -> State:
        """What a refresh gives for state in float64 of blocks at ``failing``."""
        members = self._members_of[number][failing.cpu().numpy()]
        options = self.members[members[0]].options
        if options.get("root_method") in ("auto", "newton", "newton_schulz"):
            # Products find no root where rounding left an eigenvalue below zero, in float64 either.
            options = options | {"root_method": "eigh"}
        everyone = torch.arange(len(failing), device=self.device)
        step = self.step_count[self._on_device(members)]
        clock = Clock(step, ready=False, starts_at_one=torch.zeros_like(step, dtype=torch.bool))
        new = self.rule.refresh(wide, everyone, clock, self.plan.stacks[number].shape, options)
        if CONDITION in new:  # only told: it fails nothing where it is more than is kept of it
            kept = self.state.stacks[number][CONDITION].dtype
            new[CONDITION] = new[CONDITION].clamp(max=torch.finfo(kept).max)
        return new


def plain_work(
    rule: Rule, state: State, grad: Tensor, clock: Clock, options: Mapping[str, Any]
) -> Tensor:
    """Directions of a stack, ``(n, *block)``: all its arithmetic in a step without a refresh."""
    rule.accumulate_(state, grad, clock, options)
    return rule.direction(state, grad, clock, options)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one graph for each combination of shapes and options, however many."""
    inner = torch.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def outer(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (those of function)
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            return inner(*args, **kwargs)

    return outer
