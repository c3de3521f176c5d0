"""What all optimizers of the library share beyond torch's: names, gradients, saved state."""

import functools
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_shampoo.distributed.agreement import (
    CheckedParameter,
    CheckedValues,
    ConsistencyCheck,
    check_agreement,
)
from titan_shampoo.distributed.gradient_pattern import GradientPattern, decision_groups
from titan_shampoo.distributed.gradients import Grads, gradient_here, num_terms
from titan_shampoo.distributed.layout import layout_of
from titan_shampoo.options import check_alike
from titan_shampoo.parameter_groups import (
    SWITCHES_OF_TORCH,
    AsMade,
    Idleness,
    Peaks,
    check_complete,
    check_keys,
    check_rates,
)
from titan_shampoo.recognition import Kind, kinds_of, summary_of
from titan_shampoo.saved_state import SavedStateOptimizer, copy_state, has_begun, is_alike
from titan_shampoo.statistics import reshard
from titan_shampoo.step_status import StatusReader, StepStatus, agreed_status, may_change, norms_of
from titan_shampoo.whole_model import Described, described

logger = logging.getLogger(__name__)

_Method = TypeVar("_Method", bound=Callable[..., Any])


def not_traced(method: _Method) -> _Method:
    """Have ``torch.compile`` call a method as it is, in the middle of what it compiles."""
    disabled: _Method = torch.compiler.disable(
        method,
        reason="the host decides what is due in a step; leave out fullgraph=True, and set "
        "compile=True (Shampoo, SOAP, KLShampoo) to compile the arithmetic of a step",
    )
    return disabled


Params = nn.Module | Iterable[Any]
"""Tensors, pairs of name and tensor, parameter groups, or a model for all of its parameters."""

FALLBACKS = {"adamw": "AdamW", "sgd": "SGD"}


class _Shared:
    """A process group, which copies of an optimizer share and which stays in its process."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self

    def __reduce__(self) -> str:
        raise ValueError("process_group, pipeline_group: a group stays in its process and cannot "
                         "be pickled; save state_dict() or sharded_state(), and load it into an "
                         "optimizer with groups of its own")  # fmt: skip


class LibraryOptimizer(SavedStateOptimizer):
    """An optimizer whose state is allocated when it is made, and loaded in place."""

    fixed_options: ClassVar[tuple[str, ...]]
    """Further options that plan and state follow from: setting them in a live group is refused."""

    damping_option: ClassVar[str]
    """What to raise if refreshes fail."""

    _process_group: dist.ProcessGroup | None
    _pipeline_group: dist.ProcessGroup | None
    _whole_model: list[Described] | None
    """All parameters, where those here are of one stage of a pipeline."""
    _kinds: Mapping[Tensor, Kind]
    """What modules say of some parameters."""
    _reasons: dict[Tensor, str]
    """Why parameters are left to the fallback."""
    _speaks: bool
    """Whether this rank says what all that hold the same parameters would say."""
    _statuses: StatusReader
    _norms_before: Grads
    _as_made: AsMade
    _is_fresh = False
    """Whether no step has been taken, and no state of one been loaded."""
    _first_numbers: Mapping[int, tuple[int, int]] = MappingProxyType({})
    """Place of each group and number of its first parameter, by id of the group."""

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None,
        pipeline_group: dist.ProcessGroup | None,
        all_params: Iterable[Any] | nn.Module | None,
        models: Sequence[nn.Module] = (),
    ) -> None:
        """Take parameters and options; :meth:`_build` is still to be called."""
        defaults = {"precondition": None, **defaults}
        reshard(models)  # a root that is gathered would have no parameters of ours
        self._kinds = kinds_of(models)
        self._whole_model = None if all_params is None else described(all_params, defaults)
        self._process_group, self._pipeline_group = process_group, pipeline_group
        self._is_complete = False
        given = params.named_parameters() if isinstance(params, nn.Module) else params
        super().__init__(given, defaults)
        self._is_complete = self._is_fresh = True

    def __getstate__(self) -> dict[str, Any]:
        """What torch pickles, what is known of the rest of the model, and given process groups."""
        groups = {"_process_group": self._process_group, "_pipeline_group": self._pipeline_group}
        given = {key: _Shared(group) for key, group in groups.items() if group is not None}
        kinds = {p: self._kinds[p] for _, p in self._all_named() if p in self._kinds}
        known = {"_whole_model": self._whole_model, "_kinds": kinds}
        return super().__getstate__() | known | given

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build anew after pickling or deepcopy, and put the state into its place."""
        super().__setstate__(state)
        self.__dict__.setdefault("_whole_model", None)
        self.__dict__.setdefault("_kinds", {})
        for key in ("_process_group", "_pipeline_group"):
            self.__dict__[key] = state[key].group if key in state else None
        self._is_complete = True
        before = dict(self.state)
        self._build()
        self._carry_over(before)

    def _named(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Parameters of a group with their names."""
        return self._as_given(group)

    def _as_given(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Parameters with the names that they were given, else with numbers in the optimizer."""
        names = group.get("param_names") or map(str, itertools.count(self._first_number(group)))
        return zip(names, group["params"], strict=False)

    def _first_number(self, group: Mapping[str, Any]) -> int:
        """Number in the optimizer of the first parameter of a group.

        Kept for all groups: counted anew for each, thousands of groups would take minutes.
        """
        groups = self.param_groups
        place, first = self._first_numbers.get(id(group), (len(groups), 0))
        if place >= len(groups) or groups[place] is not group:
            firsts = itertools.accumulate((len(other["params"]) for other in groups), initial=0)
            self._first_numbers = {
                id(other): numbers
                for other, numbers in zip(groups, enumerate(firsts), strict=False)
            }
            _, first = self._first_numbers[id(group)]
        return first

    def _all_named(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters with their names, group by group."""
        for group in self.param_groups:
            yield from self._named(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; the state of those already here is kept.

        Raises:
            ValueError: If an option is impossible or a parameter is not real-valued, or if blocks
                would go to other ranks after the first step; then nothing is added.
        """
        if self._is_complete:
            self._follow_others()
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            if self._is_complete:
                self._build_anew(dict(self.state))
                self._say_who_steps_what()
        except Exception:
            self.param_groups.pop()
            raise

    def _build_anew(self, kept: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Plan and allocate anew, carry over the state ``kept``; nothing changes if that fails."""
        before = dict(self.__dict__)
        try:
            self._build()
            self._check_kept(kept)
            self._carry_over(kept)
        except Exception:
            self.__dict__.update(before)
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Complete the last parameter group, or raise ValueError."""
        if group["method"] != self.defaults["method"]:
            raise ValueError(f"method: got {group['method']!r} in a parameter group of "
                             f"{type(self).__name__}; make another optimizer for it")  # fmt: skip
        self._check_options(group)  # it knows options of other methods, and what to do without them
        check_keys(group, type(self).__name__, self.defaults)
        group.setdefault("peak_lr", float(group["lr"]))
        check_alike(self.param_groups, self.step_options)
        odd = [p for p in group["params"] if p.is_complex() or getattr(p, "_fsdp_flattened", False)]
        if odd:  # names are looked up then alone: numbers take time like all groups
            name = next(name for name, param in self._as_given(group) if param is odd[0])
            if not odd[0].is_complex():
                raise ValueError(f"{name}: is flattened by FullyShardedDataParallel, which leaves "
                                 "no matrices; shard with fully_shard (FSDP2)")  # fmt: skip
            raise ValueError(f"{name}: got {odd[0].dtype}, wanted a real dtype; "
                             "pass torch.view_as_real of it")  # fmt: skip

    def _kind(self, name: str, param: Tensor) -> Kind | None:
        """What the module of a parameter is, where it is known here or of the whole model."""
        return self._kinds_by_name.get(name) or self._kinds.get(param)

    @functools.cached_property
    def _kinds_by_name(self) -> dict[str, Kind]:
        """What the modules of the whole model say of its parameters."""
        whole = self._whole_model or ()
        return {param.name: param.kind for param in whole if param.kind is not None}

    def _say_who_steps_what(self) -> None:
        """Log once which parameters are preconditioned, and why the others are not."""
        if not self._speaks or self._device.type == "meta":
            return
        used = {group["fallback"] for group in self.param_groups} - {None}
        fallback = " or ".join(FALLBACKS[name] for name in sorted(used))
        params, method = list(self._all_named()), type(self).__name__
        logger.info("%s", summary_of(method, fallback, params, self._reasons))
        for name, param in params:
            if param in self._reasons:
                logger.debug("%s is stepped by %s: %s", name, fallback, self._reasons[param])

    def _check_kept(self, before: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Raise ValueError on all ranks, if blocks of any have new owners and begun state."""
        lost = [
            name
            for name, param in self._all_named()
            if has_begun(before.get(param, {})) and not is_alike(before[param], self.state[param])
        ]
        which = self._first_anywhere(lost, "a parameter of other ranks")
        if which is not None:
            raise ValueError(f"{which}: its blocks would go to other ranks, without their state; "
                             "add groups before the first step, or save sharded_state() and load "
                             "it into an optimizer of all groups")  # fmt: skip

    def _first_anywhere(self, names: Sequence[str], elsewhere: str) -> str | None:
        """The first of ``names``; if this rank has none, but another has, ``elsewhere``."""
        count = torch.tensor(float(len(names)), device=self._device)
        for group in self._deciding_groups:
            dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
        return next(iter(names), elsewhere) if count else None

    def _state_beside_params(self) -> defaultdict[Any, Any]:
        """What others keep in ``state`` under keys of their own, to begin new state with."""
        kept = {key: value for key, value in self.state.items() if not isinstance(key, Tensor)}
        return defaultdict(dict, kept)

    def _carry_over(self, before: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Take over state that has begun."""
        for param, state in before.items():
            if isinstance(param, Tensor) and has_begun(state):
                copy_state(self.state[param], state)

    @not_traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - torch's signature
        """Take one step and return what ``closure`` returned.

        Parameters without a gradient on any rank do not move and do not age; a shard that lacks its
        part counts as zero, a replica takes it from one that has it. If any gradient on any rank is
        not finite (or a statistic of a layer), nothing changes on any rank but the schedule of
        refreshes, which goes on, and ``skipped_steps`` grows. (A direction that is beyond the range
        of its dtype rests alone, and its step is counted with the next one.) A refresh that fails
        leaves its block the last good roots or inverses and is repeated in float64 in the next
        step.

        Raises:
            RuntimeError: On all ranks, after ``max_skipped`` steps or ``max_failures`` refreshes of
                one block in a row that failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_before_step()
        try:
            self._advance()
        finally:
            self._forget_measured()
        return loss

    def _advance(self) -> None:
        """Take a step that this rank has nothing against, skip it, or end the run."""
        here = self._gradient_pattern.codes()
        norms = self._norms(here)
        on_device = agreed_status(
            [*norms.values(), *self._norms_beside()],
            self._worst_failure().float(),
            self._deciding_groups,
            has_new_pattern=self._gradient_pattern.is_news(here),
            parts_replicas=self._gradient_pattern.parts_replicas(here),
            was_beyond=self._beyond(),
        )
        status = self._statuses.read(on_device)
        self._name_bad(status.worst, norms)
        self._statuses.count(status, self.param_groups[0]["max_skipped"])
        self._see_to_failures(status.worst)
        late = self._statuses.late
        now = (lambda: StepStatus(*on_device.tolist()).pattern_flags) if late else None
        is_agreed = self._gradient_pattern.follow(here, status.pattern_flags, now)
        grads = self._gradient_pattern.completed(here)
        if is_agreed:
            self._check_trained(grads)
        self._idleness.count(len(grads), self._as_made.names)
        own = {param: norms[param] for param in self._gradient_pattern.untouched(here)}
        if late:
            self._take_step(grads, own, may_change(on_device, is_agreed=is_agreed))
        elif status.worst < math.inf:
            self._take_step(grads, own, None)
        else:
            self._pass_time(grads)

    def _forget_measured(self) -> None:
        """Forget what was measured for a step, taken or not."""

    def _check_before_step(self) -> None:
        """Refuse what cannot be stepped, before anything moves."""
        self._follow_others()
        self._as_made.check_tensors()
        self._check_dense()
        self._check_groups()
        self._check_momentum()
        self._peaks.follow(self.param_groups, self._depends_on_peak)
        self._is_fresh = False

    def _check_groups(self) -> None:
        """Refuse options that were set or taken out since the last step."""
        check_rates(self.param_groups)
        # Unpickled, the defaults have a switch of torch's.
        options = [key for key in self.defaults if key not in SWITCHES_OF_TORCH]
        changed = self._as_made.changed(self.param_groups, options)
        for group in changed:
            check_complete(group, options)
        for group in changed:
            self._check_options(group)
            self._check_state_of(group)
            check_alike([self.param_groups[0], group], self.step_options)
        if changed:
            self._as_made.check_fixed(self.param_groups)
            self._as_made.accept(self.param_groups)

    def _follow_others(self) -> None:
        """Plan anew if others replaced groups, or their parameters before the first step.

        Accelerate replaces parameters by sharded ones, Lightning's finetuning restores groups.

        Raises:
            RuntimeError: If there is state of other parameters already, or no matrix is left.
        """
        if not self._as_made.has_others(self.param_groups):
            return
        params = [param for group in self.param_groups for param in group["params"]]
        if self._as_made.has_matrices and not any(param.dim() > 1 for param in params):
            raise RuntimeError("params: all tensors that were put into the parameter groups are "
                               "flat (as DeepSpeed's ZeRO does), which leaves no matrices; shard "
                               "with fully_shard (FSDP2)")  # fmt: skip
        if not self._is_fresh and set(params) != self._as_made.params:
            raise RuntimeError("params: a parameter group has other tensors than those that state "
                               "was made for; add some by add_param_group, or make another "
                               "optimizer")  # fmt: skip
        self._build_anew({} if self._is_fresh else dict(self.state))

    def _check_state_of(self, group: dict[str, Any]) -> None:
        """Raise ValueError if options of a group want state that was not made."""

    def _depends_on_peak(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's step depends on the largest learning rate of its schedule."""
        decays = group["weight_decay"] > 0
        return decays and group["weight_decay_type"] in ("corrected", "independent")

    def _check_trained(self, grads: Grads) -> None:
        """Name parameters that a model has replaced; called when other ones have a gradient."""

    def _check_momentum(self) -> None:
        """Refuse a heavy ball that a group has no memory for."""
        for group in self._without_momentum:
            if group["momentum"] and any(
                self._has_momentum(name, param, group) for name, param in self._named(group)
            ):
                raise ValueError(f"momentum: got {group['momentum']} in an optimizer that was made "
                                 "without; make it with momentum > 0, and then set 0")  # fmt: skip

    def _has_momentum(self, name: str, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether a parameter is moved by a heavy ball, if the group has one, and not by AdamW."""
        raise NotImplementedError

    def _worst_failure(self) -> Tensor:
        """How many refreshes of any block here failed in a row, 0-dim."""
        return torch.zeros((), device=self._device)

    def _beyond(self) -> Tensor:
        """Whether a direction was left out since this was asked last, 0-dim."""
        return torch.zeros((), device=self._device)

    def _repair(self) -> list[str]:
        """Repeat failed refreshes, and return what is to be said about each."""
        return []

    def _norms_beside(self) -> list[Tensor]:
        """Norms of what must be finite beside gradients, 0-dim."""
        return []

    def _take_step(self, grads: Grads, norms: Grads, taken: Tensor | None) -> None:
        """Step every parameter with a gradient.

        Args:
            grads: This rank's part of each gradient, by parameter.
            norms: Norms of some of them.
            taken: Whether anything is to change, 0-dim bool; None where the host knows that it is.
        """
        raise NotImplementedError

    def _pass_time(self, grads: Grads) -> None:
        """Let the schedule go on in a step that changes nothing."""
        raise NotImplementedError

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a gradient or a statistic was not finite.

        And those in which a direction was beyond the range of its dtype: its block or layer rested.
        They are counted in the step after. On accelerators the host knows of one a step late.
        """
        return self._statuses.skipped_steps

    def _norms(self, here: Sequence[int]) -> dict[Tensor, Tensor]:
        """Of the gradients of this rank; finite if and only if they are.

        Of one that ranks have yet to sum: the square of a bound of the sum's.

        Args:
            here: How each is placed.
        """
        params = [param for _, param in self._all_named()]
        terms = {param: num_terms(param, code) for param, code in zip(params, here, strict=True)}
        found = ((param, gradient_here(param)) for param in params)
        held = {param: grad for param, grad in found if grad is not None}
        return {
            param: norm if terms[param] == 1 else (norm * terms[param]).square()
            for param, norm in zip(held, norms_of(held.values()), strict=True)
        }

    def _name_bad(self, worst: float, norms: Grads) -> None:
        """Say, on the ranks that have them, which gradients of a skipped step were not finite.

        Args:
            worst: Of the step that the host reads about, which may be the one before.
            norms: Of this step.
        """
        seen = norms
        if self._statuses.late:
            seen, self._norms_before = self._norms_before, norms
        if worst != math.inf:
            return
        names = [
            n for n, param in self._all_named() if param in seen and not seen[param].isfinite()
        ]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            logger.warning("not finite on this rank: gradient of %s%s", ", ".join(names[:5]), more)

    def _see_to_failures(self, worst: float) -> None:
        """Repeat failed refreshes.

        Raises:
            RuntimeError: On all ranks alike, after too many failures of a block in a row.
        """
        if not 0 < worst < math.inf:
            return
        for line in self._repair():
            logger.warning("%s", line)
        if worst >= self.param_groups[0]["max_failures"]:
            raise RuntimeError(f"{worst:.0f} refreshes of a block failed in a row, as its rank has "
                               f"logged; raise {self.damping_option}, or max_failures")  # fmt: skip

    def _replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold plain tensors: the given group, else all."""
        if self._process_group is None and dist.is_initialized():
            return dist.group.WORLD
        return self._process_group

    def _follow_loaded(self) -> None:
        self._as_made.learn(self.param_groups)
        states = (self.state.get(param, {}) for _, param in self._all_named())
        self._is_fresh &= not any(map(has_begun, states))

    def _is_stage(self) -> bool:
        is_one_of_many = self._pipeline_group is not None and self._pipeline_group.size() > 1
        return is_one_of_many or self._whole_model is not None

    def _meet(self) -> None:
        """Find out who holds which parameters, and who decides with whom."""
        params = list(self._all_named())
        self._check_names(params)
        self._device = params[0][1].device if params else torch.device("cpu")
        self._check_agreement(self._given_facts)
        if not hasattr(self, "_statuses"):
            self._statuses = StatusReader(self._device)
            self._peaks, self._idleness = Peaks(), Idleness()
        self._as_made = AsMade(
            self.param_groups, params, (*self.shape_options, *self.fixed_options)
        )
        self._without_momentum = [group for group in self.param_groups if not group["momentum"]]
        self._norms_before = {}
        placement_groups = [layout_of(param, self._replicas(), name)[0] for name, param in params]
        self._speaks = not placement_groups or (
            placement_groups[0].replica,
            placement_groups[0].shard,
        ) == (0, 0)
        self._gradient_pattern = GradientPattern(
            [param for _, param in params], placement_groups, self._device
        )
        self._deciding_groups = decision_groups(
            placement_groups, self._process_group, self._pipeline_group
        )

    def _check_agreement(self, facts: Callable[[], Mapping[Tensor, CheckedValues]]) -> None:
        """Raise ValueError on all ranks alike, if they know different things of what they share.

        Args:
            facts: Makes them of some parameters, in the order in which messages are made.
        """
        if self._device.type == "meta":  # planned only: there is nobody to compare with
            return
        found = facts()
        known = {
            param: CheckedParameter(name, param, number, {
                "method that steps it": group["method" if param in found else "fallback"],
                **found.get(param, {}),
            })
            for number, group in enumerate(self.param_groups)
            for name, param in self._named(group)
        }  # fmt: skip
        ordered = [known[param] for param in {**found, **known}]
        check_agreement(ordered, self._replicas(), self._stages())

    def _given_facts(self) -> dict[Tensor, CheckedValues]:
        """All that messages and iterates follow from: parameters, placements and options."""
        stages = 1 if self._pipeline_group is None else self._pipeline_group.size()
        keys = [*self.defaults, "peak_lr"]  # a group may have more, of others: schedules, users
        return {
            param: {
                "shape": tuple(param.shape),
                "dtype": param.dtype,
                "placement": _placement(param),
                "number of stages in pipeline_group": stages,
                **{key: _plain(group[key]) for key in keys if key in group},
            }
            for group in self.param_groups
            for param in group["params"]
        }

    def _stages(self) -> ConsistencyCheck | None:
        """What the stages of a pipeline must all know, whatever parameters they have."""
        if self._pipeline_group is None or self._pipeline_group.size() == 1:
            return None
        group = self.param_groups[0]
        keys = [key for key in ("method", *self.step_options) if key in group]
        facts = {key: _plain(group[key]) for key in keys}
        known = {"pipeline_group": facts}
        return ConsistencyCheck(
            [self._pipeline_group], self._device, "give all stages the same", known
        )

    @staticmethod
    def _check_names(params: Iterable[tuple[str, Tensor]]) -> None:
        """Refuse a name of two parameters: state is saved by name, and one would be lost."""
        found: dict[str, Tensor] = {}
        for name, param in params:
            if found.setdefault(name, param) is not param:
                raise ValueError(f"{name}: is the name of two parameters; give each its own")

    def _check_dense(self) -> None:
        """Refuse sparse gradients."""
        for name, param in self._all_named():
            if param.grad is not None and param.grad.is_sparse:
                raise ValueError(f"{name}: got a sparse gradient, wanted a dense one; "
                                 "set sparse=False in its module")  # fmt: skip


def _placement(param: Tensor) -> object:
    """How a parameter is placed, and on how many ranks along each axis; None for a plain one."""
    if not isinstance(param, DTensor):
        return None
    return param.placements, tuple(param.device_mesh.shape)


def _plain(value: object) -> object:
    """The value of an option, which a tensor would not be written out as."""
    return value.tolist() if isinstance(value, Tensor) else value
