"""The step of Eva, Eva-f and Eva-s: mathematics meets distribution.

Every rank works on its own tiles. What is summed over ranks are vectors of statistics, and four
scalars per layer: ``|G|^2``, ``<G, V>`` and the squares of the two vectors of ``V``. A stack of
experts is as many layers as it has matrices, stepped together: its vectors and scalars have one row
for each. So are small layers of equal shape (``layers.bunches``). Tables of scalars have the same
rows on all ranks.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.gradients import Grads
from titan_shampoo.distributed.tiles import all_reduce_together
from titan_shampoo.functional.eva import (
    Curvature,
    Terms,
    curvature_square,
    marginal_sums,
    outer,
    root_mean_square,
    running_average_,
    terms,
)
from titan_shampoo.functional.roots import not_nothing
from titan_shampoo.functional.scaling import scaling_sums
from titan_shampoo.layers.averages import averages_of
from titan_shampoo.layers.bunches import Bunch, bunches_of
from titan_shampoo.layers.layer import Layer, Span
from titan_shampoo.layers.rows import RowsOfLayers
from titan_shampoo.layers.step import SCALARS, LayerStep, Moves, moves_of

_ROWS, _COLUMNS = slice(1), slice(1, None)

Vectors = list[Tensor]


class RankOneStep(LayerStep):
    """State and step of the layers that are preconditioned by one outer product each.

    Args:
        layers: What is preconditioned.
        curvature: Of which method.
        pipeline_group: Ranks with the other stages of a pipeline; None without one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        curvature: Curvature,
        pipeline_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(layers, pipeline_group)
        self.curvature = curvature
        self.averages = []
        if curvature != "gradient":
            self.averages = averages_of(layers, with_outputs=curvature == "input_output")
        self._place = {
            id(layer): (averages, position)
            for averages in self.averages
            for position, layer in enumerate(averages.layers)
        }
        self._bunches = bunches_of(layers)
        self._rows = RowsOfLayers(self._bunches, self.device)
        self._row_of = _rows_by_layer(self._bunches, self._rows)
        self.step_count = torch.zeros(len(self._rows), dtype=self.dtype, device=self.device)
        """Steps that each layer has taken, ``(rows,)``."""
        wide = SCALARS if curvature == "gradient" else self.dtype
        self.curvature_mean = torch.zeros_like(self.step_count, dtype=wide)
        """Running mean of the curvature's eigenvalue, ``(rows,)``, for relative damping."""
        self._spans = [one.spans(_vector_dims(one.first, curvature)) for one in self._bunches]
        self._bias_square = self.of_rows([float(one.bias is not None) for one in self._bunches])
        self._numel = self.of_rows([one.matrix_numel for one in self._bunches])
        self._orders = self.of_rows([len(spans) for spans in self._spans])
        self._table: Tensor | None = None
        self._damping = torch.ones_like(self.step_count, dtype=SCALARS)
        self._is_reduced = True

    def observe(self, taken: Tensor | None) -> None:
        """Average what the layers have measured: one all-reduce for each group of token ranks."""
        for averages in self.averages:
            decay = [layer.options["statistics_decay"] for layer in averages.layers]
            divisor = [_output_divisor(layer) for layer in averages.layers]
            averages.update_(self.constant(decay), self.constant(divisor), taken)

    def step(self, grads: Grads, norms: Grads, taken: Tensor | None) -> None:
        """One step for the layers whose local gradients are given, with their norms."""
        if self.decays_gradients():
            grads, norms = self.decayed(grads, taken), {}
        matrices = [bunch.gradient(grads) for bunch in self._bunches]
        squares = self._grad_squares(grads, norms)
        lefts, rights, products = self._factors(matrices, grads, squares)
        self._table = self._scalars(squares, lefts, rights, products)
        powers = self._powers(self._table)
        if powers is not None:
            self._table[:, 1] *= powers
            self._table[:, 3] *= powers.square()
        self._is_reduced = False
        if self._needs_other_ranks():
            self._table, self._is_reduced = self._reduced(self._table), True
        counted = self._moving(grads)
        self._damping = self._next_damping(counted if taken is None else counted * taken)
        found = self._terms(self._table, self._damping)
        self._apply(matrices, grads, lefts, rights, found, powers, taken)

    # Scalars: from which all coefficients follow

    def _grad_squares(self, grads: Grads, norms: Grads) -> Vectors:
        """This rank's part of ``|G|^2`` of each bunch, 0-dim; of a stack ``(matrices here,)``."""
        squares = []
        for bunch in self._bunches:
            if bunch.is_stacked:
                found = [
                    self._norm(one, one.weight, grads, norms)
                    if one.weight in grads
                    else torch.zeros((), dtype=bunch.dtype, device=self.device)
                    for one in bunch.layers
                ]
                squares.append(torch.stack(found).square())
                continue
            layer = bunch.first
            own = [
                self._norm(layer, param, grads, norms).square()
                for param, counts in ((layer.weight, True), (layer.bias, layer.bias_counts))
                if param is not None and param in grads and counts
            ]
            if not own:
                own = [torch.zeros(bunch.stack_shape, dtype=bunch.dtype, device=self.device)]
            squares.append(own[0] if len(own) == 1 else torch.stack(own).sum(0))
        return squares

    def _factors(
        self, matrices: Sequence[Tensor | None], grads: Grads, squares: Vectors
    ) -> tuple[Vectors, Vectors, Vectors]:
        """The two vectors of each V, and this rank's part of ``G right``.

        Those of Eva-s's columns are products of means in units of :meth:`_units`.
        """
        lefts, rights = self._vectors(matrices, squares)
        products = [
            self._product(bunch, matrix, right, grads)
            for bunch, matrix, right in zip(self._bunches, matrices, rights, strict=True)
        ]
        if self.curvature == "input":
            lefts = [one for (one,) in self._completed([[product] for product in products])]
        return lefts, rights, products

    def _scalars(
        self, squares: Vectors, lefts: Vectors, rights: Vectors, products: Vectors
    ) -> Tensor:
        """This rank's part of ``|G|^2, <G, V>, |left|^2, |right|^2``, ``(rows, 4)``."""
        scalars = []
        for square, left, right, product in zip(squares, lefts, rights, products, strict=True):
            scalars += [square, _dot(left, product), _dot(left, left), _dot(right, right)]
        return self._rows.table([scalar.to(self.dtype) for scalar in scalars]).to(SCALARS)

    def _units(self, squares: Vectors) -> Sequence[Tensor]:
        """One over the root mean square of the gradient of each matrix here, like ``squares``."""
        if not any(bunch.batch_dims for bunch in self._bunches):
            flat = torch.stack(list(squares))
            return root_mean_square(flat, self._numel.to(flat.dtype)).reciprocal().unbind()
        return [
            root_mean_square(square, bunch.matrix_numel).reciprocal()
            for bunch, square in zip(self._bunches, squares, strict=True)
        ]

    def _powers(self, table: Tensor) -> Tensor | None:
        """By what vectors of columns were divided, ``(rows,)``; None where they were not."""
        if self.curvature != "gradient":
            return None
        return root_mean_square(table[:, 0], self._numel) ** (self._orders - 1)

    def _norm(self, layer: Layer, param: Tensor, grads: Grads, norms: Grads) -> Tensor:
        """Of the gradient of a weight or a bias here; of a stack, of each of its matrices."""
        if layer.batch_dims:
            return torch.linalg.vector_norm(layer.matrix(grads[param]), dim=(1, 2),
                                            dtype=layer.dtype)  # fmt: skip
        if param in norms:
            return norms[param]
        return torch.linalg.vector_norm(grads[param], dtype=layer.dtype)

    def _vectors(
        self, matrices: Sequence[Tensor | None], squares: Vectors
    ) -> tuple[Vectors, Vectors]:
        """Vectors of V along rows and columns; those of Eva-f's rows come later."""
        if self.curvature == "gradient":
            return self._marginals(matrices, self._units(squares))
        places = [[self._place[id(one)] for one in bunch.layers] for bunch in self._bunches]
        paired = list(zip(self._bunches, places, strict=True))
        rights = [bunch.stacked([a.inputs[k] for a, k in some]) for bunch, some in paired]
        if self.curvature == "input":
            return [], rights
        return [bunch.stacked([a.outputs[k] for a, k in some]) for bunch, some in paired], rights

    def _marginals(
        self, matrices: Sequence[Tensor | None], units: Sequence[Tensor]
    ) -> tuple[Vectors, Vectors]:
        """Means of the gradient over all dims but one, those of the columns multiplied out.

        Those of the columns times ``units``: their products stay within the range of floats.
        """
        sums = []
        for bunch, matrix, spans in zip(self._bunches, matrices, self._spans, strict=True):
            shape = [*bunch.stack_shape, *(span.shape[-1] for span in spans)]
            if matrix is None:
                matrix = torch.zeros(shape, dtype=bunch.dtype, device=self.device)
            sums.append(marginal_sums(matrix.view(shape), batch_dims=bunch.batch_dims))
        lefts, rights = [], []
        completed = zip(self._bunches, self._spans, self._completed(sums), units, strict=True)
        for bunch, spans, totals, unit in completed:
            shares = [span.size / max(1, bunch.numel) for span in spans]
            scale = unit[:, None] if bunch.batch_dims else unit
            lefts.append(totals[0] * shares[0])
            pairs = zip(totals[1:], shares[1:], strict=True)
            rights.append(outer([total * (scale * share) for total, share in pairs]))
        return lefts, rights

    def _completed(self, partial: Sequence[Vectors]) -> list[Vectors]:
        """Vectors along the spans of each layer, summed over all ranks that have a part of them."""
        travelling: dict[Any, list[tuple[int, int, Span]]] = defaultdict(list)
        completed = [list(vectors) for vectors in partial]
        for number, (bunch, spans) in enumerate(zip(self._bunches, self._spans, strict=True)):
            for index, span in enumerate(spans):
                if span.is_partial:
                    travelling[bunch.tile.group].append((number, index, span))
        for group, places in travelling.items():
            wholes = []
            for number, index, span in places:
                vector = partial[number][index].to(self.dtype).flatten()
                wholes.append(vector.new_zeros(span.size).index_copy_(0, span.positions, vector))
            sums = all_reduce_together(wholes, group)
            for (number, index, span), whole in zip(places, sums, strict=True):
                mine = whole[span.positions].view(span.shape)
                completed[number][index] = mine.to(self._bunches[number].dtype)
        return completed

    def _product(self, bunch: Bunch, matrix: Tensor | None, right: Tensor, grads: Grads) -> Tensor:
        """This rank's part of ``G right``, the column of the bias included, ``(rows,)``."""
        layer = bunch.first
        if matrix is None:
            return right.new_zeros(*bunch.stack_shape, layer.tile.shape[layer.batch_dims])
        if bunch.batch_dims:
            return matrix.bmm(right[..., None]).squeeze(-1)
        product = matrix.mv(right)
        if layer.bias is not None and layer.bias in grads and layer.bias_counts:
            product[layer.bias_rows] += grads[layer.bias]
        return product

    def _moving(self, grads: Grads) -> Tensor:
        """1 for each matrix with a gradient, 0 for the others, ``(rows,)``."""
        moving = [layer.moves(grads) for bunch in self._bunches for layer in bunch.layers]
        if all(moving):  # as always, but for unused branches
            return self.of_rows([1.0] * len(self._bunches))
        numbers = [1 if bunch.is_stacked else bunch.num_matrices
                   for bunch in self._bunches for _ in bunch.layers]  # fmt: skip
        return self.constant(np.repeat(moving, numbers).tolist())

    def _needs_other_ranks(self) -> bool:
        """Whether this step needs the scalars of whole layers; the same answer on all ranks."""
        if self.curvature != "input" or self.scaling is not None:
            return True
        return any(_is_cut(bunch.first) for bunch in self._bunches)

    def _reduced(self, table: Tensor) -> Tensor:
        return self.summed_over_tiles(torch.where(self._rows.counts_here, table, 0), self._bunches)

    def _next_damping(self, moving: Tensor) -> Tensor:
        """``y`` of each layer, ``(rows,)``; counts the step of the layers that are moving."""
        relative = self.of_rows([_is_relative(bunch.first) for bunch in self._bunches])
        decay = self.option("statistics_decay")
        square = curvature_square(self.curvature, *self._squares())
        running_average_(self.curvature_mean, square, self.step_count, moving, decay)
        self.step_count += moving
        mean = self._above_rounding(self.curvature_mean.to(SCALARS))
        damping = self.option("damping") * torch.where(relative > 0, mean, 1.0)
        if self.curvature == "gradient":  # which never divides by it
            return damping.clamp(min=torch.finfo(SCALARS).tiny)
        return not_nothing(damping)

    def _above_rounding(self, curvature: Tensor) -> Tensor:
        """Curvature of which something is left: means that should be zero are never quite."""
        if self.curvature != "gradient":
            return curvature
        assert self._table is not None, "no step has been taken"
        numel, orders = self._numel, self._orders
        noise = (self._table[:, 0] / numel) ** orders * numel ** (2 - orders)
        eps = self.of_rows([torch.finfo(bunch.dtype).eps for bunch in self._bunches])
        return torch.maximum(curvature, eps * noise)

    def _squares(self) -> tuple[Tensor, Tensor]:
        """``|left|^2`` and ``|right|^2``, the constant 1 of a bias included."""
        assert self._table is not None, "no step has been taken"
        return self._table[:, 2], self._table[:, 3] + self._bias_square

    def _terms(self, table: Tensor, damping: Tensor) -> Terms:
        return terms(self.curvature, table[:, 0], table[:, 1], *self._squares(), damping)

    # Directions: never stored, unless they must be

    def _scales(self, found: Terms) -> Tensor:
        """By what ``G - c V`` is multiplied, ``(rows,)``."""
        inner, square = found.undamped_inner(), found.undamped_square()
        own = 1 / found.damping
        if self.curvature == "gradient":
            own = torch.where(square > 0, (found.grad_square / square).sqrt(), 1.0)
        scales = own * self._common_scale(found, own, inner, square)
        # Squares of a gradient that underflow tell no length: it is not made longer then.
        scales = torch.where(found.grad_square > 0, scales, scales.clamp(max=1.0))
        fits = scales * found.grad_square.sqrt() < torch.finfo(self.dtype).max
        self.beyond = (~fits).any()
        return torch.where(fits, scales, 0.0)

    def _common_scale(self, found: Terms, own: Tensor, inner: Tensor, square: Tensor) -> Tensor:
        """The global scale, ``(rows,)`` or 0-dim.

        Args:
            found: Of all layers.
            own: By what ``G - c V`` is multiplied without it, ``(rows,)``.
            inner: ``<G - c V, G>``.
            square: ``|G - c V|^2``.
        """
        if self.scaling is None:
            return torch.ones_like(own)
        kl_clip = float(self.layers[0].options["kl_clip"])
        sums = scaling_sums(
            self.scaling,
            own * inner,
            own.square() * square,
            found.grad_square,
            found.damping,
            self.learning_rates(),
            kl_clip,
        )
        scale = self.scale_of_all_stages(sums)
        return scale * found.damping if self.scaling == "kl_norm" else scale

    def _apply(
        self,
        matrices: Sequence[Tensor | None],
        grads: Grads,
        lefts: Vectors,
        rights: Vectors,
        found: Terms,
        powers: Tensor | None,
        taken: Tensor | None,
    ) -> None:
        """Move the parameters by ``f G - left right^T``, layer by layer and group by group."""
        scales = self._scales(found)
        coefficients = found.coefficient if powers is None else found.coefficient * powers
        factors = self._rows.of_layers_here(scales.to(self.dtype))
        amounts = self._rows.of_layers_here((scales * coefficients).to(self.dtype))
        moves: dict[int, Moves] = {}
        for number, (bunch, matrix) in enumerate(zip(self._bunches, matrices, strict=True)):
            if matrix is None:
                continue
            layer = bunch.first
            left = lefts[number] * amounts[number].to(layer.dtype).unsqueeze(-1)
            factor = factors[number].to(layer.dtype)
            right, kept = rights[number], self.momentum
            group = moves_of(layer, moves, taken)
            if bunch.is_stacked:
                weights = [one.weight if one.weight in grads else None for one in bunch.layers]
                group.add_rank_one_stack(weights, matrix, left, right, factor, kept)
                continue
            if layer.weight in grads and layer.is_transposed:
                group.add_rank_one(layer.weight, matrix.T, right, left, factor, kept)
            elif layer.weight in grads:
                group.add_rank_one(layer.weight, matrix, left, right, factor, kept)
            if layer.bias is not None and layer.bias in grads:
                grad = grads[layer.bias].to(layer.dtype)[:, None]
                rows, one = left[layer.bias_rows], right.new_ones(1)
                group.add_rank_one(layer.bias, grad, rows, one, factor, kept)
        for group in moves.values():
            group.finish()

    # What others ask for

    def state(self, number: int) -> dict[str, Tensor]:
        """State of the weight of one layer."""
        layer = self.layers[number]
        rows = self._row_of[id(layer)]
        state = {"step": self.step_count[rows]}
        if self.averages:
            averages, position = self._place[id(layer)]
            state["batches"] = layer.stored_along(slice(0), averages.counts[position])
            state["input_mean"] = layer.stored_along(_COLUMNS, averages.inputs[position])
            if averages.outputs:
                state["output_sum"] = layer.stored_along(_ROWS, averages.outputs[position])
        if _is_relative(layer):
            state["curvature_mean"] = self.curvature_mean[rows]
        return state

    def statistics(self) -> Vectors:
        """What this rank's layers have summed since they were reset."""
        return [tensor for averages in self.averages for tensor in averages.local_sums()]

    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """``rho`` and ``cosine`` of each layer in the last step; of a stack, means."""
        if self._table is None:
            return {}
        if not self._is_reduced:
            self._table, self._is_reduced = self._reduced(self._table), True
        found = self._terms(self._table, self._damping)
        rho = curvature_square(self.curvature, *self._squares()) / found.damping
        cosine = found.cosine()
        rows = [self._row_of[id(layer)] for layer in self.layers]
        return {
            layer.name: {"rho": rho[some].mean(), "cosine": cosine[some].mean()}
            for layer, some in zip(self.layers, rows, strict=True)
        }

    def option(self, name: str) -> Tensor:
        """One option of each layer, ``(rows,)``."""
        return self.of_rows([bunch.options[name] for bunch in self._bunches])

    def of_rows(self, numbers: Sequence[float]) -> Tensor:
        """Numbers of the host, one for each bunch of layers, on the device, ``(rows,)``."""
        return self._rows.spread(self.constant(numbers))


def _rows_by_layer(bunches: Sequence[Bunch], rows: RowsOfLayers) -> dict[int, int | slice]:
    """The row of each layer, or those of a stack, by its id."""
    found: dict[int, int | slice] = {}
    for bunch, some in zip(bunches, rows.of_layer, strict=True):
        if isinstance(some, slice) and bunch.is_stacked:
            found |= zip(map(id, bunch.layers), range(some.start, some.stop), strict=True)
        else:
            found[id(bunch.first)] = some
    return found


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of two vectors, or of each pair of two stacks of them."""
    return left.dot(right) if left.dim() == 1 else (left * right).sum(-1)


def _is_cut(layer: Layer) -> bool:
    """Whether one rank alone cannot say what damping and coefficients of all its matrices are."""
    uncut = layer.batch_dims
    if layer.batch_dims and _is_relative(layer):
        uncut = -1  # state on every rank has the running means of all experts
    return any(dim > uncut for dim in layer.tile.cut_dims)


def _is_relative(layer: Layer) -> bool:
    return bool(layer.options["damping_mode"] == "relative")


def _output_divisor(layer: Layer) -> float:
    """By what the sum of a layer's output gradients over all ranks is divided."""
    options = layer.options
    num_samples = options["kv_batch_size"] if options.get("kv_scale") == "batch_mean" else 1
    return layer.gradient_divisor * float(num_samples)


def _vector_dims(layer: Layer, curvature: Curvature) -> list[slice]:
    """The dims of the vectors that are formed of the gradient in every step."""
    if curvature == "input_output":
        return []
    if curvature == "input":
        return [_ROWS]
    if layer.options["merge"] == "matrix":
        return [_ROWS, _COLUMNS]
    return [slice(dim, dim + 1) for dim in range(layer.weight.ndim - layer.batch_dims)]
