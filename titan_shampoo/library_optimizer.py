"""What all optimizers of the library share beyond torch's: names, gradients, saved state."""

import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_shampoo.distributed.agreement import Circle, Facts, Known, check_agreement
from titan_shampoo.distributed.gradients import Grads, gradient_here, num_terms
from titan_shampoo.distributed.layout import layout_of
from titan_shampoo.distributed.presence import Presence, judges
from titan_shampoo.failure import Watch, may_be_taken, norms_of, verdict_of
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
from titan_shampoo.saved_state import check_groups, check_state, copy_state, has_begun, load_options
from titan_shampoo.whole_model import Described, described

logger = logging.getLogger(__name__)


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


class LibraryOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is allocated when it is made, and loaded in place."""

    shape_options: ClassVar[tuple[str, ...]]
    """Options that give state its shape: a state with others cannot be loaded."""

    fixed_options: ClassVar[tuple[str, ...]]
    """Further options that plan and state follow from: setting them in a live group is refused."""

    step_options: ClassVar[tuple[str, ...]]
    """Options that all groups share, as they are of the step and of no parameter."""

    damping_option: ClassVar[str]
    """What to raise if refreshes fail."""

    _process_group: dist.ProcessGroup | None
    _pipeline_group: dist.ProcessGroup | None
    _whole_model: list[Described] | None
    """All parameters, where those here are of one stage of a pipeline."""
    _watch: Watch
    _norms_before: Grads
    _as_made: AsMade
    _is_fresh = False
    """Whether no step has been taken, and no state of one been loaded."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None,
        pipeline_group: dist.ProcessGroup | None,
        all_params: Iterable[Any] | None,
    ) -> None:
        """Take parameters and options; :meth:`_build` is still to be called."""
        self._whole_model = None if all_params is None else described(all_params, defaults)
        self._process_group, self._pipeline_group = process_group, pipeline_group
        self._is_complete = False
        super().__init__(params, defaults)
        self._is_complete = self._is_fresh = True

    def __getstate__(self) -> dict[str, Any]:
        """What torch pickles, what is known of the rest of the model, and given process groups."""
        groups = {"_process_group": self._process_group, "_pipeline_group": self._pipeline_group}
        given = {key: _Shared(group) for key, group in groups.items() if group is not None}
        return super().__getstate__() | {"_whole_model": self._whole_model} | given

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build anew after pickling or deepcopy, and put the state into its place."""
        super().__setstate__(state)
        self.__dict__.setdefault("_whole_model", None)
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
        before = itertools.takewhile(lambda other: other is not group, self.param_groups)
        first = sum(len(other["params"]) for other in before)
        numbers = range(first, first + len(group["params"]))
        return zip(group.get("param_names") or map(str, numbers), group["params"], strict=False)

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
        super().add_param_group(param_group)
        before = dict(self.__dict__)
        try:
            self._check_group(self.param_groups[-1])
            if self._is_complete:
                state = dict(self.state)
                self._build()
                self._check_kept(state)
                self._carry_over(state)
        except Exception:
            self.param_groups.pop()
            self.__dict__.update(before)  # as a new plan and its state are put in place of the old
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Complete the last parameter group, or raise ValueError."""
        check_keys(group, type(self).__name__, self.defaults)
        if group["method"] != self.defaults["method"]:
            raise ValueError(f"method: got {group['method']!r} in a parameter group of "
                             f"{type(self).__name__}; make another optimizer for it")  # fmt: skip
        self._check_options(group)
        group.setdefault("peak_lr", float(group["lr"]))
        check_alike(self.param_groups, self.step_options)
        for name, param in self._as_given(group):
            if param.is_complex():
                raise ValueError(f"{name}: got {param.dtype}, wanted a real dtype; "
                                 "pass torch.view_as_real of it")  # fmt: skip

    def _check_kept(self, before: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Raise ValueError on all ranks, if blocks of any have new owners and begun state."""
        lost = [
            name
            for name, param in self._all_named()
            if has_begun(before.get(param, {})) and before[param].keys() != self.state[param].keys()
        ]
        which = self._first_anywhere(lost, "a parameter of other ranks")
        if which is not None:
            raise ValueError(f"{which}: its blocks would go to other ranks, without their state; "
                             "add groups before the first step, or save sharded_state() and load "
                             "it into an optimizer of all groups")  # fmt: skip

    def _first_anywhere(self, names: Sequence[str], elsewhere: str) -> str | None:
        """The first of ``names``; if this rank has none, but another has, ``elsewhere``."""
        count = torch.tensor(float(len(names)), device=self._device)
        for group in self._judges:
            dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
        return next(iter(names), elsewhere) if count else None

    def _carry_over(self, before: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Take over state that has begun."""
        for param, state in before.items():
            if has_begun(state):
                copy_state(self.state[param], state)

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a parameter group has an impossible option."""
        raise NotImplementedError

    def _build(self) -> None:
        """Allocate all state anew; what is replaced is not changed."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - torch's signature
        """Take one step and return what ``closure`` returned.

        Parameters without a gradient on any rank do not move and do not age; a shard that lacks its
        part counts as zero, a replica takes it from one that has it. If any gradient on any rank is
        not finite (or a statistic of a layer), nothing changes on any rank but the schedule of
        refreshes, which goes on, and ``skipped_steps`` grows. A refresh that fails leaves its block
        the last good roots or inverses and is repeated in float64 in the next step.

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
        here = self._presence.codes()
        norms = self._norms(here)
        verdict = verdict_of(
            [*norms.values(), *self._norms_beside()], self._worst_failure().float(), self._judges,
            is_news=self._presence.is_news(here),
            parts_replicas=self._presence.parts_replicas(here),
        )  # fmt: skip
        worst, *flags, _ = self._watch.read(verdict)
        self._name_bad(worst, norms)
        self._watch.count(worst, self.param_groups[0]["max_skipped"])
        self._see_to_failures(worst)
        now = (lambda: verdict.tolist()[1:3]) if self._watch.late else None
        is_agreed = self._presence.follow(here, flags, now)
        grads = self._presence.completed(here)
        if is_agreed:
            self._check_trained(grads)
        self._idleness.count(len(grads), self._as_made.names)
        own = {param: norms[param] for param in self._presence.untouched(here)}
        if self._watch.late:
            self._take_step(grads, own, may_be_taken(verdict, is_agreed=is_agreed))
        elif worst < math.inf:
            self._take_step(grads, own, None)
        else:
            self._pass_time(grads)

    def _forget_measured(self) -> None:
        """Forget what was measured for a step, taken or not."""

    def _check_before_step(self) -> None:
        """Refuse what cannot be stepped, before anything moves."""
        if self._as_made.has_others(self.param_groups):
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
            self._as_made.check_fixed(self.param_groups)
            self._check_state_of(group)
            check_alike([self.param_groups[0], group], self.step_options)
        if changed:
            self._as_made.accept(self.param_groups)

    def _follow_others(self) -> None:
        """Plan anew for parameters that were put into the groups before the first step.

        Raises:
            RuntimeError: If there is state already.
        """
        if not self._is_fresh:
            raise RuntimeError("params: a parameter group has other tensors than those that state "
                               "was made for; add some by add_param_group, or make another "
                               "optimizer")  # fmt: skip
        self._build()
        self._carry_over({})

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

        On accelerators the host knows of one a step late.
        """
        return self._watch.skipped_steps

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
        if self._watch.late:
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned on the same layout of ranks; dtypes are kept.

        Raises:
            ValueError: If the state is of another method, of other parameters or of other shapes.
                Nothing is changed then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        groups, saved = state_dict["param_groups"], state_dict["state"]
        check_groups(self.param_groups, groups, self.shape_options)
        pairs = [
            (name, self.state[param], saved.get(index, {}))
            for group, old in zip(self.param_groups, groups, strict=True)
            for (name, param), index in zip(self._named(group), old["params"], strict=True)
        ]
        for name, mine, other in pairs:
            check_state(name, mine, other)
        for _, mine, other in pairs:
            copy_state(mine, other)
        load_options(self.param_groups, groups)
        self._as_made.learn(self.param_groups)
        counters = (state.get(key) for state in self.state.values() for key in ("step", "cursor"))
        self._is_fresh &= not any(count.any() for count in counters if count is not None)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold plain tensors: the given group, else all."""
        if self._process_group is None and dist.is_initialized():
            return dist.group.WORLD
        return self._process_group

    def _meet(self) -> None:
        """Find out who holds which parameters, and who decides with whom."""
        params = list(self._all_named())
        self._check_names(params)
        self._device = params[0][1].device if params else torch.device("cpu")
        self._check_agreement(self._given_facts)
        if not hasattr(self, "_watch"):
            self._watch, self._peaks, self._idleness = Watch(self._device), Peaks(), Idleness()
        self._as_made = AsMade(
            self.param_groups, params, (*self.shape_options, *self.fixed_options)
        )
        self._without_momentum = [group for group in self.param_groups if not group["momentum"]]
        self._norms_before = {}
        teams = [layout_of(param, self._replicas(), name)[0] for name, param in params]
        self._presence = Presence([param for _, param in params], teams, self._device)
        self._judges = judges(teams, self._process_group, self._pipeline_group)

    def _check_agreement(self, facts: Callable[[], Mapping[Tensor, Facts]]) -> None:
        """Raise ValueError on all ranks alike, if they know different things of what they share.

        Args:
            facts: Makes them of some parameters, in the order in which messages are made.
        """
        if self._device.type == "meta":  # planned only: there is nobody to compare with
            return
        found = facts()
        known = {
            param: Known(name, param, number, {
                "method that steps it": group["method" if param in found else "fallback"],
                **found.get(param, {}),
            })
            for number, group in enumerate(self.param_groups)
            for name, param in self._named(group)
        }  # fmt: skip
        ordered = [known[param] for param in {**found, **known}]
        check_agreement(ordered, self._replicas(), self._stages())

    def _given_facts(self) -> dict[Tensor, Facts]:
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

    def _stages(self) -> Circle | None:
        """What the stages of a pipeline must all know, whatever parameters they have."""
        if self._pipeline_group is None or self._pipeline_group.size() == 1:
            return None
        group = self.param_groups[0]
        keys = [key for key in ("method", *self.step_options) if key in group]
        facts = {key: _plain(group[key]) for key in keys}
        known = {"pipeline_group": facts}
        return Circle([self._pipeline_group], self._device, "give all stages the same", known)

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


def warn_without_names(groups: Sequence[Mapping[str, Any]]) -> None:
    """Say what is lost if some parameters have no names; for constructors of base classes."""
    if any("param_names" not in group and group["fallback"] for group in groups):
        warnings.warn(
            "without names, embeddings and output heads cannot be told from other matrices "
            "and are preconditioned; pass model.named_parameters()",
            stacklevel=4,  # of the user, who calls the constructor of a subclass
        )
