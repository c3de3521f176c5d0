"""The step of FOOF and K-FAC: mathematics meets distribution.

Matrices of layers are cut into blocks (one, unless ``max_factor_dim`` says otherwise), which travel
to their owners and back as the blocks of Shampoo do, and are refreshed in turn. Only owners store
factors and inverses.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.agreement import CheckedValues
from titan_shampoo.distributed.exchange import exchange_in_turn
from titan_shampoo.distributed.geometry import Grid
from titan_shampoo.distributed.gradients import Grads
from titan_shampoo.distributed.layout import Sharding, layout_of
from titan_shampoo.distributed.plan import Cost, Holding, Parameter, Stack, make_plan
from titan_shampoo.distributed.summary import Summary, summarize
from titan_shampoo.functional.scaling import scaling_sums
from titan_shampoo.layers.factors import Factors, state_of_block
from titan_shampoo.layers.layer import Layer
from titan_shampoo.layers.moments import Moments
from titan_shampoo.layers.step import SCALARS, LayerStep, Moves, moves_of
from titan_shampoo.layers.turns import (
    block_edges,
    inversion_cost,
    inversion_turns,
    moment_turns,
)
from titan_shampoo.whole_model import Described
from titan_shampoo.workspace import Workspace

State = dict[str, Tensor]


class KroneckerStep(LayerStep):
    """State and step of the layers that are preconditioned by Kronecker factors.

    Args:
        layers: What is preconditioned.
        two_sided: K-FAC, else FOOF.
        replicas: Ranks that hold plain tensors as replicas.
        whole_model: All parameters, where these layers are a part of the model only; refreshes and
            moments are spread over all.
        pipeline_group: Ranks with the other stages of a pipeline; None without one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        two_sided: bool,
        replicas: dist.ProcessGroup | None,
        whole_model: Sequence[Described] | None,
        pipeline_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(layers, pipeline_group)
        self.two_sided = two_sided
        self.cursor = torch.zeros((), dtype=torch.int64)
        """Steps taken, on the host, where it is decided which of them accumulate and refresh."""
        groups = {id(layer.options): layer.options for layer in layers}
        numbers = {group: number for number, group in enumerate(groups)}
        planned = [self._planned(layer, numbers[id(layer.options)], replicas) for layer in layers]
        self.plan = make_plan(planned, inversion_turns(planned, whole_model))
        self.factors = Factors(self.layers, self.plan, two_sided=two_sided)
        self._scalars: Tensor | None = None
        self._workspace = Workspace(self.device)
        self._moments = Moments(self.layers, self.plan, two_sided=two_sided)
        periods = [layer.options["factor_frequency"] for layer in layers]
        self.turns = moment_turns(planned, periods, whole_model, two_sided=two_sided)
        """In which of ``factor_frequency`` steps moments of each layer are formed."""

    def _planned(self, layer: Layer, group: int, replicas: dist.ProcessGroup | None) -> Parameter:
        """The joint matrix of weight and bias, cut like the weight."""
        placement_group, sharding = layout_of(layer.weight, replicas, layer.name)
        if layer.is_transposed:
            cuts = tuple((axis, 1 - dim) for axis, dim in sharding.cuts)
            sharding = Sharding(sharding.num_shards, cuts)
        shape: tuple[int, ...] = tuple(layer.shape)
        rows, columns = shape[0], math.prod(shape[1:])
        if layer.bias is not None:
            if any(dim > 0 for _, dim in sharding.cuts):
                raise ValueError(f"{layer.name}: its columns are cut, so that its bias cannot be "
                                 "one of them; set bias='separate'")  # fmt: skip
            columns += 1
            shape = (rows, columns)
        edges = block_edges(rows, columns, layer.options)
        grid = Grid(((0,), tuple(range(1, len(shape)))), (rows, columns), edges, 0)
        return Parameter(
            name=layer.name,
            shape=shape,
            grid=grid,
            placement_group=placement_group,
            sharding=sharding if sharding.cuts else Sharding(sharding.num_shards, ()),
            group=group,
            dtype=layer.dtype,
            period=layer.options["precondition_frequency"],
            is_staggered=layer.options["refresh"] == "staggered",
            cost=lambda extent: Cost(2.0 * math.prod(extent) * sum(extent), inversion_cost(extent)),
            state=lambda extent: {
                name: math.prod(shape) * layer.dtype.itemsize
                for name, shape in state_of_block(
                    extent, layer.options, two_sided=self.two_sided
                ).items()
            },
        )

    # Schedule and statistics

    def prepare(self) -> None:
        """Have the coming backward passes form moments where they are wanted."""
        cursor = int(self.cursor)
        trained = [n for n, layer in enumerate(self.layers) if layer.weight.requires_grad]
        self._moments.collect([n for n in trained if self._is_measured(n, cursor)])

    def _is_measured(self, number: int, cursor: int) -> bool:
        """Whether the step that comes forms the moments of a layer: the first, then in its turn."""
        options = self.layers[number].options
        period = int(options["factor_frequency"])
        turn = self.turns[number] if options["refresh"] == "staggered" else 0
        return cursor == 0 or cursor % period == turn % period

    def pass_time(self) -> None:
        """Let the schedule go on."""
        self.cursor += 1

    def observe(self, taken: Tensor | None) -> None:
        """Sum up moments at the owners of blocks and average them there."""
        chosen = self._moments.collected()
        self.factors.average_(chosen, self._moments.of_owned_blocks(chosen), taken)

    # Directions

    def step(self, grads: Grads, norms: Grads, taken: Tensor | None) -> None:
        """One step for the layers whose local gradients are given."""
        if self.decays_gradients():
            grads = self.decayed(grads, taken)
        for number in range(len(self.plan.stacks)):
            self.factors.refresh_(number, int(self.cursor), taken)
        matrices = {
            number: self._joint(layer, grads)
            for number, layer in enumerate(self.layers)
            if layer.moves(grads)
        }
        directions = self._directions(matrices)
        scale, fits = self._scale(matrices, directions)
        moves: dict[int, Moves] = {}
        for number, found in directions.items():
            layer = self.layers[number]
            group = moves_of(layer, moves, taken)
            found = found * scale.to(found.dtype)
            if self.device.type != "cpu" or not fits[number]:
                found = torch.where(fits[number], found, 0.0)
            columns = math.prod(layer.tile.shape[1:])
            if layer.weight in grads:
                stored = layer.as_stored(found[:, :columns])
                group.add_whole(layer.weight, stored, self.momentum)
            if layer.bias is not None and layer.bias in grads:
                bias = found[layer.bias_rows, columns].contiguous()
                group.add_whole(layer.bias, bias, self.momentum)
        for group in moves.values():
            group.finish()
        self.pass_time()

    @staticmethod
    def _joint(layer: Layer, grads: Grads) -> Tensor:
        """This rank's rows of ``[dW | dbias]``."""
        matrix = layer.gradient(grads)
        if layer.bias is None:
            return matrix.contiguous()
        column = matrix.new_zeros(len(matrix), 1)
        if layer.bias in grads:
            column[layer.bias_rows, 0] = grads[layer.bias].to(layer.dtype)
        return torch.cat([matrix, column], dim=1)

    def _directions(self, matrices: dict[int, Tensor]) -> dict[int, Tensor]:
        """Preconditioned gradients, like ``matrices``: there and back as the plan says."""
        flat = {number: matrix.view(-1) for number, matrix in matrices.items()}
        sizes = [self._stack_size(stack) for stack in self.plan.stacks]
        stacks = dict(enumerate(self._workspace.tensors("stack", sizes)))
        in_stacks = {number: stack.view(-1) for number, stack in stacks.items()}
        sizes = [(matrix.shape, matrix.dtype) for matrix in matrices.values()]
        directions = dict(zip(matrices, self._workspace.tensors("direction", sizes), strict=True))
        shards = {number: found.view(-1) for number, found in directions.items()}

        def replace(number: int) -> None:
            stacks[number].copy_(self.factors.direction(number, stacks[number]))

        exchange_in_turn(self.plan.buckets, self.device, flat, in_stacks, shards, replace)
        return directions

    def _stack_size(self, stack: Stack) -> tuple[torch.Size, torch.dtype]:
        size = torch.Size((len(stack.blocks), *stack.shape))
        return size, self.layers[stack.blocks[0].param].dtype

    def _scale(
        self, matrices: dict[int, Tensor], directions: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The global scale, 0-dim, and which directions are within the range, ``(layers,)``.

        Also keeps ``<P, G>, |P|^2, |G|^2`` of each layer.
        """
        nothing = torch.zeros(3, dtype=SCALARS, device=self.device)
        rows = [nothing] * len(self.layers)
        for number, grad in matrices.items():
            found, grad = directions[number].flatten(), grad.flatten()
            scalars = torch.stack([found.dot(grad), found.dot(found), grad.dot(grad)])
            rows[number] = scalars.to(SCALARS)
        table = torch.stack(rows)
        if self.scaling is not None:
            table = self.summed_over_tiles(table, self.layers)
        fits = table.isfinite().all(1)
        self.beyond = (~fits).any()
        self._scalars = table = torch.where(fits[:, None], table, 0.0)
        if self.scaling is None:
            return torch.ones((), dtype=SCALARS, device=self.device), fits
        kl_clip = float(self.layers[0].options["kl_clip"])
        inner, square, grad_square = table.unbind(1)
        damping, lr = self.option("damping"), self.learning_rates()
        sums = scaling_sums(self.scaling, inner, square, grad_square, damping, lr, kl_clip)
        return self.scale_of_all_stages(sums), fits

    # What others ask for

    def facts(self) -> list[CheckedValues]:
        """Of each layer, what its ranks must know alike."""
        planned = zip(super().facts(), self.plan.facts(), self.turns, strict=True)
        return [{**own, **plan, "turn of its moments": turn} for own, plan, turn in planned]

    def summary(self, like_parameters: Mapping[str, Mapping[int, int]]) -> Summary:
        """The plan in figures for every rank.

        Moments are sent once in ``factor_frequency`` steps: their bytes are the mean, their
        collectives those of a step that forms the moments of all layers.

        Args:
            like_parameters: Bytes on each rank of state that lies like its parameter, by kind.
        """
        summary = summarize(self.plan.params, self.plan.blocks, like_parameters)
        sums = self._moments.sum_bytes()
        # All ranks see all layers, and all of their inputs. In the first step, all have moments.
        most = self._moments.formed_bytes() + max(map(sum, sums))
        summary.working["moments of a batch"] = np.full(len(summary.ranks), float(most))
        if any(layer.tile.token_group is not None for layer in self.layers):
            periods = [layer.options["factor_frequency"] for layer in self.layers]
            by_layer = np.sum(sums, axis=0)
            summary.sent += float(np.sum(by_layer / periods))
            summary.collectives += len(sums)
        return summary

    def state(self, number: int) -> State:
        """State of this rank's blocks of one layer, and the cursor."""
        return {"cursor": self.cursor} | self.factors.state(number)

    def sharded_state(self, number: int) -> State:
        """The same as global tensors: one for each size of block."""
        return {"cursor": self.cursor} | self.factors.sharded(number)

    def holdings(self) -> list[list[Holding]]:
        """Blocks of each layer, by their shape."""
        return self.factors.holdings

    def worst_failure(self) -> Tensor:
        """Largest number of refreshes in a row that failed for any block here, 0-dim."""
        return self.factors.worst_failure()

    def repair(self) -> list[str]:
        """Repeat failed refreshes in float64; returns what is to be said, each block once."""
        return self.factors.repair()

    def statistics(self) -> list[Tensor]:
        """What this rank's layers have summed since they were reset."""
        return self._moments.here()

    def norms(self) -> list[Tensor]:
        """Bounds of these and of their sums over ranks, 0-dim."""
        return self._moments.bounds()

    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """``cosine`` of the angle between direction and gradient of each layer."""
        if self._scalars is None:
            return {}
        table = (
            self._scalars if self.scaling else self.summed_over_tiles(self._scalars, self.layers)
        )
        inner, square, grad_square = table.unbind(1)
        lengths = (square * grad_square).sqrt()
        cosine = torch.where(lengths > 0, inner / lengths, 1.0)
        return {layer.name: {"cosine": cosine[number]} for number, layer in enumerate(self.layers)}

    @property
    def failed_refreshes(self) -> int:
        """Refreshes on this rank that were not taken since the start."""
        return int(self.factors.failed)
