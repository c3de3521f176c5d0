"""State of the blocks that this rank owns: one tensor per name and stack, and views of it.

Keys name parameter, block and extent in global coordinates, never a rank.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_shampoo.block_memory import as_blocks
from titan_shampoo.distributed.plan import Block, Plan
from titan_shampoo.distributed.reports import values_of_owners
from titan_shampoo.distributed.state import BlockTensor
from titan_shampoo.functional.rule import BEYOND, CONDITION, Rule, State, StateShape
from titan_shampoo.functional.symmetric import pack

FAILURES = StateShape("failures", ())
"""How many refreshes of a block have failed in a row."""
REFRESHES = StateShape("refreshes", ())
"""How many refreshes of a block have been taken."""
UNKNOWN = 0.0
"""Condition number of a block that has not been refreshed since this process began."""


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter that the engine works on, with the group that holds its options."""

    name: str
    param: Tensor
    options: dict[str, Any]


class BlockState:
    """Everything that lives with the owner of a block.

    Args:
        members: Parameters in the plan's order.
        rule: Says what a block's state is.
        plan: Blocks and owners.
        device: Where the parameters lie.
    """

    def __init__(
        self, members: Sequence[Member], rule: Rule, plan: Plan, device: torch.device
    ) -> None:
        self._members, self._rule, self._plan, self._device = members, rule, plan, device
        self.stacks = [self._empty(number) for number in range(len(plan.stacks))]
        self.holdings = plan.holdings()
        self._owned: list[list[tuple[int, int, Block]]] = [[] for _ in members]
        for number, stack in enumerate(plan.stacks):
            for position, block in enumerate(stack.blocks):
                self._owned[block.param].append((number, position, block))

    def of_blocks(self, number: int) -> dict[str, Tensor]:
        """State of this rank's blocks of one parameter: views, ``(blocks of that shape, ...)``.

        Keys are the same on all ranks: ``"left.64x32"`` is of the blocks with 64 rows and 32
        columns, and has no rows where a rank owns none of them.
        """
        state = {}
        for holding in self.holdings[number]:
            for shape in self._shapes(holding.shape, number):
                if holding.places:
                    view = holding.part_of(self.stacks[holding.stack][shape.name])
                else:
                    view = torch.zeros((0, *shape.shape), dtype=self._dtype(shape, number),
                                       device=self._device)  # fmt: skip
                state[f"{shape.name}.{holding.suffix}"] = view
        return state

    def sharded(self, number: int) -> dict[str, Tensor]:
        """State of one parameter as global tensors, for distributed checkpoints.

        Matrices of extent ``d`` are one tensor ``(blocks with that extent, ...)`` named
        ``"left.<d>"``; state of the blocks' own shape is one tensor of the parameter's merged
        shape. Keys end in the fingerprint of a grid whose edges depend on the mesh.
        """
        mark = self._grid_mark(number)
        grid = self._plan.params[number].grid
        sizes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        chunks: dict[str, dict[tuple[int, ...], Tensor]] = {}
        places: dict[tuple[str, int], tuple[int, ...]] = {}
        for index, position in enumerate(grid.positions()):
            block_shape = grid.block_shape(position)
            for shape in self._shapes(block_shape, number):
                key = _global_key(shape) + mark
                dtypes[key] = self._dtype(shape, number)
                if shape.dim is not None:
                    count = sizes.get(key, (0,))[0]
                    sizes[key] = (count + 1, *shape.shape)
                    places[key, index] = (count, *[0] * len(shape.shape))
                elif shape.shape == block_shape:
                    sizes[key], places[key, index] = grid.merged_shape, grid.block_start(position)
                else:
                    sizes[key], places[key, index] = (grid.num_blocks,), (index,)
        for block, shape, value in self._views(number):
            key = _global_key(shape) + mark
            is_whole_block = shape.dim is None and shape.shape == block.shape
            extent = block.extent if is_whole_block else (1, *shape.shape)
            chunks.setdefault(key, {})[places[key, block.index]] = value.view(extent)
        return {
            key: BlockTensor(size, chunks.get(key, {}), dtypes[key]) for key, size in sizes.items()
        }

    def conditions(self) -> dict[str, Tensor]:
        """Condition number of each block of each parameter by name; every rank must ask."""
        counts = [param.grid.num_blocks for param in self._plan.params]
        starts = [0, *itertools.accumulate(counts)]
        owned = torch.full((starts[-1],), UNKNOWN, dtype=torch.float64, device=self._device)
        for stack, state in zip(self._plan.stacks, self.stacks, strict=True):
            places = [starts[block.param] + block.index for block in stack.blocks]
            owned[torch.tensor(places, device=self._device)] = state[CONDITION].flatten().double()
        parts = values_of_owners(owned, self._plan).split(counts)
        return {member.name: part for member, part in zip(self._members, parts, strict=True)}

    def _grid_mark(self, number: int) -> str:
        fingerprint = self._plan.params[number].grid.fingerprint
        return f".{fingerprint}" if fingerprint else ""

    def _empty(self, number: int) -> State:
        """State of a stack at the start, and the condition numbers of its blocks."""
        stack = self._plan.stacks[number]
        param = stack.blocks[0].param
        state = {}
        for shape in self._shapes(stack.shape, param):
            size = len(stack.blocks) * math.prod(shape.shape)
            memory = torch.zeros(size, dtype=self._dtype(shape, param), device=self._device)
            value = as_blocks(memory, shape.shape)
            if shape.starts_as_identity:
                identity = torch.eye(shape.extent, dtype=value.dtype, device=self._device)
                value.copy_(identity if len(shape.shape) == 2 else pack(identity))
            state[shape.name] = value
        # Beside what is saved: a resumed run learns it anew with the next refresh.
        dtype = self._plan.params[param].dtype
        state[CONDITION] = torch.full((len(stack.blocks), 1), UNKNOWN, dtype=dtype,
                                      device=self._device)  # fmt: skip
        if self._members[param].options.get("exponent") is not None:
            state[BEYOND] = torch.zeros(len(stack.blocks), dtype=torch.bool, device=self._device)
        return state

    def _views(self, number: int) -> Iterator[tuple[Block, StateShape, Tensor]]:
        """Each piece of state of this rank's blocks of one parameter."""
        for stack, position, block in self._owned[number]:
            for shape in self._shapes(block.shape, number):
                yield block, shape, self.stacks[stack][shape.name][position]

    def _shapes(self, block_shape: tuple[int, ...], number: int) -> list[StateShape]:
        return _all_shapes(self._rule, block_shape, self._members[number].options)

    def _dtype(self, shape: StateShape, number: int) -> torch.dtype:
        options = self._members[number].options
        return _dtype_of(shape, options, self._plan.params[number].dtype)


def state_bytes(
    rule: Rule, block_shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, int]:
    """Bytes of state of a block by name; ``dtype`` is that of the arithmetic."""
    return {
        shape.name: math.prod(shape.shape) * _dtype_of(shape, options, dtype).itemsize
        for shape in _all_shapes(rule, block_shape, options)
    }


def _all_shapes(
    rule: Rule, block_shape: tuple[int, ...], options: Mapping[str, Any]
) -> list[StateShape]:
    return [*rule.state_shapes(block_shape, options), FAILURES, REFRESHES]


def _dtype_of(shape: StateShape, options: Mapping[str, Any], default: torch.dtype) -> torch.dtype:
    chosen: torch.dtype | None = options.get(shape.dtype_option)
    return chosen or default


def _global_key(shape: StateShape) -> str:
    return shape.name if shape.dim is None else f"{shape.name}.{shape.extent}"
