"""What all methods for blocks share: torch.optim.Optimizer outside, one engine inside.

Nothing distributed has to be configured: meshes and placements are read off the parameters.
"""

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.block_state import Member
from titan_shampoo.distributed.agreement import check_agreement
from titan_shampoo.distributed.geometry import make_grid
from titan_shampoo.distributed.layout import layout_of, local_gradient
from titan_shampoo.distributed.plan import Cost, Parameter, make_plan
from titan_shampoo.engine import Engine
from titan_shampoo.failure import Watch, worst_of
from titan_shampoo.fallback import adamw_step, empty_state, falls_back
from titan_shampoo.functional.rule import Rule
from titan_shampoo.options import check_options

logger = logging.getLogger(__name__)

_FIXED_KEYS = ("params", "param_names", "method")
"""Keys of a parameter group that a loaded state does not change."""


class BlockOptimizer(torch.optim.Optimizer):
    """A method for blocks of matrices, with a diagonal method for all other parameters.

    A subclass names its rule and its options; the step, the state and its distribution are the
    same for all.
    """

    rule: Rule
    grid_options = ("block_size", "merge", "batch_dims")
    """Options that give state its shape: a state with others cannot be loaded."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._process_group = process_group
        self._is_complete = False
        super().__init__(params, defaults | {"method": self.rule.name})
        self._is_complete = True
        self._warn_without_names()
        self._build()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; the state of those already here is kept.

        Raises:
            ValueError: If an option is impossible or a parameter is not real-valued.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("peak_lr", float(group["lr"]))
        check_options(group)
        for name, param in _named(group):
            if param.is_complex():
                raise ValueError(f"{name}: got {param.dtype}, wanted a real dtype; "
                                 "pass torch.view_as_real of it")  # fmt: skip
        if self._is_complete:
            self._build()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - torch's signature
        """Take one step and return what ``closure`` returned.

        Parameters without a gradient do not move and do not age. If any gradient on any rank is
        not finite, nothing changes on any rank but the schedule of refreshes, which goes on, and
        ``skipped_steps`` grows. A refresh that fails
        leaves its block the last good roots and is repeated in float64 in the next step.

        Raises:
            RuntimeError: On all ranks, after ``max_skipped`` steps or ``max_failures`` refreshes of
                one block in a row that failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = self._local_gradients()
        failures = torch.zeros((), device=self._device)
        if self._engine is not None:
            failures = self._engine.worst_failure()
        worst = worst_of(grads.values(), failures, self._process_group)
        verdict = self._watch.read(worst)
        self._watch.count(verdict, self.defaults["max_skipped"])
        self._see_to_failures(verdict)
        if self._watch.late:
            self._take_step(grads, taken=worst.isfinite())
        elif verdict < math.inf:
            self._take_step(grads, taken=None)
        elif self._engine is not None:
            self._engine.pass_time(self._numbered(grads))
        return loss

    def _take_step(self, grads: Mapping[Tensor, Tensor], taken: Tensor | None) -> None:
        """Step every parameter with a gradient, if ``taken``."""
        if self._engine is not None:
            self._engine.step(self._numbered(grads), taken)
        for group, params in zip(self.param_groups, self._fallback_params, strict=True):
            moving = [param for param in params if param in grads]
            if moving:
                states = [self.state[param] for param in moving]
                adamw_step(moving, [grads[param] for param in moving], states, group, taken)

    def _numbered(self, grads: Mapping[Tensor, Tensor]) -> dict[int, Tensor]:
        """Gradients of the engine's parameters by number."""
        assert self._engine is not None
        members = enumerate(self._engine.members)
        return {number: grads[member.param] for number, member in members if member.param in grads}

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a gradient was not finite.

        On accelerators the host knows of one a step late.
        """
        return self._watch.skipped_steps

    @property
    def failed_refreshes(self) -> int:
        """Blocks on this rank that kept their last good roots, since the start."""
        return 0 if self._engine is None else int(self._engine.failed_refreshes)

    def sharded_state(self) -> dict[str, dict[str, Tensor]]:
        """All state by parameter name, as live tensors to save and to load in place.

        For distributed checkpoints: every tensor is global, and its key and shape depend neither
        on the rank nor on the mesh.
        """
        state: dict[str, dict[str, Tensor]] = {}
        if self._engine is not None:
            for number, member in enumerate(self._engine.members):
                common = self._engine.common_state(number)
                state[member.name] = common | self._engine.state.sharded(number)
        for group in self.param_groups:
            for name, param in _named(group):
                if name not in state:
                    state[name] = dict(self.state[param])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned on the same layout of ranks; dtypes are kept.

        Raises:
            ValueError: If the state is of another method, of other parameters or of another block
                grid. Nothing is changed then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        groups, saved = state_dict["param_groups"], state_dict["state"]
        self._check_groups(groups)
        pairs = [
            (name, self.state[param], saved.get(index, {}))
            for group, old in zip(self.param_groups, groups, strict=True)
            for (name, param), index in zip(_named(group), old["params"], strict=True)
        ]
        for name, mine, other in pairs:
            _check_state(name, mine, other)
        for _, mine, other in pairs:
            _copy_state(mine, other)
        for group, old in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in old.items() if key not in _FIXED_KEYS})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the plan after pickling or deepcopy, and put the state into its stacks."""
        super().__setstate__(state)
        self.__dict__.setdefault("_process_group", None)
        self._is_complete = True
        self._build()

    def _build(self) -> None:
        """Plan the blocks, allocate all state, and carry over what was there before."""
        before = dict(self.state)
        params = [param for group in self.param_groups for param in group["params"]]
        self._device = params[0].device if params else torch.device("cpu")
        if not hasattr(self, "_watch"):
            self._watch = Watch(self._device)
        members = []
        self._fallback_params: list[list[Tensor]] = []
        self.state = defaultdict(dict)
        for group in self.param_groups:
            fallback = []
            for name, param in _named(group):
                if falls_back(name, param, group):
                    fallback.append(param)
                    self.state[param] = empty_state(param)
                else:
                    members.append(Member(name, param, group))
            self._fallback_params.append(fallback)
        self._engine = None
        if members:
            plan = make_plan([self._planned(member) for member in members])
            check_agreement(plan, self._device)
            compiled = self.defaults["compile"]
            self._engine = engine = Engine(members, self.rule, plan, compiled=compiled)
            for number, member in enumerate(members):
                common = engine.common_state(number)
                self.state[member.param] = common | engine.state.of_blocks(number)
        for param, state in before.items():
            _copy_state(self.state[param], state)

    def _planned(self, member: Member) -> Parameter:
        param, options = member.param, member.options
        size = options["block_size"]
        grid = make_grid(
            tuple(param.shape),
            block_size=size if isinstance(size, int) else (size[0], size[1]),
            merge=options["merge"],
            batch_dims=options["batch_dims"],
        )
        exponent = options.get("exponent")
        if isinstance(exponent, (tuple, list)) and len(exponent) < grid.order:
            raise ValueError(f"{member.name}: exponent has {len(exponent)} numbers, "
                             f"wanted {grid.order}, one for each dim")  # fmt: skip
        team, sharding = layout_of(param, self._replicas(), member.name)
        default = torch.float64 if param.dtype == torch.float64 else torch.float32
        return Parameter(
            name=member.name,
            shape=tuple(param.shape),
            grid=grid,
            team=team,
            sharding=sharding,
            group=next(i for i, group in enumerate(self.param_groups) if group is options),
            dtype=options["factor_dtype"] or default,
            period=options["precondition_frequency"],
            cost=lambda shape: Cost(*self.rule.cost(shape, options)),
        )

    def _replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold plain tensors: the given group, else all."""
        if self._process_group is None and dist.is_initialized():
            return dist.group.WORLD
        return self._process_group

    def _local_gradients(self) -> dict[Tensor, Tensor]:
        """This rank's part of every gradient that is there."""
        grads = {}
        for group in self.param_groups:
            for name, param in _named(group):
                grad = local_gradient(param)
                if grad is not None and grad.is_sparse:
                    raise ValueError(f"{name}: got a sparse gradient, wanted a dense one; "
                                     "set sparse=False in its module")  # fmt: skip
                if grad is not None:
                    grads[param] = grad
        return grads

    def _see_to_failures(self, verdict: float) -> None:
        """Repeat failed refreshes.

        Raises:
            RuntimeError: On all ranks alike, after too many failures of a block in a row.
        """
        if self._engine is None or not 0 < verdict < math.inf:
            return
        for line in self._engine.repair():
            logger.warning("%s", line)
        if verdict >= self.defaults["max_failures"]:
            raise RuntimeError(f"{verdict:.0f} refreshes of a block failed in a row, as its "
                               "rank has logged; raise eps, or max_failures")  # fmt: skip

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError if saved parameter groups do not fit these."""
        counts = [len(group["params"]) for group in self.param_groups]
        others = [len(group["params"]) for group in groups]
        if counts != others:
            raise ValueError(f"param_groups: the state has {others} parameters, wanted {counts}")
        for group, other in zip(self.param_groups, groups, strict=True):
            names = zip(group.get("param_names", ()), other.get("param_names", ()), strict=False)
            for mine, theirs in names:
                if mine != theirs:
                    raise ValueError(f"{mine}: the state has {theirs!r} in its place")
            method, wanted = other.get("method"), group["method"]
            if method != wanted:
                raise ValueError(f"the state is of method {method!r}, wanted {wanted!r}")
            for key in self.grid_options:
                if other[key] != group[key]:
                    raise ValueError(f"{key}: the state has {other[key]!r}, got {group[key]!r}; "
                                     f"set {key} = {other[key]!r}")  # fmt: skip

    def _warn_without_names(self) -> None:
        if any("param_names" not in group and group["fallback"] for group in self.param_groups):
            warnings.warn(
                "without names, embeddings and output heads cannot be told from other "
                "matrices and are preconditioned; pass model.named_parameters()",
                stacklevel=4,
            )


def _named(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a group with their names (``"0"``, ``"1"``, ... if they were given without)."""
    names = group.get("param_names") or map(str, range(len(group["params"])))
    return zip(names, group["params"], strict=False)


def _check_state(name: str, mine: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise ValueError if saved state does not fit a parameter."""
    if mine.keys() != other.keys():
        differing = sorted(mine.keys() ^ other.keys())
        raise ValueError(f"{name}: the state has {len(other)} entries, wanted {len(mine)}; "
                         f"differing: {', '.join(differing[:5])}")  # fmt: skip
    for key, value in mine.items():
        if value.shape != other[key].shape:
            raise ValueError(f"{name}: {key} of the state has shape {tuple(other[key].shape)}, "
                             f"wanted {tuple(value.shape)}")  # fmt: skip


def _copy_state(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Copy saved state into live memory."""
    with torch.no_grad():
        for key, value in other.items():
            mine[key].copy_(value)
