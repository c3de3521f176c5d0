"""The public optimizers that look into layers: Eva, Eva-f, Eva-s, FOOF and K-FAC.

Their curvature comes from a layer's inputs and output gradients, or from the marginal means of the
gradient itself. Eva and its two relatives invert it in closed form: a step costs little more than
SGD's.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from titan_shampoo.distributed.memory import bytes_by_rank
from titan_shampoo.distributed.summary import Summary, summarize
from titan_shampoo.functional.scaling import Scaling
from titan_shampoo.layers.kronecker import KroneckerStep
from titan_shampoo.layers.layer import Layer
from titan_shampoo.layers.optimizer import LayerOptimizer
from titan_shampoo.layers.rank_one import RankOneStep
from titan_shampoo.layers.step import LayerStep
from titan_shampoo.library_optimizer import Params
from titan_shampoo.options import options_among
from titan_shampoo.recognition import Model

__all__ = ["FOOF", "KFAC", "Eva", "EvaF", "EvaS"]

WeightDecay = Literal["l2", "decoupled", "corrected", "independent"]
DampingMode = Literal["absolute", "relative"]


class Eva(LayerOptimizer):
    """Eva (Zhang et al. 2023, ICLR): K-FAC with the mean input and output gradient of each layer.

    Linear and Conv2d layers of ``model`` are preconditioned (the Conv1D of transformers is a linear
    layer, too), and stacks of experts in groups with ``batch_dims=1``; all other parameters,
    embeddings and output heads (``titan_shampoo.recognition``) are stepped by the fallback. In a
    parameter group, ``precondition`` = True takes its layers whatever their names are, False takes
    none of them.
    Gradients ``c`` times as large (the loss, times ``c``) give a step ``1 / c`` times as large with
    relative damping, ``c`` times with ``scaling="norm"``; docs/algorithms.md has all cases.
    To be constructed when the model is sharded and compiled, where it computes, and before its
    first forward pass. Copies and pickles of the optimizer take the model along: copy or pickle the
    two together.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or groups: parameters of ``model``; or the model,
            in place of all of its parameters.
        lr: Learning rate, at least zero; a number, or a tensor of one element on the CPU.
        model: Whose layers are looked into, or the parts of a pipeline on this rank; None where
            ``params`` is the model.
        damping: Added to the curvature, greater than zero.
        weight_decay: At least zero.
        statistics_decay: Weight of the old value in the running averages of inputs and output
            gradients, in [0, 1).
        kl_clip: Largest change of the predictions by one step, greater than zero; for
            ``scaling="kl_clip"``.
        kv_scale: ``"per_token"`` takes the output gradients as they are summed; ``"batch_mean"``
            divides them by ``kv_batch_size``, as published code does.
        kv_batch_size: The batch size that the damping was tuned for; for ``"batch_mean"``.
        damping_mode: ``"absolute"``, or ``"relative"`` to the running mean of the curvature.
        scaling: ``"kl_clip"``, ``"norm"`` (as long as the gradient), ``"kl_norm"`` or None: one
            factor for all layers.
        momentum: Heavy ball on the direction, in [0, 1).
        dampening: Share of the direction kept out of the heavy ball, in [0, 1].
        nesterov: Look ahead along the heavy ball.
        weight_decay_type: ``"l2"`` adds to the gradient, ``"decoupled"`` shrinks by ``lr *
            weight_decay``, ``"corrected"`` by that times ``lr / peak_lr``, ``"independent"`` by
            ``weight_decay * lr / peak_lr``; all but ``"l2"`` through the heavy ball.
        bias: ``"joint"`` solves for weight and bias together where both are in one group;
            ``"separate"`` leaves biases to the fallback.
        batch_dims: 1 in a group of stacks of experts ``(E, d_out, d_in)``: each of the ``E``
            matrices is a layer of its own, that saw the rows that it was multiplied by.
        fallback: ``"adamw"`` or ``"sgd"`` (with this momentum and weight decay).
        fallback_lr: Learning rate of the fallback where ``lr`` has its peak; it follows the
            schedule of ``lr``. None: ``lr``. The peak is ``max_lr`` of a parameter group, which
            ``OneCycleLR`` sets, else ``peak_lr``: the first ``lr`` of the group, or the largest one
            that it has been stepped by.
        betas: Of the AdamW fallback.
        eps: Of the AdamW fallback.
        max_skipped: Steps in a row that may have gradients that are not finite.
        process_group: Ranks that hold plain tensors as replicas; None for all ranks.
        pipeline_group: Ranks that hold the other stages of a pipeline, to scale them alike.

    Raises:
        ValueError: For an impossible option, a complex parameter, a partial placement, or a layer
            that cannot be looked into.
    """

    method = "Eva"
    moments = "none"
    output_sums = True

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        damping: float = 0.3,
        weight_decay: float = 0.0,
        *,
        model: Model | None = None,
        statistics_decay: float = 0.05,
        kl_clip: float = 1e-3,
        kv_scale: Literal["per_token", "batch_mean"] = "per_token",
        kv_batch_size: float | None = None,
        damping_mode: DampingMode = "absolute",
        scaling: Scaling | None = "kl_clip",
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay_type: WeightDecay = "decoupled",
        bias: Literal["joint", "separate"] = "joint",
        batch_dims: int = 0,
        fallback: Literal["adamw", "sgd"] = "adamw",
        fallback_lr: float | None = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skipped: int = 20,
        process_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, options_among(locals()), model, process_group, pipeline_group)

    def _make_step(self, layers: list[Layer]) -> LayerStep:
        return RankOneStep(layers, "input_output", self._pipeline_group)


class EvaF(LayerOptimizer):
    """Eva-f (Zhang et al. 2023, arXiv 2308.02123): FOOF with the mean input of each layer.

    Gradients ``c`` times as large give a step ``c`` times as large, or the same one where
    ``kl_clip`` clips.

    Args:
        params: As for :class:`Eva`, and so are all options that are not named here.
        damping: Added to the curvature ``|a|^2`` of the mean input.
    """

    method = "EvaF"
    moments = "none"

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        damping: float = 0.3,
        weight_decay: float = 0.0,
        *,
        model: Model | None = None,
        statistics_decay: float = 0.05,
        kl_clip: float = 1e-3,
        damping_mode: DampingMode = "absolute",
        scaling: Scaling | None = "kl_clip",
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay_type: WeightDecay = "decoupled",
        bias: Literal["joint", "separate"] = "joint",
        batch_dims: int = 0,
        fallback: Literal["adamw", "sgd"] = "adamw",
        fallback_lr: float | None = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skipped: int = 20,
        process_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, options_among(locals()), model, process_group, pipeline_group)

    def _make_step(self, layers: list[Layer]) -> LayerStep:
        return RankOneStep(layers, "input", self._pipeline_group)


class EvaS(LayerOptimizer):
    """Eva-s (Zhang et al. 2023, arXiv 2308.02123): Shampoo with the means of the gradient.

    Needs no model. Every matrix is preconditioned, by its own marginal means, and its direction has
    the length of its gradient: gradients ``c`` times as large give a step ``c`` times as large.
    Embeddings, output heads and routers are stepped by the fallback.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, groups, or a model. All options that are not
            named here are as for :class:`Eva`.
        damping: Added to the curvature ``|v_1|^2 |v_2|^2 ...``.
        damping_mode: ``"relative"`` to the running mean of the curvature by default: means of
            gradients are so small that any absolute damping would leave nothing but the gradient.
        statistics_decay: Weight of the old value in that running mean.
        merge: ``"matrix"`` (first dim by all others), or ``"none"``: one mean for each dim.
        scaling: Beside each direction's own.
        model: As for ``Shampoo``: tells embeddings and output heads, and is not kept.
    """

    method = "EvaS"
    moments = None
    shape_options = ()

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        damping: float = 0.3,
        weight_decay: float = 0.0,
        *,
        statistics_decay: float = 0.05,
        kl_clip: float = 1e-3,
        damping_mode: DampingMode = "relative",
        merge: Literal["matrix", "none"] = "matrix",
        scaling: Scaling | None = None,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay_type: WeightDecay = "decoupled",
        batch_dims: int = 0,
        fallback: Literal["adamw", "sgd"] = "adamw",
        fallback_lr: float | None = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skipped: int = 20,
        process_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(params, options_among(locals()), model, process_group, pipeline_group)

    def _make_step(self, layers: list[Layer]) -> LayerStep:
        return RankOneStep(layers, "gradient", self._pipeline_group)


class KroneckerOptimizer(LayerOptimizer):
    """What FOOF and K-FAC share: factors of blocks, which live with their owners."""

    fixed_options = ("method", "fallback")
    _step: KroneckerStep | None

    def _make_step(self, layers: list[Layer]) -> LayerStep:
        return KroneckerStep(
            layers,
            two_sided=self.moments == "both",
            replicas=self._replicas(),
            whole_model=self._whole_model,
            pipeline_group=self._pipeline_group,
        )

    def plan_summary(self) -> Summary:
        """What every rank owns, computes, keeps and sends in a step; readable by ``print``."""
        like_parameters: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param, group in self._groups_of.items():
            for key, value in self.state[param].items():
                if param not in self._joined:
                    like_parameters[f"{group['fallback']} {key}"].append((value, param))
                elif key in ("momentum", "cursor"):  # the rest lies with the owners of blocks
                    like_parameters[key].append((value, param))
        held = {k: bytes_by_rank(pairs, self._replicas()) for k, pairs in like_parameters.items()}
        return summarize([], [], held) if self._step is None else self._step.summary(held)


class FOOF(KroneckerOptimizer):
    """FOOF (Benzing 2022, arXiv 2201.12250): gradients times the inverse second moment of inputs.

    Gradients ``c`` times as large give a step ``c`` times as large, or the same one where
    ``kl_clip`` clips.

    Args:
        params: As for :class:`Eva`, and so are all options that are not named here.
        damping: Added to the second moment.
        damping_mode: ``"relative"``: to the mean eigenvalue of the second moment.
        factor_frequency: Steps between two batches of which second moments of a layer are formed.
        precondition_frequency: Steps between two inversions of a block.
        refresh: ``"staggered"`` spreads inversions over their period, and moments over theirs (all
            layers of one numbered part of the network, such as ``layers.3``, in one step), so that
            all steps cost the same; ``"together"`` inverts all, and measures all, in one step. (A
            model that is compiled as one graph, and not part by part, then has a graph less for
            each turn of the moments.)
        max_factor_dim: Factors are cut into diagonal blocks of this size; None for whole ones.
        max_failures: Inversions of one block in a row that may fail.
        all_params: The whole model, or its ``(name, tensor)`` pairs or groups, shapes alone count,
            where ``params`` are one stage of a pipeline: inversions are spread as in one process.
    """

    method = "FOOF"
    moments = "input"
    shape_options = ("bias", "max_factor_dim")

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        damping: float = 0.3,
        weight_decay: float = 0.0,
        *,
        model: Model | None = None,
        statistics_decay: float = 0.05,
        factor_frequency: int = 1,
        precondition_frequency: int = 10,
        refresh: Literal["staggered", "together"] = "staggered",
        max_factor_dim: int | None = None,
        kl_clip: float = 1e-3,
        damping_mode: DampingMode = "absolute",
        scaling: Literal["kl_clip", "norm"] | None = "kl_clip",
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay_type: WeightDecay = "decoupled",
        bias: Literal["joint", "separate"] = "joint",
        fallback: Literal["adamw", "sgd"] = "adamw",
        fallback_lr: float | None = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skipped: int = 20,
        max_failures: int = 3,
        process_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        all_params: Iterable[Any] | nn.Module | None = None,
    ) -> None:
        options = options_among(locals())
        super().__init__(params, options, model, process_group, pipeline_group, all_params)


class KFAC(KroneckerOptimizer):
    """K-FAC (Martens & Grosse 2015): second moments of inputs and of output gradients.

    Gradients ``c`` times as large give a step ``1 / c`` times as large with relative damping, as
    with Eva.

    Args:
        params: As for :class:`FOOF`, and so are all options that are not named here.
        damping: ``y``, added to the curvature.
        damping_mode: ``"relative"``: to the product of the mean eigenvalues of both moments.
        factored_damping: Whether the damping is split between the factors, with their traces, so
            that inverses are kept; else eigenvectors are kept, and the damping is exact.
        loss_normaliser: How many samples, or valid tokens, of the global batch the loss is the mean
            of. None for the number of rows of each layer, which is right for linear layers on
            text; images with convolutions need their batch size.
    """

    method = "KFAC"
    moments = "both"
    shape_options = ("bias", "max_factor_dim", "factored_damping")

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        damping: float = 0.3,
        weight_decay: float = 0.0,
        *,
        model: Model | None = None,
        statistics_decay: float = 0.05,
        factor_frequency: int = 1,
        precondition_frequency: int = 10,
        refresh: Literal["staggered", "together"] = "staggered",
        max_factor_dim: int | None = None,
        factored_damping: bool = True,
        loss_normaliser: float | None = None,
        kl_clip: float = 1e-3,
        damping_mode: DampingMode = "absolute",
        scaling: Literal["kl_clip", "norm"] | None = "kl_clip",
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay_type: WeightDecay = "decoupled",
        bias: Literal["joint", "separate"] = "joint",
        fallback: Literal["adamw", "sgd"] = "adamw",
        fallback_lr: float | None = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_skipped: int = 20,
        max_failures: int = 3,
        process_group: dist.ProcessGroup | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        all_params: Iterable[Any] | nn.Module | None = None,
    ) -> None:
        options = options_among(locals())
        super().__init__(params, options, model, process_group, pipeline_group, all_params)
