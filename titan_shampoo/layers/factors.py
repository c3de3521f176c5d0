"""Kronecker factors and their inverses, with the owners of blocks: averages, refreshes, repairs.

Every stack of blocks has one dictionary of state, ``(n, ...)`` each. When a block is due is decided
on the host, without asking the device.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from titan_shampoo.distributed.plan import Block, Plan, Stack
from titan_shampoo.distributed.state import BlockTensor
from titan_shampoo.functional.kfac import (
    Damping,
    State,
    bounded,
    direction,
    refreshed,
    state_shapes,
)
from titan_shampoo.functional.roots import semidefinite
from titan_shampoo.layers.layer import Layer
from titan_shampoo.layers.moments import BlockKey
from titan_shampoo.repair import Repairs, put_, take_, worst_failure


class Factors:
    """Factors and inverses of the blocks that this rank owns.

    Args:
        layers: In the plan's order.
        plan: Their blocks, owners and turns.
        two_sided: K-FAC, else FOOF.
    """

    def __init__(self, layers: Sequence[Layer], plan: Plan, *, two_sided: bool) -> None:
        self.layers, self.plan, self.two_sided = layers, plan, two_sided
        self.device = layers[0].weight.device
        self.holdings = plan.holdings()
        self.states = [self._empty_state(stack) for stack in plan.stacks]
        self.failed = torch.zeros((), dtype=torch.int64, device=self.device)
        """Refreshes that were not taken since the start."""
        self._repairs = Repairs(self._block_name, self._refresh_anew)
        self._places: dict[tuple[int, ...], Tensor] = {}
        self._waiting_until = [0] * len(plan.stacks)
        """Step before which a stack may have blocks that are yet to be refreshed."""
        self._blocks: list[list[Block]] = [[] for _ in layers]
        """All blocks of each layer."""
        for block in plan.blocks:
            self._blocks[block.param].append(block)
        self._owned: list[list[tuple[Block, int, int]]] = [[] for _ in layers]
        """This rank's blocks of each layer, with their stacks and their places in these."""
        for number, stack in enumerate(plan.stacks):
            for position, block in enumerate(stack.blocks):
                self._owned[block.param].append((block, number, position))

    def _empty_state(self, stack: Stack) -> State:
        """Zero, but for inverses: until the first refresh, a direction is its gradient."""
        layer = self.layers[stack.blocks[0].param]
        shapes = state_of_block(stack.shape, layer.options, two_sided=self.two_sided)
        state = {
            name: torch.zeros((len(stack.blocks), *shape), dtype=layer.dtype, device=self.device)
            for name, shape in shapes.items()
        }
        for name, value in state.items():
            if name.endswith(("inverse", "basis")):
                value.diagonal(dim1=-2, dim2=-1).fill_(1.0)
            elif name == "damping":
                value.fill_(1.0)
        return state

    def average_(
        self, chosen: Sequence[int], sums: Mapping[BlockKey, Sequence[Tensor]], taken: Tensor | None
    ) -> None:
        """Add the moments of a batch.

        Args:
            chosen: Layers that have any.
            sums: Of each block here: number of rows, sums of right and left moment.
            taken: Whether the batch counts, 0-dim bool; None where the host knows that it does.
        """
        wanted = set(chosen)
        for state, stack in zip(self.states, self.plan.stacks, strict=True):
            for position, block in enumerate(stack.blocks):
                if block.param in wanted:
                    one = {name: value[position] for name, value in state.items()}
                    new = sums[block.param, block.index]
                    if taken is not None:
                        new = [part.where(taken, 0.0) for part in new]  # as if without rows
                    self._average(one, block, new)

    def _average(self, state: State, block: Block, sums: Sequence[Tensor]) -> None:
        """``F <- decay F + (1 - decay) new``, the first as it is; nothing without rows."""
        layer = self.layers[block.param]
        rows, right, *left = sums[0].squeeze(), *sums[1:]
        keep = torch.full_like(rows, layer.options["statistics_decay"])
        weight = (rows > 0) * (1 - torch.where(state["batches"] == 0, 0.0, keep))
        new = {"right": right / rows.clamp(min=1)}
        if left:
            normaliser = layer.options["loss_normaliser"]
            count = rows if normaliser is None else float(normaliser)
            new["left"] = left[0] * (count / layer.gradient_divisor**2)
        for name, value in new.items():
            state[name].lerp_(value, weight)
        state["batches"] += rows > 0

    def direction(self, number: int, grad: Tensor) -> Tensor:
        """Preconditioned gradients of one stack, ``(n, rows, columns)``."""
        return direction(self.states[number], grad)

    def refresh_(self, number: int, cursor: int, taken: Tensor | None) -> None:
        """New inverses of the blocks of one stack that are due, where they are finite.

        Args:
            number: Of the stack.
            cursor: Steps before this one.
            taken: As for :meth:`average_`.
        """
        state, options = self.states[number], self._options_of(number)
        in_turn = self._due_blocks(number, cursor)
        due = [place for place in in_turn if self._is_trained(number, place)]
        period = int(options["precondition_frequency"])
        if len(due) < len(in_turn):  # once it is trained, a frozen layer waits for its next turn
            self._waiting_until[number] = cursor + period + int(options["factor_frequency"])
        if cursor < max(period, self._waiting_until[number]):
            self._bound_those_that_wait(number)
        if not due:
            return
        chosen = self._on_device(due)
        old = {name: value[chosen] for name, value in state.items()}
        new = self._inverted(number, old, refreshed)
        here = old["batches"] > 0 if taken is None else (old["batches"] > 0) & taken
        self.failed += take_(state, chosen, new, here)

    def _inverted(self, number: int, state: State, how: Callable[..., State]) -> State:
        """What directions need of the factors in ``state``, of blocks of one stack."""
        options = self._options_of(number)
        return how(
            state.get("left"),
            state["right"],
            torch.full_like(state["batches"], float(options["damping"])),
            "factored" if options.get("factored_damping", True) else "exact",
            is_relative=options["damping_mode"] == "relative",
        )

    def _bound_those_that_wait(self, number: int) -> None:
        """Until a block's first refresh, its direction is at most as long as by its inverse."""
        state = self.states[number]
        everyone = self._on_device(range(len(state["batches"])))
        waiting = (state["refreshes"] == 0) & (state["batches"] > 0)
        put_(state, everyone, self._inverted(number, state, bounded), waiting)

    def _is_trained(self, number: int, position: int) -> bool:
        """Whether the weight that a block belongs to is not frozen."""
        block = self.plan.stacks[number].blocks[position]
        return self.layers[block.param].weight.requires_grad

    def worst_failure(self) -> Tensor:
        """Largest number of refreshes in a row that failed for any block here, 0-dim."""
        return worst_failure(self.states, self.device)

    def repair(self) -> list[str]:
        """Repeat failed refreshes in float64; returns what is to be said, each block once."""
        return self._repairs.repeat(self.states)

    def _block_name(self, number: int, position: int) -> str:
        block = self.plan.stacks[number].blocks[position]
        return f"{self.layers[block.param].name}, block {block.index}"

    def _refresh_anew(self, number: int, wide: State, _failing: Tensor) -> State:
        """What a refresh gives for state in float64 of some blocks.

        Of factors without the negative eigenvalues that rounding left, which damping may not lift.
        """
        factors = {name: semidefinite(wide[name]) for name in ("left", "right") if name in wide}
        return self._inverted(number, wide | factors, refreshed)

    def _options_of(self, number: int) -> dict[str, Any]:
        """The parameter group of a stack."""
        return self.layers[self.plan.stacks[number].blocks[0].param].options

    def _on_device(self, places: Sequence[int]) -> Tensor:
        """Positions on the device; kept, as few occur, so that steps do not wait for copies."""
        key = tuple(places)
        if key not in self._places:
            self._places[key] = torch.tensor(key, device=self.device)
        return self._places[key]

    def _due_blocks(self, number: int, cursor: int) -> list[int]:
        """Positions of the blocks of a stack that are refreshed in this step, each in its turn."""
        stack, options = self.plan.stacks[number], self._options_of(number)
        period = int(options["precondition_frequency"])
        turn = cursor % period
        if options["refresh"] == "together":
            return list(range(len(stack.blocks))) if turn == 0 else []
        return [place for place, block in enumerate(stack.blocks) if block.slot % period == turn]

    def state(self, number: int) -> State:
        """State of this rank's blocks of one layer: views, ``(blocks of that shape, ...)``.

        Keys are the same on all ranks; ``"right.128x64"`` is of blocks of 128 rows.
        """
        state = {}
        for holding in self.holdings[number]:
            shapes = state_of_block(
                holding.shape, self.layers[number].options, two_sided=self.two_sided
            )
            for name, shape in shapes.items():
                if holding.places:
                    view = holding.part_of(self.states[holding.stack][name])
                else:
                    dtype = self.layers[number].dtype
                    view = torch.zeros((0, *shape), dtype=dtype, device=self.device)
                state[f"{name}.{holding.suffix}"] = view
        return state

    def sharded(self, number: int) -> State:
        """State of one layer as global tensors: one for each size of block, ``"right.128x64"``."""
        param, options = self.plan.params[number], self.layers[number].options
        counts: dict[tuple[int, ...], int] = defaultdict(int)
        places, sizes = {}, {}
        for block in self._blocks[number]:
            places[block.index] = counts[block.shape]
            counts[block.shape] += 1
            sizes[block.shape] = state_of_block(block.shape, options, two_sided=self.two_sided)
        chunks: dict[str, dict[tuple[int, ...], Tensor]] = defaultdict(dict)
        for block, values in self._views(number):
            for name, value in values.items():
                start = (places[block.index], *[0] * value.ndim)
                chunks[_global_key(name, block.shape)][start] = value.unsqueeze(0)
        return {
            _global_key(name, extent): BlockTensor(
                (counts[extent], *shape), chunks[_global_key(name, extent)], param.dtype
            )
            for extent, shapes in sizes.items()
            for name, shape in shapes.items()
        }

    def _views(self, number: int) -> Iterator[tuple[Block, State]]:
        """This rank's blocks of one layer, with views of their state."""
        for block, stack, position in self._owned[number]:
            yield block, {name: value[position] for name, value in self.states[stack].items()}


def state_of_block(
    shape: tuple[int, ...], options: Mapping[str, Any], *, two_sided: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the state of a block of ``shape``, by name."""
    rows, columns = shape
    kind: Damping | None = None
    shapes: dict[str, tuple[int, ...]] = {"batches": (), "refreshes": (), "failures": ()}
    if two_sided:
        kind = "factored" if options["factored_damping"] else "exact"
        shapes["left"] = (rows, rows)
    shapes["right"] = (columns, columns)
    return shapes | state_shapes((rows, columns), kind)


def _global_key(name: str, shape: tuple[int, ...]) -> str:
    return f"{name}.{shape[0]}x{shape[1]}"
