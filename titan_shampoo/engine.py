"""The step of every method that works on blocks: mathematics meets distribution.

The plan says which blocks this rank owns and how they get here; the rule says what to do with a
stack of them. State is allocated here, once; its keys name the block in global coordinates and
never a rank.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titan_shampoo.distributed.exchange import Exchange
from titan_shampoo.distributed.layout import local_tensor
from titan_shampoo.distributed.plan import Block, Plan, Stack
from titan_shampoo.distributed.state import BlockTensor
from titan_shampoo.functional.rule import Clock, Rule, State, StateShape

CPU_TILE_NUMEL = 1 << 17
"""Elements of gradient per thread that are worked on at once, so that they stay in caches."""

FAILURES = StateShape("failures", ())
"""How many refreshes of a block have failed in a row."""

MAX_KEPT = 10_000
"""Index tensors that are kept on the device; patterns of missing gradients could be without end."""


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter that the engine works on, with the group that holds its options."""

    name: str
    param: Tensor
    options: dict[str, Any]


class Engine:
    """State and step of the parameters that one rule preconditions.

    Args:
        members: Parameters in the plan's order.
        rule: The mathematics.
        plan: Blocks, owners and copies for ``members``.
    """

    def __init__(self, members: Sequence[Member], rule: Rule, plan: Plan) -> None:
        self.members, self.rule, self.plan = members, rule, plan
        self.device = members[0].param.device
        self.step_count = torch.zeros(len(members), dtype=torch.int64, device=self.device)
        """Steps that each parameter has taken; bias corrections count from it."""
        self.cursor = torch.zeros(len(members), dtype=torch.int64)
        """The same on the host, where the refresh schedule is decided without asking the device."""
        self.states = [self._empty_state(number) for number in range(len(plan.stacks))]
        self.momentum = [
            self._empty_momentum(number) if member.options["momentum"] > 0 else None
            for number, member in enumerate(members)
        ]
        self.failed_refreshes = torch.zeros((), dtype=torch.int64, device=self.device)
        """Refreshes that were not taken since the start."""
        self._named: set[tuple[int, int]] = set()
        self._owned: list[list[tuple[int, int, Block]]] = [[] for _ in members]
        for number, stack in enumerate(plan.stacks):
            for position, block in enumerate(stack.blocks):
                self._owned[block.param].append((number, position, block))
        self._kept: dict[str, Tensor] = {}
        self._workspace: dict[str, list[Tensor]] = {}
        self._members_of = [
            np.array([block.param for block in stack.blocks]) for stack in plan.stacks
        ]
        self._turns_of = [np.array([block.turn for block in stack.blocks]) for stack in plan.stacks]

    @torch.no_grad()
    def step(self, grads: Mapping[int, Tensor]) -> None:
        """One step for the parameters whose local gradients are given, by number."""
        present = np.zeros(len(self.members), dtype=bool)
        present[list(grads)] = True
        self.cursor += torch.from_numpy(present)
        self.step_count += torch.from_numpy(present).to(self.device, non_blocking=True)
        grads = self._flat(self._decayed_gradients(grads))
        stacks = dict(enumerate(self._memory("stack", map(self._stack_size, self.plan.stacks))))
        exchanges = [Exchange(bucket, self.device) for bucket in self.plan.buckets]
        for exchange in exchanges:
            exchange.gather(grads, stacks)
        for bucket, exchange in zip(self.plan.buckets, exchanges, strict=True):
            exchange.fill_stacks(stacks)
            for number in bucket.stacks:
                self._replace_by_directions(number, stacks[number], present)
            exchange.scatter(stacks)
        sizes = [(grad.shape, self.plan.params[number].dtype) for number, grad in grads.items()]
        directions = dict(zip(grads, self._memory("direction", sizes), strict=True))
        for exchange in exchanges:
            exchange.finish(directions, stacks)
        self._apply(directions)

    def _replace_by_directions(self, number: int, grad: Tensor, present: NDArray[np.bool_]) -> None:
        """Gradients of one stack become directions; zero for parameters without a gradient."""
        here = present[self._members_of[number]]
        if not here.all():
            chosen = self._index(here)
            part = {name: value[chosen] for name, value in self.states[number].items()}
            direction = self._work(number, part, grad[chosen], here) if here.any() else 0
            grad.zero_()[chosen] = direction
            for name, value in part.items():
                self.states[number][name][chosen] = value
            return
        for tile in self._tiles(grad):
            part = {name: value[tile] for name, value in self.states[number].items()}
            grad[tile] = self._work(number, part, grad[tile], tile)

    def _tiles(self, grad: Tensor) -> Iterator[slice]:
        """Runs of blocks that are worked on together: all, or on a CPU what its caches hold."""
        count = len(grad)
        if self.device.type == "cpu":
            room = CPU_TILE_NUMEL * torch.get_num_threads()
            count = max(1, room // max(1, grad[0].numel()))
        for start in range(0, len(grad), count):
            yield slice(start, min(start + count, len(grad)))

    def _work(
        self, number: int, state: State, grad: Tensor, blocks: slice | NDArray[np.bool_]
    ) -> Tensor:
        """Accumulate, refresh what is due, and return the directions of the chosen blocks."""
        stack = self.plan.stacks[number]
        members = self._members_of[number][blocks]
        options = self.members[members[0]].options
        step = self.step_count[self._index(members)]
        time = self.cursor.numpy()[members]
        first, due = self._schedule(number, time, blocks, options)
        self.rule.accumulate_(state, grad, step, options)
        if due.any():
            chosen = self._index(due)
            before = Clock(
                step[chosen], self._mask((time > first)[due]), self._on_device((first == 1)[due])
            )
            new = self.rule.refresh(state, chosen, before, stack.shape, options)
            good = self._take(state, chosen, new)
            self.failed_refreshes += (~good).sum()
            failures = state[FAILURES.name]
            failures[chosen] = torch.where(good, 0, failures[chosen] + 1)
        clock = Clock(step, self._mask(time >= first), self._on_device(first == 1))
        return self.rule.direction(state, grad, clock, options)

    def _schedule(
        self,
        number: int,
        time: NDArray[np.int64],
        blocks: slice | NDArray[np.bool_],
        options: Mapping[str, Any],
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """First refresh of each block in its parameter's own steps, and whether it is due now."""
        period = options["precondition_frequency"]
        start = _start(options)
        if options["refresh"] == "together":
            return np.full_like(time, start), (time == start) | (
                (time > start) & (time % period == 0)
            )
        first = start + self._turns_of[number][blocks]
        return first, (time >= first) & ((time - first) % period == 0)

    @staticmethod
    def _take(state: State, chosen: Tensor, new: State) -> Tensor:
        """Take refreshed state of the chosen blocks where it is finite; returns where, ``(k,)``."""
        good = torch.ones_like(chosen, dtype=torch.bool)
        for value in new.values():
            good &= value.isfinite().flatten(1).all(1)
        for name, value in new.items():
            mask = good.view(-1, *[1] * (value.ndim - 1))
            state[name][chosen] = torch.where(
                mask, value.to(state[name].dtype), state[name][chosen]
            )
        return good

    def _decayed_gradients(self, grads: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The gradients with coupled weight decay added, never in place."""
        return {
            number: torch.add(
                grad, local_tensor(member.param), alpha=member.options["weight_decay"]
            )
            if member.options["weight_decay_type"] == "l2" and member.options["weight_decay"]
            else grad
            for number, grad in grads.items()
            for member in [self.members[number]]
        }

    @staticmethod
    def _flat(grads: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {number: grad.contiguous().view(-1) for number, grad in grads.items()}

    def _apply(self, directions: Mapping[int, Tensor]) -> None:
        """Weight decay, heavy ball and the parameter update, group by group."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for number in directions:
            key = (id(self.members[number].options), self._rests(number))
            groups.setdefault(key, []).append(number)
        for (_, rests), numbers in groups.items():
            options = self.members[numbers[0]].options
            params = [local_tensor(self.members[number].param) for number in numbers]
            steps = [directions[n].view(p.shape) for n, p in zip(numbers, params, strict=True)]
            decay = _decoupled_decay(options)
            if decay and not rests:
                torch._foreach_add_(steps, params, alpha=decay)
            if options["momentum"] > 0:
                steps = self._heavy_ball(numbers, steps, options)
            torch._foreach_add_(params, steps, alpha=-float(options["lr"]))

    def _rests(self, number: int) -> bool:
        """Whether this step does not move a parameter; see ``Rule.rests_at_first``."""
        options = self.members[number].options
        return (
            self.rule.rests_at_first and _start(options) == 1 and self.cursor.numpy()[number] == 1
        )

    def _heavy_ball(
        self, numbers: list[int], steps: list[Tensor], options: Mapping[str, Any]
    ) -> list[Tensor]:
        """``B <- mu B + (1 - d) P``; returns ``(1 - d) P + mu B`` (Nesterov) or ``B``."""
        momentum, keep = options["momentum"], 1 - options["dampening"]
        buffers = [local_tensor(self._momentum_of(number)) for number in numbers]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, steps, alpha=keep)
        if not options["nesterov"]:
            return buffers
        torch._foreach_mul_(steps, keep)
        torch._foreach_add_(steps, buffers, alpha=momentum)
        return steps

    def _momentum_of(self, number: int) -> Tensor:
        buffer = self.momentum[number]
        if buffer is None:
            buffer = self.momentum[number] = self._empty_momentum(number)
        return buffer

    def _empty_momentum(self, number: int) -> Tensor:
        dtype = self.plan.params[number].dtype
        return torch.zeros_like(self.members[number].param, dtype=dtype)

    def _stack_size(self, stack: Stack) -> tuple[torch.Size, torch.dtype]:
        size = torch.Size((len(stack.blocks), *stack.shape))
        return size, self.plan.params[stack.blocks[0].param].dtype

    def _memory(self, use: str, sizes: Iterable[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
        """Uninitialised tensors for one step.

        On a CPU they are kept for the next: the system clears fresh memory page by page, which
        costs as much as the element-wise arithmetic of a step. Accelerators' allocators do that.
        """
        wanted = list(sizes)
        kept = self._workspace.get(use, [])
        if [(tensor.shape, tensor.dtype) for tensor in kept] == wanted:
            return kept
        made = [torch.empty(size, dtype=dtype, device=self.device) for size, dtype in wanted]
        if self.device.type == "cpu":
            self._workspace[use] = made
        return made

    def _empty_state(self, number: int) -> State:
        stack = self.plan.stacks[number]
        first = stack.blocks[0].param
        dtype, options = self.plan.params[first].dtype, self.members[first].options
        state = {}
        for shape in self._state_shapes(stack.shape, options):
            size = (len(stack.blocks), *shape.shape)
            state[shape.name] = torch.zeros(size, dtype=dtype, device=self.device)
            if shape.starts_as_identity:
                state[shape.name].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return state

    def _index(self, values: NDArray[Any]) -> Tensor:
        """Positions (of a mask: where it is true) on the device; kept, as few of them occur."""
        return self._on_device(np.flatnonzero(values) if values.dtype == np.bool_ else values)

    def _mask(self, values: NDArray[np.bool_]) -> Tensor | bool:
        """One answer if it is the same for all, else a mask on the device."""
        if values.all() or not values.any():
            return bool(values[0])
        return self._on_device(values)

    def _on_device(self, values: NDArray[Any]) -> Tensor:
        key = values.dtype.str + values.tobytes().hex()
        if key not in self._kept:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[key] = torch.from_numpy(values.copy()).to(self.device)
        return self._kept[key]

    def block_state(self, number: int) -> dict[str, Tensor]:
        """Views of the state of this rank's blocks of one parameter: ``"left.3"`` for block 3."""
        return {
            f"{shape.name}.{block.index}{self._grid_mark(number)}": value
            for block, shape, value in self._owned_state(number)
        }

    def sharded_state(self, number: int) -> dict[str, Tensor]:
        """State of one parameter as global tensors, for distributed checkpoints.

        Factors of extent ``d`` are one ``(blocks with that extent, d, d)`` tensor named
        ``"left.<d>"``; state of the blocks' own shape is one tensor of the parameter's merged
        shape. Keys end in the fingerprint of a grid whose edges depend on the mesh.
        """
        mark = self._grid_mark(number)
        grid, options = self.plan.params[number].grid, self.members[number].options
        sizes: dict[str, tuple[int, ...]] = {}
        chunks: dict[str, dict[tuple[int, ...], Tensor]] = {}
        places: dict[tuple[str, int], tuple[int, ...]] = {}
        for index, position in enumerate(grid.positions()):
            for shape in self._state_shapes(grid.block_shape(position), options):
                key = _global_key(shape) + mark
                if shape is FAILURES:
                    sizes[key], places[key, index] = (grid.num_blocks,), (index,)
                elif shape.dim is None:
                    sizes[key], places[key, index] = grid.merged_shape, grid.block_start(position)
                else:
                    count = sizes.get(key, (0,))[0]
                    sizes[key] = (count + 1, *shape.shape)
                    places[key, index] = (count, *[0] * len(shape.shape))
        for block, shape, value in self._owned_state(number):
            key = _global_key(shape) + mark
            is_whole_block = shape.dim is None and shape is not FAILURES
            extent = block.extent if is_whole_block else (1, *shape.shape)
            chunks.setdefault(key, {})[places[key, block.index]] = value.view(extent)
        dtype = self.plan.params[number].dtype
        return {key: BlockTensor(size, chunks.get(key, {}), dtype) for key, size in sizes.items()}

    def _grid_mark(self, number: int) -> str:
        fingerprint = self.plan.params[number].grid.fingerprint
        return f".{fingerprint}" if fingerprint else ""

    def common_state(self, number: int) -> dict[str, Tensor]:
        """State of one parameter that every rank with a part of it holds."""
        buffer = self.momentum[number]
        state = {"step": self.step_count[number], "cursor": self.cursor[number]}
        return state if buffer is None else state | {"momentum": buffer}

    def _owned_state(self, number: int) -> Iterator[tuple[Block, StateShape, Tensor]]:
        """Each piece of state of this rank's blocks of one parameter."""
        options = self.members[number].options
        for stack, position, block in self._owned[number]:
            for shape in self._state_shapes(block.shape, options):
                yield block, shape, self.states[stack][shape.name][position]

    def _state_shapes(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[StateShape]:
        return [*self.rule.state_shapes(shape, options), FAILURES]

    def worst_failure(self) -> Tensor:
        """Largest number of failed refreshes in a row of any block here, 0-dim, on the device."""
        counts = [state[FAILURES.name].max().float() for state in self.states]
        return torch.stack([torch.zeros((), device=self.device), *counts]).max()

    @torch.no_grad()
    def repair(self) -> list[str]:
        """Repeat failed refreshes in float64; returns what is to be said, each block once.

        No communication: every rank sees to its own blocks.
        """
        said = []
        for number, state in enumerate(self.states):
            blocks = self.plan.stacks[number].blocks
            failing = state[FAILURES.name].nonzero().flatten()
            for position in failing.tolist():
                block = blocks[position]
                if (block.param, block.index) not in self._named:
                    self._named.add((block.param, block.index))
                    count = int(state[FAILURES.name][position])
                    name = self.members[block.param].name
                    said.append(f"{name}, block {block.index}: {count} refresh(es) in a row "
                                "failed; the last good one is kept")  # fmt: skip
            if len(failing):
                self._repeat_in_float64(number, state, failing)
        return said

    def _repeat_in_float64(self, number: int, state: State, failing: Tensor) -> None:
        members = self._members_of[number][failing.cpu().numpy()]
        options = self.members[members[0]].options
        wide = {name: value[failing].double() for name, value in state.items()}
        everyone = torch.arange(len(failing), device=self.device)
        step = self.step_count[self._index(members)]
        clock = Clock(step, ready=False, starts_at_one=torch.zeros_like(step, dtype=torch.bool))
        shape = self.plan.stacks[number].shape
        new = self.rule.refresh(wide, everyone, clock, shape, options)
        # A repetition is no refresh of its own: it mends a failure or leaves it as it was.
        failures = state[FAILURES.name]
        failures[failing] = torch.where(self._take(state, failing, new), 0, failures[failing])


def _start(options: Mapping[str, Any]) -> int:
    """First step in which a block may be refreshed."""
    return int(options["start_step"] or options["precondition_frequency"])


def _global_key(shape: StateShape) -> str:
    return shape.name if shape.dim is None else f"{shape.name}.{shape.shape[0]}"


def _decoupled_decay(options: Mapping[str, Any]) -> float:
    """Factor ``a`` of ``P <- P + a W`` (Loshchilov & Hutter 2019, and two variants)."""
    decay, kind = float(options["weight_decay"]), options["weight_decay_type"]
    if kind == "decoupled":
        return decay
    if kind == "corrected":
        return decay * float(options["lr"]) / options["peak_lr"]
    if kind == "independent":
        return decay / options["peak_lr"]
    return 0.0
