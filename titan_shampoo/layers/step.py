"""What the steps of all methods for layers share: settings, sums over tiles, moved parameters."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.agreement import CheckedValues
from titan_shampoo.distributed.gradients import Grads
from titan_shampoo.distributed.layout import local_tensor
from titan_shampoo.distributed.plan import Holding
from titan_shampoo.distributed.tiles import all_reduce_together
from titan_shampoo.functional.descent import descend_
from titan_shampoo.functional.heavy_ball import Motion, move_by_buffers_, rank_one_
from titan_shampoo.functional.scaling import Scaling, global_scale
from titan_shampoo.layers.bunches import Bunch
from titan_shampoo.layers.layer import Layer, decayed, motion_of
from titan_shampoo.step_status import norms_of

SCALARS = torch.float64
"""Dtype of scalars of layers: float32 does not hold powers of small and of large gradients."""

MAX_KEPT = 1000
"""Vectors of settings that are kept on the device; schedules change them without end."""


class LayerStep:
    """State and step of the layers that one method preconditions.

    Args:
        layers: What is preconditioned.
        pipeline_group: Ranks with the other stages of a pipeline; None without one.
    """

    def __init__(self, layers: Sequence[Layer], pipeline_group: dist.ProcessGroup | None) -> None:
        self.layers = list(layers)
        self.device = layers[0].weight.device
        wide = any(layer.dtype == torch.float64 for layer in layers)
        self.dtype = torch.float64 if wide else torch.float32
        """Of what all layers have in common."""
        self._pipeline_group = pipeline_group
        self.beyond = torch.zeros((), device=self.device)
        """1 where a direction of the last step was beyond the range of its dtype and rested."""
        self._constants: dict[tuple[float, ...], Tensor] = {}
        self.momentum = {
            param: torch.zeros_like(param, memory_format=torch.contiguous_format)
            for layer in layers
            if layer.options["momentum"] > 0
            for param in (layer.weight, layer.bias)
            if param is not None
        }

    def prepare(self) -> None:
        """Have the coming backward passes measure what the step after them wants."""

    def observe(self, taken: Tensor | None) -> None:
        """Take what the layers have measured since they were reset.

        Args:
            taken: Whether anything is to change, 0-dim bool on the device; None where the host
                knows that it is.
        """
        raise NotImplementedError

    def step(self, grads: Grads, norms: Grads, taken: Tensor | None) -> None:
        """One step for the layers whose local gradients are given, with norms of some of them.

        Args:
            grads: Zero where the step is not taken.
            norms: Likewise.
            taken: As for :meth:`observe`.
        """
        raise NotImplementedError

    def pass_time(self) -> None:
        """Let the schedule go on in a step that the host leaves out."""

    def worst_failure(self) -> Tensor:
        """Largest number of refreshes in a row that failed for any block here, 0-dim."""
        return torch.zeros((), dtype=self.dtype, device=self.device)

    def repair(self) -> list[str]:
        """Repeat failed refreshes in float64; returns what is to be said, each block once."""
        return []

    def facts(self) -> list[CheckedValues]:
        """Of each layer, what its ranks must know alike."""
        return [
            {
                "number of its stacking dims": layer.batch_dims,
                "whether its bias is joined to it": layer.bias is not None,
                "divisor of its gradients": layer.gradient_divisor,
                "sharding of its layer": None if layer.tapped is None else layer.tapped.sharding,
            }
            for layer in self.layers
        ]

    def state(self, number: int) -> dict[str, Tensor]:
        """State of the weight of one layer on this rank, by names without ranks."""
        raise NotImplementedError

    def sharded_state(self, number: int) -> dict[str, Tensor]:
        """The same as global tensors, which do not depend on the mesh."""
        return self.state(number)

    def holdings(self) -> list[list[Holding]]:
        """Blocks of each layer, by their shape; empty for a method without blocks."""
        return []

    def statistics(self) -> list[Tensor]:
        """What this rank's layers have summed since they were reset."""
        raise NotImplementedError

    def norms(self) -> list[Tensor]:
        """Norms of these, 0-dim, or whatever else is finite if and only if they are."""
        return norms_of(self.statistics())

    def unseen(self) -> list[str]:
        """Layers of which no rank saw a row since the taps were reset; asks the device."""
        by_group: dict[Any, list[tuple[str, Tensor]]] = defaultdict(list)
        for layer in self.layers:
            if layer.tapped is not None:
                count = layer.tapped.input_sum[..., -1].sum().to(self.dtype)
                by_group[layer.tile.token_group].append((layer.name, count))
        unseen = []
        for group, counts in by_group.items():
            names, rows_here = zip(*counts, strict=True)
            seen = torch.stack(all_reduce_together(rows_here, group)).tolist()
            unseen += [name for name, rows in zip(names, seen, strict=True) if rows == 0]
        return unseen

    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """Numbers of the last step by layer, 0-dim."""
        raise NotImplementedError

    @property
    def failed_refreshes(self) -> int:
        """Refreshes on this rank that were not taken since the start."""
        return 0

    @property
    def scaling(self) -> Scaling | None:
        """How the whole step is scaled; the same in all groups."""
        scaling: Scaling | None = self.layers[0].options["scaling"]
        return scaling

    def learning_rates(self) -> Tensor | None:
        """That of each layer where the global scale depends on it; else None."""
        return self.option("lr") if self.scaling == "kl_clip" else None

    def option(self, name: str) -> Tensor:
        """One option of each layer, ``(layers,)``."""
        return self.constant([layer.options[name] for layer in self.layers])

    def constant(self, numbers: Sequence[float]) -> Tensor:
        """Numbers of the host on the device; kept, as schedules change few of them."""
        key = tuple(map(float, numbers))
        if key not in self._constants:
            if len(self._constants) >= MAX_KEPT:
                self._constants.clear()
            # From pinned memory: the host does not wait until an accelerator has read it. Meta
            # tensors are those of a plan, on a machine that need not have one.
            pinned = self.device.type not in ("cpu", "meta")
            on_host = torch.tensor(key, dtype=SCALARS, pin_memory=pinned)
            self._constants[key] = on_host.to(self.device, non_blocking=True)
        return self._constants[key]

    @staticmethod
    def summed_over_tiles(table: Tensor, parts: Sequence[Layer | Bunch]) -> Tensor:
        """Scalars of whole layers, ``(rows, k)``: one all-reduce for each group of tiles.

        Args:
            table: Scalars of this rank's tiles; a row for each matrix of each part.
            parts: Layers, or bunches of them, in the order of the rows.
        """
        numbers: dict[Any, list[int]] = defaultdict(list)
        for number, part in enumerate(parts):
            numbers[part.tile.group].append(number)
        rows = list(table.split([part.num_matrices for part in parts]))
        for group, some in numbers.items():
            sums = all_reduce_together([rows[number] for number in some], group)
            for number, row in zip(some, sums, strict=True):
                rows[number] = row
        return torch.cat(rows)

    def scale_of_all_stages(self, sums: Tensor) -> Tensor:
        """The global scale, 0-dim.

        Args:
            sums: Numerator and denominator over the layers of this stage, ``(2,)``.
        """
        assert self.scaling is not None, "there is nothing to scale by"
        if self._pipeline_group is not None:
            sums = summed_over_stages(self.scaling, sums, self._pipeline_group)
        return global_scale(self.scaling, sums)

    def decayed(self, grads: Grads, taken: Tensor | None) -> Grads:
        """The gradients with coupled weight decay; zero where the step is not ``taken``."""
        found = {
            param: decayed([param], [grads[param]], layer.options)[0]
            for layer in self.layers
            for param in (layer.weight, layer.bias)
            if param is not None and param in grads
        }
        if taken is None:
            return found
        return {param: grad.where(taken, 0.0) for param, grad in found.items()}

    def decays_gradients(self) -> bool:
        """Whether any group has coupled weight decay."""
        return any(layer.options["weight_decay_type"] == "l2" for layer in self.layers)


def summed_over_stages(scaling: Scaling, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Numerator and denominator over the layers of all stages of a pipeline, ``(2,)``.

    Every stage calls it, one without layers with zeros; in float64, as their dtypes may differ.
    """
    total = sums.to(torch.float64, copy=True)
    dist.all_reduce(total, group=group)
    total = total.to(sums.dtype)
    # But for "norm", the numerator is a constant and no sum.
    return total if scaling == "norm" else torch.cat([sums[:1], total[1:]])


class Moves:
    """The parameters of one group that a step moves, gathered to be moved together."""

    def __init__(self, motion: Motion) -> None:
        self.motion = motion
        self._whole: list[tuple[Tensor, Tensor, Tensor]] = []
        self._fused: list[tuple[Tensor, Tensor]] = []

    def add_rank_one(
        self,
        param: Tensor,
        grad: Tensor,
        left: Tensor,
        right: Tensor,
        factor: Tensor,
        momentum: Grads,
    ) -> None:
        """Take the direction ``factor grad - left right^T`` of ``param``, or of each of a stack."""
        motion = self.motion
        buffer = local_tensor(momentum[param]) if motion.has_ball else None
        if buffer is not None and motion.fuses(buffer, grad):
            target, keep, beta = buffer.view(grad.shape), motion.keep, motion.rates.momentum
            rank_one_(target, grad, left * keep, right, factor * keep, beta=beta)
            self._fused.append((local_tensor(param), buffer))
        else:
            target = torch.empty_like(grad)
            self.add_whole(param, rank_one_(target, grad, left, right, factor, beta=0.0), momentum)

    def add_rank_one_stack(
        self,
        params: Sequence[Tensor | None],
        grads: Tensor,
        left: Tensor,
        right: Tensor,
        factor: Tensor,
        momentum: Grads,
    ) -> None:
        """Take such directions of several parameters, ``(n, ...)`` each; of None there is none."""
        found = rank_one_(torch.empty_like(grads), grads, left, right, factor, beta=0.0)
        for param, direction in zip(params, found.unbind(), strict=True):
            if param is not None:
                self.add_whole(param, direction, momentum)

    def add_whole(self, param: Tensor, direction: Tensor, momentum: Grads) -> None:
        """Take a direction that is stored; it is changed."""
        local = local_tensor(param)
        buffer = local_tensor(momentum[param]) if self.motion.has_ball else direction
        self._whole.append((local, direction.view(local.shape), buffer))

    def finish(self) -> None:
        """Move all of them."""
        params, buffers = _columns(self._fused, 2)
        move_by_buffers_(params, buffers, self.motion)
        params, directions, buffers = _columns(self._whole, 3)
        if params:
            descend_(
                params,
                directions,
                buffers if self.motion.has_ball else [],
                self.motion.rates,
                dampening=self.motion.dampening,
                nesterov=self.motion.nesterov,
            )


def moves_of(layer: Layer, moves: dict[int, Moves], taken: Tensor | None) -> Moves:
    """The moves of a layer's group, one of ``moves``."""
    key = id(layer.options)
    if key not in moves:
        moves[key] = Moves(motion_of(layer.options, taken, layer.dtype))
    return moves[key]


def _columns(rows: Sequence[tuple[Tensor, ...]], width: int) -> list[list[Tensor]]:
    return [[row[column] for row in rows] for column in range(width)]
