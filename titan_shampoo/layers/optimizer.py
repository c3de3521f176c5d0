"""What Eva and its relatives share: torch.optim.Optimizer outside, a step for layers inside.

Nothing distributed has to be configured but pipelines: meshes and placements are read off the
parameters, how gradients are reduced off FSDP2.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_shampoo.distributed.agreement import Facts
from titan_shampoo.distributed.gradients import Grads
from titan_shampoo.distributed.layout import local_tensor
from titan_shampoo.fallback import adamw_step, empty_state
from titan_shampoo.functional.descent import descend_
from titan_shampoo.layers.layer import Layer, decayed, motion_of
from titan_shampoo.layers.options import OF_THE_WHOLE_STEP, check_layer_options
from titan_shampoo.layers.search import LayerSearch
from titan_shampoo.layers.step import LayerStep, summed_over_stages
from titan_shampoo.library_optimizer import LibraryOptimizer, warn_without_names
from titan_shampoo.statistics import reshard

logger = logging.getLogger(__name__)

Model = nn.Module | Sequence[nn.Module]
"""A model, or the parts of a pipeline that are on this rank."""


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
    step_options = OF_THE_WHOLE_STEP

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        model: Model | None,
        process_group: dist.ProcessGroup | None,
        pipeline_group: dist.ProcessGroup | None,
        all_params: Iterable[Any] | None = None,
    ) -> None:
        self._models = _parts(model)
        defaults = defaults | {"method": self.method}
        super().__init__(params, defaults, process_group, pipeline_group, all_params)
        if self.moments is None:  # else names are those of the model's layers
            warn_without_names(self.param_groups)
        self._build()
        self._prepare()

    def _make_step(self, layers: list[Layer]) -> LayerStep:
        raise NotImplementedError

    def _check_options(self) -> None:
        check_layer_options(self.param_groups[-1])

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
        try:
            return super().step(closure)
        finally:
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
            self._step.observe(taken)
            self._check_taps(grads)
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and what has been measured since the last step."""
        super().zero_grad(set_to_none)
        self._reset_taps()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned on the same layout of ranks; dtypes are kept.

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
        state = {
            name: dict(self.state[param])
            for group in self.param_groups
            for name, param in self._named(group)
        }
        if self._step is not None:
            for number, layer in enumerate(self._step.layers):
                # In place of the views that this rank has of its blocks.
                for key in self._step.state(number):
                    del state[layer.name][key]
                state[layer.name] |= self._step.sharded_state(number)
        return state

    def __getstate__(self) -> dict[str, Any]:
        """Everything but process groups; the model is copied or pickled along."""
        return super().__getstate__() | {"_models": self._models}

    def _build(self) -> None:
        """Find the layers and allocate all state."""
        self._is_checked = False
        reshard(self._models)  # a root that is gathered would have no parameters of ours
        self.state = defaultdict(dict)
        names = self._names_in_models()
        self._named_params = {
            param: (names.get(param, name) if "param_names" not in group else name)
            for group in self.param_groups
            for name, param in self._as_given(group)
        }
        self._groups_of = {p: group for group in self.param_groups for p in group["params"]}
        self._meet()
        search = LayerSearch(self._named_params, self._groups_of, self._replicas())
        if self.moments is None:
            layers = search.plain()
        else:
            layers = search.tapped(self._models, self.moments, output_sums=self.output_sums)
        self._allocate_layers(layers)
        self._check_agreement(self._layer_facts)
        self._fallback: dict[int, list[Tensor]] = {}
        self._buffers: dict[Tensor, Tensor] = {}
        for param in self._groups_of:
            if param not in self._joined:
                self._allocate_other(param)

    def _carry_over(self, before: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        super()._carry_over(before)
        self._prepare()

    def _prepare(self) -> None:
        """Have the next backward passes measure for the step that the state is at."""
        if self._step is not None:
            self._step.prepare()

    def _allocate_layers(self, layers: list[Layer]) -> None:
        """The step of the layers, and views of its state."""
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

    def _has_momentum(self, name: str, param: Tensor, group: Mapping[str, Any]) -> bool:
        return param in self._joined or group["fallback"] == "sgd"

    def _layer_facts(self) -> dict[Tensor, Facts]:
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
        unseen = {} if self._step is None else self._trained_unseen(self._step, grads)
        elsewhere = "a layer of another pipeline stage"
        which = self._first_anywhere([name for name in unseen if unseen[name]], elsewhere)
        self._is_checked = self._first_anywhere(list(unseen), elsewhere) is None
        if which is not None:
            raise RuntimeError(f"{which}: has a gradient, but its inputs were not seen; construct "
                               "the optimizer before the first forward pass")  # fmt: skip

    @staticmethod
    def _trained_unseen(step: LayerStep, grads: Grads) -> dict[str, bool]:
        """Layers with a gradient in which no rank measured anything; whether it is more than 0."""
        trained = {
            layer.name: bool(grads[layer.weight].any())
            for layer in step.layers
            if layer.weight in grads
        }
        # Experts are often given no rows.
        stacks = {layer.name for layer in step.layers if layer.batch_dims}
        return {
            name: trained[name]
            for name in step.unseen()
            if name in trained and (trained[name] or name not in stacks)
        }

    def _reset_taps(self) -> None:
        """Begin to measure anew, for the step that the state, which may have been loaded, is at."""
        for tapped in self._tapped:
            tapped.reset()
        self._prepare()


def _parts(model: Model | None) -> list[nn.Module]:
    if model is None:
        return []
    return [model] if isinstance(model, nn.Module) else list(model)


def _fallback_rates(options: Mapping[str, Any]) -> dict[str, float]:
    """Learning rate and peak of the diagonal method, on the schedule of those of the layers."""
    own, lr, peak = options["fallback_lr"], float(options["lr"]), float(options["peak_lr"])
    if own is None:
        return {}
    return {"lr": float(own) * lr / peak if peak else 0.0, "peak_lr": float(own)}
