"""What Eva and its relatives share: torch.optim.Optimizer outside, a step for layers inside.

Nothing distributed has to be configured but pipelines: meshes and placements are read off the
parameters, how gradients are reduced off FSDP2.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_shampoo.distributed.agreement import CheckedValues
from titan_shampoo.distributed.gradients import Grads
from titan_shampoo.distributed.layout import local_tensor
from titan_shampoo.distributed.plan import Holding
from titan_shampoo.fallback import adamw_step, empty_state, reason_to_fall_back
from titan_shampoo.functional.descent import descend_, peak_rate
from titan_shampoo.layers.layer import Layer, decayed, motion_of
from titan_shampoo.layers.options import OF_THE_WHOLE_STEP, check_layer_options
from titan_shampoo.layers.search import LayerSearch
from titan_shampoo.layers.step import LayerStep, summed_over_stages
from titan_shampoo.library_optimizer import FALLBACKS, LibraryOptimizer, Params, not_traced
from titan_shampoo.recognition import (
    CANNOT_BE_TAPPED,
    Model,
    kinds_of,
    parts_of,
    shortened,
    warn_without_names,
    with_names,
)
from titan_shampoo.saved_state import BLOCKS, GlobalState
from titan_shampoo.statistics import reshard

logger = logging.getLogger(__name__)


class LayerOptimizer(LibraryOptimizer):
    """A method for whole layers, with a diagonal method for all other parameters.

    A subclass names its method and its options, and makes its step.
    """

    method: ClassVar[str]
    damping_option: ClassVar[str] = "damping"
    moments: ClassVar[Literal["none", "input", "both"] | None]
    """Second moments that taps collect; None for a method that needs no taps."""
    output_sums: ClassVar[bool] = False
    """Whether taps sum the gradients at the outputs of layers."""
    shape_options: ClassVar[tuple[str, ...]] = ("bias",)
    """Options that give state its shape: a state with others cannot be loaded."""
    fixed_options: ClassVar[tuple[str, ...]] = (
        "method", "fallback", "batch_dims", "merge", "damping_mode"
    )  # fmt: skip
    step_options = OF_THE_WHOLE_STEP

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        model: Model | None,
        process_group: dist.ProcessGroup | None,
        pipeline_group: dist.ProcessGroup | None,
        all_params: Iterable[Any] | nn.Module | None = None,
    ) -> None:
        models = _given(model, params, is_wanted_by=self.method if self.moments else None)
        self._models = [] if self.moments is None else models
        defaults = defaults | {"method": self.method}
        if self.moments is None and models:
            params = with_names(params, models)
        super().__init__(params, defaults, process_group, pipeline_group, all_params, models)
        if self.moments is None:  # else names are those of the model's layers
            warn_without_names(self.param_groups)
        self._build()
        self._prepare()
        self._say_who_steps_what()

    def _make_step(self, layers: list[Layer]) -> LayerStep:
        raise NotImplementedError

    def _check_options(self, group: dict[str, Any]) -> None:
        check_layer_options(group)

    @not_traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - torch's signature
        """Take one step and return what ``closure`` returned.

        Parameters without a gradient do not move and do not age. If any gradient or statistic on
        any rank is not finite, nothing changes on any rank but the schedule of refreshes, which
        goes on, and ``skipped_steps`` grows. A refresh that fails leaves its block the last good
        inverse and is repeated in float64 in the next step.

        Raises:
            RuntimeError: On all ranks, after ``max_skipped`` steps or ``max_failures`` refreshes of
                one block in a row that failed, or in the first step, if layers have a gradient that
                their taps did not see.
        """
        self._check_not_scaled()
        self._is_refused = False
        return super().step(closure)

    def _forget_measured(self) -> None:
        if not self._is_refused:  # else the next step finds what this one did
            self._reset_taps()

    def _worst_failure(self) -> Tensor:
        return super()._worst_failure() if self._step is None else self._step.worst_failure()

    def _beyond(self) -> Tensor:
        if self._step is None:
            return super()._beyond()
        before, self._step.beyond = self._step.beyond, super()._beyond()
        return before

    def _repair(self) -> list[str]:
        return [] if self._step is None else self._step.repair()

    def _norms_beside(self) -> list[Tensor]:
        return [] if self._step is None else self._step.norms()

    def _pass_time(self, grads: Grads) -> None:
        if self._step is not None:
            self._step.pass_time()

    def _take_step(self, grads: Grads, norms: Grads, taken: Tensor | None) -> None:
        if self._step is None:
            self._follow_other_stages(grads)
        else:
            self._check_taps(grads)
            self._step.observe(taken)
            mine = {param: grads[param] for param in self._joined if param in grads}
            if taken is not None:  # nothing is as nothing does: gradients of zero move nothing
                mine = {param: grad.where(taken, 0.0) for param, grad in mine.items()}
                norms = {param: norm.where(taken, 0.0) for param, norm in norms.items()}
            self._step.step(mine, norms, taken)
        self._step_others(grads, taken)

    def _follow_other_stages(self, grads: Grads) -> None:
        """Without layers: take part in what those of other stages of a pipeline agree on."""
        self._check_taps(grads)
        scaling = self.param_groups[0]["scaling"]
        if scaling is not None and self._pipeline_group is not None:
            nothing = torch.zeros(2, device=self._device)
            summed_over_stages(scaling, nothing, self._pipeline_group)

    @not_traced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and what has been measured since the last step."""
        self._check_groups()  # they say what is to be measured
        super().zero_grad(set_to_none)
        self._reset_taps()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` or :meth:`local_state_dict` returned, on every rank.

        What has been measured since the last step is forgotten.
        """
        super().load_state_dict(state_dict)
        self._reset_taps()

    @property
    def failed_refreshes(self) -> int:
        """Inverses on this rank that kept their last good values, since the start."""
        return 0 if self._step is None else self._step.failed_refreshes

    def preconditions(self, param: Tensor) -> bool:
        """Whether a parameter is of one of the layers; all others are stepped by the fallback."""
        return param in self._joined

    def layer_metrics(self) -> dict[str, dict[str, Tensor]]:
        """``rho`` and ``cosine`` of each preconditioned layer in the last step, on the device.

        ``rho`` is the curvature over the damping: far below 1, the method does nothing but scale
        the gradient. ``cosine`` is that of the angle between direction and gradient. To be called
        by all ranks of a layer: Eva-f without a scale has not summed them up yet.
        """
        return {} if self._step is None else self._step.metrics()

    def sharded_state(self) -> dict[str, dict[str, Tensor]]:
        """All state by parameter name, as live tensors to save and to load in place.

        For distributed checkpoints: every tensor is global, and its key and shape depend neither
        on the rank nor on the mesh. Once it has been loaded in place, call :meth:`zero_grad` before
        the next backward pass: FOOF and K-FAC measure some layers in each step, and which ones
        depends on the step that is loaded.
        """
        return super().sharded_state()

    def _global_state(self) -> GlobalState:
        order = (param for group in self.param_groups for param in group["params"])
        found = {param: dict(self.state[param]) for param in order}
        for number, layer in enumerate([] if self._step is None else self._step.layers):
            assert self._step is not None
            # In place of the views that this rank has of its blocks.
            for key in (*self._step.state(number), BLOCKS):
                found[layer.weight].pop(key, None)
            found[layer.weight] |= self._step.sharded_state(number)
        return found

    def _holdings(self) -> dict[Tensor, list[Holding]]:
        if self._step is None:
            return {}
        weights = (layer.weight for layer in self._step.layers)
        pairs = zip(weights, self._step.holdings(), strict=False)
        return {weight: holdings for weight, holdings in pairs if holdings}  # not of empty ones

    def __getstate__(self) -> dict[str, Any]:
        """Everything but process groups; the model is copied or pickled along."""
        return super().__getstate__() | {"_models": self._models}

    def _build(self) -> None:
        """Find the layers and allocate all state."""
        self._is_checked = self._has_told_lost = False
        if self._models:
            reshard(self._models)  # a root that is gathered would have no parameters of ours
            self._kinds = kinds_of(self._models)
        self.state = self._state_beside_params()
        names = self._names_in_models()
        self._named_params = {
            param: (names.get(param, name) if "param_names" not in group else name)
            for group in self.param_groups
            for name, param in self._as_given(group)
        }
        self._groups_of = {p: group for group in self.param_groups for p in group["params"]}
        self._meet()
        kinds = {p: self._kind(name, p) for p, name in self._named_params.items()}
        known = {param: kind for param, kind in kinds.items() if kind is not None}
        search = LayerSearch(self._named_params, self._groups_of, known, self._replicas())
        if self.moments is None:
            layers = search.plain()
        else:
            layers = search.tapped(self._models, self.moments, output_sums=self.output_sums)
        self._allocate_layers(layers)
        self._untapped = search.left_out(self._models, layers)
        self._reasons = {
            param: reason_to_fall_back(name, param, self._groups_of[param], known.get(param))
            or CANNOT_BE_TAPPED
            for param, name in self._named_params.items()
            if param not in self._joined
        }
        self._check_agreement(self._layer_facts)
        self._fallback: dict[int, list[Tensor]] = {}
        self._buffers: dict[Tensor, Tensor] = {}
        for param in self._groups_of:
            if param not in self._joined:
                self._allocate_other(param)

    def _say_who_steps_what(self) -> None:
        super()._say_who_steps_what()
        if not self._speaks or self._device.type == "meta" or self.moments is None:
            return
        names: dict[str, list[str]] = defaultdict(list)
        for param, why in self._untapped.items():
            names[why].append(self._named_params[param])
        left = "; ".join(f"{shortened(some)}: it {why}" for why, some in names.items())
        fallback = FALLBACKS[self.param_groups[0]["fallback"]]
        remedy = "Shampoo, SOAP, KLShampoo and EvaS need no layers"
        if self._step is None and self._pipeline_group is None:
            logger.warning("%s: %s steps everything, as no layer can be tapped%s; %s",
                           self.method, fallback, left and f": {left}", remedy)  # fmt: skip
        elif left:
            logger.warning("%s: %s steps what cannot be tapped: %s; %s, and precondition = False "
                           "in a parameter group says that it is meant",
                           self.method, fallback, left, remedy)  # fmt: skip

    def _carry_over(self, before: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        super()._carry_over(before)
        self._prepare()

    def _prepare(self) -> None:
        """Have the next backward passes measure for the step that the state is at."""
        if self._step is not None:
            self._step.prepare()

    def _allocate_layers(self, layers: list[Layer]) -> None:
        """The step of the layers, and views of its state."""
        self._stacks = {layer.name for layer in layers if layer.batch_dims}
        self._tapped = [layer.tapped for layer in layers if layer.tapped is not None]
        both = (param for layer in layers for param in (layer.weight, layer.bias))
        self._joined = {param: None for param in both if param is not None}
        self._step = self._make_step(layers) if layers else None
        for number, layer in enumerate(layers):
            assert self._step is not None
            self.state[layer.weight] = self._step.state(number)
            for param in (layer.weight, layer.bias):
                if param in self._step.momentum:
                    self.state[param]["momentum"] = self._step.momentum[param]
        self._number_blocks()

    def _depends_on_peak(self, group: Mapping[str, Any]) -> bool:
        has_others = group["fallback_lr"] is not None and bool(self._fallback.get(id(group)))
        return has_others or super()._depends_on_peak(group)

    def _check_trained(self, grads: Grads) -> None:
        """Name parameters without a gradient that the models have replaced.

        Raises:
            RuntimeError: If they have replaced all parameters.
        """
        if not self._models or (self._has_told_lost and grads):
            return
        lost = self._lost(grads)
        if lost:  # or FSDP2 has left gathered parameters in a root
            reshard(self._models)
            lost = self._lost(grads)
        if not lost:
            return
        some = lost[0] + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
        problem = (f"{some}: the model has other parameters by now, and nothing trains these; make "
                   "the optimizer after fully_shard, to_empty and "
                   "load_state_dict(assign=True)")  # fmt: skip
        if len(lost) == len(self._as_made.names):
            raise RuntimeError(problem)
        if not self._has_told_lost:
            self._has_told_lost = True
            logger.warning("%s", problem)

    def _lost(self, grads: Grads) -> list[str]:
        """Names of the parameters that neither have a gradient nor are in the models."""
        held = {param for model in self._models for param in model.parameters()}
        named = self._all_named()
        return [name for name, param in named if param not in grads and param not in held]

    def _has_momentum(self, name: str, param: Tensor, group: Mapping[str, Any]) -> bool:
        return param in self._joined or group["fallback"] == "sgd"

    def _layer_facts(self) -> dict[Tensor, CheckedValues]:
        if self._step is None:
            return {}
        weights = (layer.weight for layer in self._step.layers)
        return dict(zip(weights, self._step.facts(), strict=True))

    def _names_in_models(self) -> dict[Tensor, str]:
        return {param: name for model in self._models for name, param in model.named_parameters()}

    def _named(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        return ((self._named_params[param], param) for param in group["params"])

    # Everything else

    def _allocate_other(self, param: Tensor) -> None:
        options = self._groups_of[param]
        self._fallback.setdefault(id(options), []).append(param)
        if options["fallback"] == "adamw":
            self.state[param] = empty_state(param)
        elif options["momentum"] > 0:
            self._buffers[param] = torch.zeros_like(param)
            self.state[param] = {"momentum": self._buffers[param]}
        else:
            self.state[param] = {}

    def _step_others(self, grads: Mapping[Tensor, Tensor], taken: Tensor | None) -> None:
        """AdamW, or SGD as the layers have it, for what is not preconditioned."""
        for group in self.param_groups:
            moving = [param for param in self._fallback.get(id(group), []) if param in grads]
            if not moving:
                continue
            mine = [grads[param] for param in moving]
            options = group | _fallback_rates(group)
            if group["fallback"] == "adamw":
                states = [self.state[param] for param in moving]
                adamw_step(moving, mine, states, options, taken)
            else:
                self._step_by_sgd(moving, mine, options, taken)

    def _step_by_sgd(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        options: dict[str, Any],
        taken: Tensor | None,
    ) -> None:
        whole = decayed(params, grads, options)
        if taken is None:
            directions = [grad.clone() for grad in whole]
        else:
            directions = [grad.where(taken, 0.0) for grad in whole]
        motion = motion_of(options, taken, directions[0].dtype)
        descend_(
            [local_tensor(param) for param in params],
            directions,
            [local_tensor(self._buffers[param]) for param in params if param in self._buffers],
            motion.rates,
            dampening=motion.dampening,
            nesterov=motion.nesterov,
        )

    # Whether to step

    def _check_not_scaled(self) -> None:
        """Refuse a GradScaler, which unscales gradients but not what was measured in backward."""
        if self.moments is not None and getattr(self, "found_inf", None) is not None:
            raise RuntimeError("GradScaler: statistics of layers are taken of the scaled loss and "
                               "cannot be scaled back; train in bfloat16 without one")  # fmt: skip

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """So that a GradScaler shows itself."""
        return self.moments is not None

    def _check_taps(self, grads: Mapping[Tensor, Tensor]) -> None:
        """In the first step: refuse layers that were trained unseen, on all ranks alike.

        And in steps after it, as long as an unseen one has a gradient of zero: then it was given no
        rows, or was not looked into.
        """
        if self._is_checked:
            return
        elsewhere = "a layer of another pipeline stage"
        trained = {} if self._step is None else self._trained(self._step, grads)
        unseen = [] if self._step is None else [n for n in self._step.unseen() if n in trained]
        wanted = [name for name in unseen if trained[name]]
        which = self._first_anywhere(wanted, elsewhere)
        if which is not None:
            self._is_refused = True
            cause = _cause(seen_any=len(wanted) < len(trained), is_stack=which in self._stacks)
            raise RuntimeError(f"{which}: has a gradient, but its inputs were not seen: {cause}")
        self._is_checked = self._first_anywhere(unseen, elsewhere) is None

    @staticmethod
    def _trained(step: LayerStep, grads: Grads) -> dict[str, bool]:
        """Layers with a gradient, and whether it is more than 0; of stacks those where it is.

        Experts are often given no rows.
        """
        has_any = {
            layer.name: bool(grads[layer.weight].any())
            for layer in step.layers
            if layer.weight in grads
        }
        stacks = {layer.name for layer in step.layers if layer.batch_dims}
        return {name: found for name, found in has_any.items() if found or name not in stacks}

    def _reset_taps(self) -> None:
        """Begin to measure anew, for the step that the state, which may have been loaded, is at."""
        for tapped in self._tapped:
            tapped.reset()
        self._prepare()


def _given(model: Model | None, params: Params, *, is_wanted_by: str | None) -> list[nn.Module]:
    """Parts of the model on this rank, which may have been given in place of its parameters."""
    if model is None and isinstance(params, nn.Module):
        model = params
    if model is None and is_wanted_by is not None:
        raise ValueError(f"model: got None, wanted the model whose layers {is_wanted_by} looks "
                         "into; set model=model")  # fmt: skip
    return parts_of(model)


def _cause(*, seen_any: bool, is_stack: bool) -> str:
    """What may have kept a tap from seeing anything, and what to do.

    Args:
        seen_any: Whether other layers were seen in the same step.
        is_stack: Whether the tap is of a stack of matrices.
    """
    unused = ("its module multiplies by it otherwise than by matmul, mm, bmm, linear or grouped_mm "
              "(as by einsum); take one of these, or put it into a parameter group with "
              "precondition = False" if is_stack else
              "its weight is used without calling its module, as by F.linear(x, layer.weight); "
              "call the module, or put the weight into a parameter group with precondition = "
              "False")  # fmt: skip
    by_hand = ("its gradient was set by hand; take a method that needs no layers (Shampoo, SOAP, "
               "KLShampoo, EvaS)")  # fmt: skip
    if seen_any:
        return f"others were; either {unused}; or {by_hand}"
    return ("nor were those of any other layer; either the optimizer was made after the forward "
            f"pass; make it before; or {by_hand}; or {unused}")  # fmt: skip


def _fallback_rates(options: Mapping[str, Any]) -> dict[str, float]:
    """Learning rate of the diagonal method and its peak, on the schedule of those of the layers."""
    own, peak = options["fallback_lr"], peak_rate(options)
    if own is None:
        return {}
    return {"lr": float(own) * float(options["lr"]) / peak if peak else 0.0, "max_lr": float(own)}
