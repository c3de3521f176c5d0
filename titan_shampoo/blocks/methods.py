"""The public optimizers.

Every one of them reads how its parameters are distributed off the parameters themselves, and steps
what is not a matrix by AdamW. The update rules are in ``titan_shampoo.functional``.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from titan_shampoo.blocks.optimizer import BlockOptimizer
from titan_shampoo.distributed.blocks import Alignment
from titan_shampoo.distributed.geometry import Merge
from titan_shampoo.functional.grafting import Grafting
from titan_shampoo.functional.kl_shampoo import KLShampooRule
from titan_shampoo.functional.roots import BasisMethod, Degenerate, RootMethod
from titan_shampoo.functional.shampoo import ShampooRule
from titan_shampoo.functional.soap import SOAPRule
from titan_shampoo.library_optimizer import Params
from titan_shampoo.options import options_among
from titan_shampoo.recognition import Model

__all__ = ["SOAP", "KLShampoo", "Shampoo"]

Refresh = Literal["staggered", "together"]
WeightDecay = Literal["l2", "decoupled", "corrected", "independent"]


class Shampoo(BlockOptimizer):
    """Blocked Shampoo (Gupta et al. 2018; Shi et al. 2023, arXiv 2309.06497).

    Gradients ``c`` times as large give the same step; with ``grafting="sgd"`` one ``c`` times as
    large, without grafting ``c^(1 - 2e)`` times, where ``e`` is the sum of the exponents.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, groups, or a model for all of its parameters;
            plain, DDP, FSDP2, HSDP or tensor-parallel.
        lr: Learning rate, at least zero; a number, or a tensor of one element on the CPU.
        betas: Decay per step of the filtered gradient, in [0, 1), and of the factors, in (0, 1]; 1
            sums them.
        eps: Damping added to the factors, greater than zero.
        weight_decay: At least zero.
        eps_relative: Damping relative to the largest eigenvalue of a factor, used instead of
            ``eps``.
        beta3: Weight of the old average in the filtered gradient that is used; None for
            ``betas[0]``.
        weight_decay_type: ``"l2"`` adds to the gradient, ``"decoupled"`` shrinks by ``lr *
            weight_decay``, ``"corrected"`` by that times ``lr / peak_lr``, ``"independent"`` by
            ``weight_decay * lr / peak_lr``.
        momentum: Heavy ball on the direction, in [0, 1).
        dampening: Share of the direction kept out of the heavy ball, in [0, 1].
        nesterov: Look ahead along the heavy ball.
        block_size: Distance of block edges in elements, or a pair for rows and columns.
        merge: ``"matrix"`` (first dim by all others), ``"paper"`` (while products stay within
            ``block_size``) or ``"none"``.
        block_alignment: ``"global"``: block edges belong to the parameter, and iterates do not
            depend on the mesh; ``"shard"``: blocks are cut at shard edges, too, no gradient ever
            travels, and iterates and state belong to one mesh.
        precondition_frequency: Steps between two refreshes of a block's roots.
        start_step: First step that uses roots; None for ``precondition_frequency``.
        refresh: ``"staggered"`` spreads the blocks over the period, ``"together"`` refreshes all
            in one step.
        grafting: Whose step length is used: ``"sgd"``, ``"adagrad"``, ``"rmsprop"``, ``"adam"`` or
            None.
        grafting_beta2: Decay of second moments in grafting and in the fallback; None for
            ``betas[1]``.
        grafting_eps: Added to the root of second moments, in grafting and in the fallback.
        exponent: Positive power of the inverse roots, one or one per dim (0 switches a dim off);
            None for ``1 / (2 * order)``.
        bias_correction: Whether averages are corrected for their start at zero.
        root_method: ``"eigh"``; ``"newton"`` (coupled); ``"newton_schulz"`` (matrix products only);
            ``"qr"`` (one orthogonal iteration from the last basis, which is kept); ``"auto"``:
            ``"newton_schulz"`` for large factors on accelerators, else ``"eigh"``.
        factor_dtype: Dtype of the arithmetic on preconditioned parameters and of the factors; None
            for float32, or float64 for float64 parameters.
        root_dtype: Dtype of the roots and of the products with them: bfloat16 halves their memory,
            and is several times as fast where there are instructions for it; None for
            ``factor_dtype``.
        state_dtype: Dtype of filtered gradients and second moments: bfloat16 halves their memory,
            rounded such that averages keep moving; None for ``factor_dtype``.
        communication_dtype: Dtype in which gradients and directions travel between ranks; None for
            ``factor_dtype``.
        factor_frequency: Steps between two gradients that a block's factors take.
        match_rms: Root mean square that each block's direction is scaled to, with grafting None;
            0.2 is about Adam's, so that its learning rates carry over (for an orthogonal matrix
            that is the factor ``0.2 sqrt(max(rows, columns))``).
        batch_dims: Leading dims that stack independent matrices, such as experts.
        max_failures: Refreshes of one block that may fail in a row before an error is raised.
        max_skipped: Steps in a row that may have gradients that are not finite.
        compile: Whether the arithmetic of a step is compiled, refreshes aside.
        process_group: Ranks that hold plain tensors as replicas; None for all ranks.
        all_params: Names and tensors of the whole model, in ``params``' form, where ``params`` are
            those of one stage of a pipeline, or that model; tensors on the meta device will do.
            Refreshes are then spread over the period as in a process that holds all of them.
        pipeline_group: Ranks that hold the other stages of a pipeline, each with an optimizer like
            this one: all stages skip a step if one does. None without one, or to decide alone.
        fallback: ``"adamw"`` for vectors and for embeddings, output heads and routers, which are
            recognised by module, name and shape (``titan_shampoo.recognition``), or None to
            precondition all. In a parameter group, ``precondition`` = True says that all of its
            matrices are preconditioned, False that none is.
        model: Whose modules tell embeddings and output heads, and give names to parameters without;
            or the parts of a pipeline on this rank. It is looked at once and not kept.

    Raises:
        ValueError: For an impossible option, a complex parameter, or a partial placement.
    """

    rule = ShampooRule()

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        eps_relative: float | None = None,
        beta3: float | None = None,
        weight_decay_type: WeightDecay = "decoupled",
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        block_size: int | tuple[int, int] = 1024,
        merge: Merge = "matrix",
        block_alignment: Alignment = "global",
        precondition_frequency: int = 10,
        start_step: int | None = None,
        refresh: Literal["staggered", "together"] = "staggered",
        grafting: Grafting | None = "adam",
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        exponent: float | tuple[float, ...] | None = None,
        bias_correction: bool = True,
        root_method: RootMethod = "auto",
        factor_dtype: torch.dtype | None = None,
        root_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        communication_dtype: torch.dtype | None = None,
        factor_frequency: int = 1,
        match_rms: float | None = None,
        batch_dims: int = 0,
        max_failures: int = 3,
        max_skipped: int = 20,
        compile: bool = False,
        process_group: dist.ProcessGroup | None = None,
        all_params: Iterable[Any] | nn.Module | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        fallback: Literal["adamw"] | None = "adamw",
        model: Model | None = None,
    ) -> None:
        options = options_among(locals())
        super().__init__(params, options, process_group, all_params, pipeline_group, model)


class KLShampoo(BlockOptimizer):
    """KL-Shampoo (Lin et al. 2025): Shampoo whose factors see the otherwise whitened gradient.

    Factors start as the identity and need no bias correction; roots are ``-1/2`` each, with
    eigenvalues floored at 1e-6 of the largest. The first refresh is at step ``start_step``.
    Gradients ``c`` times as large give the same step.

    Args:
        params: As for :class:`Shampoo`, and so are all options that are not named here.
        start_step: First step that refreshes.
    """

    rule = KLShampooRule()

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        *,
        beta3: float | None = None,
        weight_decay_type: WeightDecay = "decoupled",
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        block_size: int | tuple[int, int] = 1024,
        merge: Merge = "matrix",
        block_alignment: Alignment = "global",
        precondition_frequency: int = 10,
        start_step: int | None = 1,
        refresh: Refresh = "staggered",
        grafting: Grafting | None = "adam",
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        bias_correction: bool = True,
        factor_dtype: torch.dtype | None = None,
        root_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        communication_dtype: torch.dtype | None = None,
        factor_frequency: int = 1,
        match_rms: float | None = None,
        batch_dims: int = 0,
        max_failures: int = 3,
        max_skipped: int = 20,
        compile: bool = False,
        process_group: dist.ProcessGroup | None = None,
        all_params: Iterable[Any] | nn.Module | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        fallback: Literal["adamw"] | None = "adamw",
        model: Model | None = None,
    ) -> None:
        options = options_among(locals())
        super().__init__(params, options, process_group, all_params, pipeline_group, model)


class SOAP(BlockOptimizer):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo's factors.

    Until its first refresh a block is stepped by Adam; a block that is refreshed in its very first
    step does not move in that step. Gradients ``c`` times as large give the same step.

    Args:
        params: As for :class:`Shampoo`, and so are all options that are not named here.
        betas: Decay per step of the first moment, and of the second moment and the factors.
        eps: Added to the root of the second moments, greater than zero.
        start_step: First step that refreshes.
        basis_method: ``"qr"`` turns the basis by one step of orthogonal iteration, ``"eigh"`` finds
            it anew; the first one is always found by eigendecomposition.
        degenerate_basis: ``"previous"``: where eigenvalues are zero or equal, the basis stays next
            to the one before, the identity at first, and does not depend on rounding;
            ``"arbitrary"``: it is what the decomposition returns, as in the published code, whose
            iterates are those of no other mesh.
        basis_dtype: Dtype of the bases and of the products with them, as ``root_dtype``.
    """

    rule = SOAPRule()

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        weight_decay_type: WeightDecay = "decoupled",
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        block_size: int | tuple[int, int] = 1024,
        merge: Merge = "matrix",
        block_alignment: Alignment = "global",
        precondition_frequency: int = 10,
        start_step: int | None = 1,
        refresh: Refresh = "staggered",
        basis_method: BasisMethod = "qr",
        degenerate_basis: Degenerate = "previous",
        factor_dtype: torch.dtype | None = None,
        basis_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        communication_dtype: torch.dtype | None = None,
        factor_frequency: int = 1,
        batch_dims: int = 0,
        max_failures: int = 3,
        max_skipped: int = 20,
        compile: bool = False,
        process_group: dist.ProcessGroup | None = None,
        all_params: Iterable[Any] | nn.Module | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        fallback: Literal["adamw"] | None = "adamw",
        model: Model | None = None,
    ) -> None:
        options = options_among(locals())
        super().__init__(params, options, process_group, all_params, pipeline_group, model)
