"""What all methods for blocks share: torch.optim.Optimizer outside, one engine inside.

Nothing distributed has to be configured: meshes and placements are read off the parameters.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_shampoo.blocks.engine import Engine
from titan_shampoo.blocks.state import Member, state_bytes
from titan_shampoo.distributed.assignment import Claim
from titan_shampoo.distributed.geometry import Grid, make_grid
from titan_shampoo.distributed.gradients import Grads
from titan_shampoo.distributed.layout import layout_of
from titan_shampoo.distributed.memory import bytes_by_rank
from titan_shampoo.distributed.plan import Cost, Holding, Parameter, make_plan
from titan_shampoo.distributed.summary import Summary, summarize
from titan_shampoo.fallback import adamw_step, empty_state, falls_back, reason_to_fall_back
from titan_shampoo.functional.rule import Rule
from titan_shampoo.library_optimizer import LibraryOptimizer, Params
from titan_shampoo.options import check_options, check_order
from titan_shampoo.recognition import Model, parts_of, warn_without_names, with_names
from titan_shampoo.saved_state import GlobalState
from titan_shampoo.whole_model import Described, slots_in_model

logger = logging.getLogger(__name__)


class BlockOptimizer(LibraryOptimizer):
    """A method for blocks of matrices, with a diagonal method for all other parameters.

    A subclass names its rule and its options; the step, the state and its distribution are the
    same for all.
    """

    rule: Rule
    damping_option = "eps"
    shape_options = ("block_size", "merge", "batch_dims", "block_alignment")
    """Options that give state its shape: a state with others cannot be loaded."""
    fixed_options = (
        "method", "fallback", "compile", "factor_dtype", "root_dtype", "basis_dtype", "state_dtype",
        "communication_dtype",
    )  # fmt: skip
    step_options = ("max_skipped", "max_failures", "compile")

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None,
        all_params: Iterable[Any] | nn.Module | None = None,
        pipeline_group: dist.ProcessGroup | None = None,
        model: Model | None = None,
    ) -> None:
        defaults = defaults | {"method": self.rule.name}
        models = parts_of(params if model is None and isinstance(params, nn.Module) else model)
        if models:
            params = with_names(params, models)
        super().__init__(params, defaults, process_group, pipeline_group, all_params, models)
        warn_without_names(self.param_groups)
        self._build()
        self._say_who_steps_what()

    def _check_options(self, group: dict[str, Any]) -> None:
        check_options(group)

    def _check_state_of(self, group: dict[str, Any]) -> None:
        for order, (name, made) in self._orders.get(id(group), {}).items():
            check_order(name, order, group)
            lacking = sorted(self._state_names(order, group) - made)
            if lacking:
                raise ValueError(f"{name}: options that were set in its group need the state "
                                 f"{', '.join(lacking)}, which was not made; make another "
                                 "optimizer with them")  # fmt: skip

    def _state_names(self, order: int, options: Mapping[str, Any]) -> set[str]:
        """Names of the state of blocks with ``order`` dims."""
        return {shape.name for shape in self.rule.state_shapes((2,) * order, options)}

    def _worst_failure(self) -> Tensor:
        if self._engine is None:
            return super()._worst_failure()
        return self._engine.worst_failure()

    def _beyond(self) -> Tensor:
        return super()._beyond() if self._engine is None else self._engine.beyond()

    def _repair(self) -> list[str]:
        return [] if self._engine is None else self._engine.repair()

    def _take_step(self, grads: Grads, _norms: Grads, taken: Tensor | None) -> None:
        if self._engine is not None:
            self._engine.step(self._numbered(grads), taken)
        for group, params in zip(self.param_groups, self._fallback_params, strict=True):
            moving = [param for param in params if param in grads]
            if moving:
                states = [self.state[param] for param in moving]
                adamw_step(moving, [grads[param] for param in moving], states, group, taken)

    def _pass_time(self, grads: Grads) -> None:
        if self._engine is not None:
            self._engine.pass_time(self._numbered(grads))

    def _numbered(self, grads: Mapping[Tensor, Tensor]) -> dict[int, Tensor]:
        """Gradients of the engine's parameters by number."""
        assert self._engine is not None
        members = enumerate(self._engine.members)
        return {number: grads[member.param] for number, member in members if member.param in grads}

    @property
    def failed_refreshes(self) -> int:
        """Blocks on this rank that kept their last good roots, since the start."""
        return 0 if self._engine is None else int(self._engine.failed_refreshes)

    def preconditions(self, param: Tensor) -> bool:
        """Whether the method steps a parameter; all others are stepped by the fallback."""
        return param not in self._reasons

    def conditions(self) -> dict[str, Tensor]:
        """Condition numbers of the blocks of each parameter by name, ``(blocks,)`` on the device.

        That of a block is the largest over the smallest damped eigenvalue of its worst factor, as
        its last refresh found them: exact, or with Newton's and QR iterations estimated from below.
        Beyond 1e7, float32 has no digits of the smallest ones, and damping decides what is done
        with their directions. It is 0 until a block's first refresh in this process; checkpoints
        do not have it. Communicates: every rank must ask.
        """
        return {} if self._engine is None else self._engine.state.conditions()

    def grids(self) -> dict[str, Grid]:
        """The block grid of each preconditioned parameter, by name."""
        params = [] if self._engine is None else self._engine.plan.params
        return {param.name: param.grid for param in params}

    def plan_summary(self) -> Summary:
        """What every rank owns, computes, keeps and sends in a step; readable by ``print``."""
        like_parameters: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        engine = self._engine
        if engine is not None:
            for number in range(len(engine.members)):
                for key, value in engine.common_state(number).items():
                    pair = (value, engine.members[number].param)
                    like_parameters[key if key == "momentum" else "counters"].append(pair)
        for group, params in zip(self.param_groups, self._fallback_params, strict=True):
            for param in params:
                for key, value in self.state[param].items():
                    like_parameters[f"{group['fallback']} {key}"].append((value, param))
        return summarize(
            [] if engine is None else engine.plan.params,
            [] if engine is None else engine.plan.blocks,
            {k: bytes_by_rank(held, self._replicas()) for k, held in like_parameters.items()},
        )

    def _global_state(self) -> GlobalState:
        found: GlobalState = {}
        engine = self._engine
        for number, member in enumerate([] if engine is None else engine.members):
            assert engine is not None
            found[member.param] = engine.common_state(number) | engine.state.sharded(number)
        order = (param for group in self.param_groups for param in group["params"])
        return {param: found.get(param) or dict(self.state[param]) for param in order}

    def _holdings(self) -> dict[Tensor, list[Holding]]:
        if self._engine is None:
            return {}
        params = (member.param for member in self._engine.members)
        pairs = zip(params, self._engine.state.holdings, strict=True)
        return {param: holdings for param, holdings in pairs if holdings}  # not of empty ones

    def _build(self) -> None:
        """Plan the blocks and allocate all state."""
        members = []
        self._fallback_params: list[list[Tensor]] = []
        self.state = self._state_beside_params()
        self._reasons = {}
        for group in self.param_groups:
            fallback = []
            for name, param in self._named(group):
                reason = reason_to_fall_back(name, param, group, self._kind(name, param))
                if reason is None:
                    members.append(Member(name, param, group))
                else:
                    fallback.append(param)
                    self.state[param] = empty_state(param)
                    self._reasons[param] = reason
            self._fallback_params.append(fallback)
        self._meet()
        self._engine = None
        numbers = {id(group): number for number, group in enumerate(self.param_groups)}
        self._orders: dict[int, dict[int, tuple[str, set[str]]]] = defaultdict(dict)
        """By group: one parameter of each number of dims, and the names of its state."""
        planned = [self._planned(member, numbers[id(member.options)]) for member in members]
        for member, plan_of in zip(members, planned, strict=True):
            order, orders = plan_of.grid.order, self._orders[id(member.options)]
            if order not in orders:
                orders[order] = (member.name, self._state_names(order, member.options))
        claims = [param.claim for param in planned]
        plan = make_plan(planned, slots_in_model(claims, self._whole_model, self._claim))
        params = [member.param for member in members]
        self._check_agreement(lambda: dict(zip(params, plan.facts(), strict=True)))
        if members:
            compiled = self.param_groups[0]["compile"]
            self._engine = engine = Engine(members, self.rule, plan, compiled=compiled)
            for number, member in enumerate(members):
                common = engine.common_state(number)
                self.state[member.param] = common | engine.state.of_blocks(number)
        self._number_blocks()

    def _has_momentum(self, name: str, param: Tensor, group: Mapping[str, Any]) -> bool:
        return self.preconditions(param)

    def _planned(self, member: Member, group: int) -> Parameter:
        param, options = member.param, member.options
        grid = _grid(member.name, param, options)
        placement_group, sharding = layout_of(param, self._replicas(), member.name)
        if options["block_alignment"] == "shard":
            grid = grid.cut_at(sharding.edges(tuple(param.shape), grid))
        default = torch.float64 if param.dtype == torch.float64 else torch.float32
        dtype = options["factor_dtype"] or default
        return Parameter(
            name=member.name,
            shape=tuple(param.shape),
            grid=grid,
            placement_group=placement_group,
            sharding=sharding,
            group=group,
            dtype=dtype,
            period=options["precondition_frequency"],
            cost=lambda shape: Cost(*self.rule.cost(shape, options)),
            alignment=options["block_alignment"],
            is_staggered=options["refresh"] == "staggered",
            state=lambda shape: state_bytes(self.rule, shape, options, dtype),
            communication_dtype=options["communication_dtype"],
        )

    def _claim(self, param: Described) -> Claim | None:
        """What a parameter of another stage needs of the refresh period."""
        if falls_back(param.name, param.tensor, param.options, param.kind):
            return None
        grid = _grid(param.name, param.tensor, param.options)
        costs = [self.rule.cost(grid.block_shape(p), param.options)[1] for p in grid.positions()]
        period = param.options["precondition_frequency"]
        return Claim(param.name, param.group, period, tuple(costs))


def _grid(name: str, param: Tensor, options: Mapping[str, Any]) -> Grid:
    """Blocks of a parameter, in its own coordinates, whose roots can be found."""
    size = options["block_size"]
    grid = make_grid(
        tuple(param.shape),
        block_size=size if isinstance(size, int) else (size[0], size[1]),
        merge=options["merge"],
        batch_dims=options["batch_dims"],
    )
    check_order(name, grid.order, options)
    return grid
