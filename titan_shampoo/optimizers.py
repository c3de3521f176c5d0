"""The public optimizers: torch.optim.Optimizer outside, one engine inside.

Nothing distributed has to be configured: meshes and placements are read off the parameters.
"""

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.geometry import Merge, make_grid
from titan_shampoo.distributed.layout import layout_of, local_tensor
from titan_shampoo.distributed.plan import Cost, Parameter, make_plan
from titan_shampoo.engine import Engine, Member
from titan_shampoo.fallback import adamw_step, empty_state, falls_back
from titan_shampoo.functional.grafting import Grafting
from titan_shampoo.functional.roots import RootMethod
from titan_shampoo.functional.rule import Rule
from titan_shampoo.functional.shampoo import ShampooRule

__all__ = ["BlockOptimizer", "Shampoo"]

logger = logging.getLogger(__name__)

WeightDecay = Literal["l2", "decoupled", "corrected", "independent"]


class BlockOptimizer(torch.optim.Optimizer):
    """A method for blocks of matrices, with a diagonal method for all other parameters.

    A subclass names its rule and its options; the step, the state and its distribution are the
    same for all.
    """

    rule: Rule
    grid_options = ("block_size", "merge", "batch_dims")
    """Options that give state its shape: a state with others cannot be loaded."""

    skipped_steps: int
    """Steps that changed nothing because a gradient was not finite."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self.skipped_steps = 0
        self._process_group = process_group
        self._is_complete = False
        super().__init__(params, defaults | {"method": self.rule.name})
        self._is_complete = True
        self._warn_without_names()
        self._build()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError for an option that is impossible, alone or with the others."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; the state of those already here is kept.

        Raises:
            ValueError: If an option is impossible or a parameter is not real-valued.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("peak_lr", float(group["lr"]))
        self.check_options(group)
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
        not finite, nothing changes on any rank and ``skipped_steps`` grows.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._gradients_are_finite():
            self.skipped_steps += 1
            logger.warning("step skipped: a gradient is not finite (%d so far)", self.skipped_steps)
            return loss
        if self._engine is not None:
            self._engine.step({
                number: local_tensor(member.param.grad)
                for number, member in enumerate(self._engine.members)
                if member.param.grad is not None
            })  # fmt: skip
        for group, params in zip(self.param_groups, self._fallback_params, strict=True):
            moving = [param for param in params if param.grad is not None]
            if moving:
                adamw_step(moving, [self.state[param] for param in moving], group)
        return loss

    def sharded_state(self) -> dict[str, dict[str, Tensor]]:
        """All state by parameter name, as live tensors to save and to load in place.

        For distributed checkpoints: every tensor is global, and its key and shape depend neither
        on the rank nor on the mesh.
        """
        state: dict[str, dict[str, Tensor]] = {}
        if self._engine is not None:
            for number, member in enumerate(self._engine.members):
                common = self._engine.common_state(number)
                state[member.name] = common | self._engine.sharded_state(number)
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the plan after pickling or deepcopy, and put the state into its stacks."""
        super().__setstate__(state)
        self.__dict__.setdefault("_process_group", None)
        self.__dict__.setdefault("skipped_steps", 0)
        self._is_complete = True
        self._build()

    def _build(self) -> None:
        """Plan the blocks, allocate all state, and carry over what was there before."""
        before = dict(self.state)
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
            self._engine = engine = Engine(members, self.rule, plan)
            for number, member in enumerate(members):
                common = engine.common_state(number)
                self.state[member.param] = common | engine.block_state(number)
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

    def _gradients_are_finite(self) -> bool:
        """Whether all gradients on all ranks are finite; one all-reduce of one element."""
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [local_tensor(param.grad) for param in params if param.grad is not None]
        if any(grad.is_sparse for grad in grads):
            raise ValueError(
                "got a sparse gradient, wanted a dense one; set sparse=False in its module"
            )
        bad = torch.zeros((), device=local_tensor(params[0]).device)
        grads = [grad for grad in grads if grad.numel()]
        if grads:
            largest = torch.stack([norm.float() for norm in torch._foreach_norm(grads, math.inf)])
            bad += ~largest.isfinite().all()
        if dist.is_initialized():
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self._process_group)
        return bad.item() == 0

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError if saved parameter groups do not fit these."""
        counts = [len(group["params"]) for group in self.param_groups]
        others = [len(group["params"]) for group in groups]
        if counts != others:
            raise ValueError(f"param_groups: the state has {others} parameters, wanted {counts}")
        for group, other in zip(self.param_groups, groups, strict=True):
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


class Shampoo(BlockOptimizer):
    """Blocked Shampoo (Gupta et al. 2018; Shi et al. 2023, arXiv 2309.06497).

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or groups; plain, DDP, FSDP2, HSDP or
            tensor-parallel.
        lr: Learning rate, at least zero.
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
        precondition_frequency: Steps between two refreshes of a block's roots.
        start_step: First step that uses roots; None for ``precondition_frequency``.
        refresh: ``"staggered"`` spreads the blocks over the period, ``"together"`` refreshes all
            in one step.
        grafting: Whose step length is used: ``"sgd"``, ``"adagrad"``, ``"rmsprop"``, ``"adam"`` or
            None.
        grafting_beta2: Decay of the grafted method's second moments; None for ``betas[1]``.
        grafting_eps: Added to the root of second moments, in grafting and in the fallback.
        exponent: Positive power of the inverse roots, one or one per dim (0 switches a dim off);
            None for ``1 / (2 * order)``.
        bias_correction: Whether averages are corrected for their start at zero.
        root_method: ``"eigh"``, ``"newton"`` or ``"auto"``.
        factor_dtype: Dtype of all state of preconditioned parameters; None for float32, or float64
            for float64 parameters.
        batch_dims: Leading dims that stack independent matrices, such as experts.
        process_group: Ranks that hold plain tensors as replicas; None for all ranks.
        fallback: ``"adamw"`` for vectors, embeddings, output heads and routers, or None to
            precondition all.

    Raises:
        ValueError: For an impossible option, a complex parameter, or a partial placement.
    """

    rule = ShampooRule()

    def __init__(
        self,
        params: Iterable[Any],
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
        batch_dims: int = 0,
        process_group: dist.ProcessGroup | None = None,
        fallback: Literal["adamw"] | None = "adamw",
    ) -> None:
        options = dict(locals())
        for key in ("self", "params", "process_group", "__class__"):
            options.pop(key, None)
        super().__init__(params, options, process_group)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError for an option that is impossible, alone or with the others."""
        check_shampoo_options(options)


def check_shampoo_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError naming the option, what was got and what is wanted."""
    beta1, beta2 = options["betas"]
    limits = [
        ("lr", options["lr"], options["lr"] >= 0, "at least 0"),
        ("betas[0]", beta1, 0 <= beta1 < 1, "in [0, 1)"),
        ("betas[1]", beta2, 0 < beta2 <= 1, "in (0, 1]"),
        ("eps", options["eps"], options["eps"] > 0, "greater than 0"),
        ("weight_decay", options["weight_decay"], options["weight_decay"] >= 0, "at least 0"),
        ("momentum", options["momentum"], 0 <= options["momentum"] < 1, "in [0, 1)"),
        ("dampening", options["dampening"], 0 <= options["dampening"] <= 1, "in [0, 1]"),
        ("grafting_eps", options["grafting_eps"], options["grafting_eps"] > 0, "greater than 0"),
    ]
    limits += [
        (key, options[key], options[key] is None or 0 < options[key] <= 1, "in (0, 1]")
        for key in ("eps_relative", "beta3", "grafting_beta2")
    ]
    sizes = (
        options["block_size"]
        if not isinstance(options["block_size"], int)
        else (options["block_size"],)
    )
    limits.append(("block_size", sizes, min(sizes) >= 1, "positive"))
    for key in ("precondition_frequency", "start_step"):
        value = options[key]
        limits.append((key, value, value is None or value >= 1, "at least 1 step"))
    for key, value, good, wanted in limits:
        if not good:
            raise ValueError(f"{key}: got {value!r}, wanted {wanted}")
    _check_choices(options)
    if options["nesterov"] and options["momentum"] == 0:
        raise ValueError("nesterov: got True with momentum 0; set momentum, or nesterov=False")
    graft_beta2 = beta2 if options["grafting_beta2"] is None else options["grafting_beta2"]
    if options["grafting"] in ("adam", "rmsprop") and graft_beta2 == 1:
        raise ValueError("grafting_beta2: got 1 (betas[1] if None), wanted below 1; "
                         "set it, or grafting='adagrad'")  # fmt: skip


CHOICES: dict[str, tuple[Any, ...]] = {
    "weight_decay_type": ("l2", "decoupled", "corrected", "independent"),
    "merge": ("matrix", "paper", "none"),
    "refresh": ("staggered", "together"),
    "grafting": (None, "sgd", "adagrad", "rmsprop", "adam"),
    "root_method": ("auto", "eigh", "newton"),
    "factor_dtype": (None, torch.float32, torch.float64),
    "fallback": (None, "adamw"),
}


def _check_choices(options: Mapping[str, Any]) -> None:
    for key, choices in CHOICES.items():
        if options[key] not in choices:
            raise ValueError(f"{key}: got {options[key]!r}, wanted one of {choices}")


_FIXED_KEYS = ("params", "param_names", "method")


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
