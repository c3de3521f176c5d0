"""The optimizers of a run: every parameter has the method of the first group that matches its name.

torchtitan's container knows one class for the whole model and saves state through an interface
that casts and drops it. This one holds several optimizers per model part, and hands live tensors
to the checkpoint, keyed by parameter name, which are loaded in place.
"""

import inspect
import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer as TorchtitanContainer
from torchtitan.distributed import ParallelDims
from torchtitan.models.moe.moe import GroupedExperts

import titan_shampoo
from titan_shampoo.blocks.optimizer import BlockOptimizer
from titan_shampoo.config import ConfigError, nearest, tables
from titan_shampoo.config.methods import TABLES
from titan_shampoo.config.patterns import matching_bounded
from titan_shampoo.distributed.geometry import Grid
from titan_shampoo.layers.optimizer import LayerOptimizer
from titan_shampoo.recognition import Kind, kinds_of, reason_not_multiplied
from titan_shampoo.titan.averaging import AveragedWeights
from titan_shampoo.titan.initialization import unwrapped_name
from titan_shampoo.titan.layer_metrics import (
    BlockNumbers,
    LayerNumbers,
    lists_on_host,
    of_all_stages,
    on_host,
)

NamedParameters = list[tuple[str, nn.Parameter]]

Members = list[tuple[str, nn.Parameter, int, Kind | None]]
"""Names, parameters, along how many leading dims each stacks independent matrices, and what the
module of each is."""

Preconditioner = BlockOptimizer | LayerOptimizer

METHODS: Mapping[str, type[Preconditioner]] = {
    name: getattr(titan_shampoo, name) for name in titan_shampoo.__all__
}
"""Optimizers of the library by the names that ``optimizer.name`` has for them."""

_CHOICES = (None, True, False)
"""Of ``precondition``, in the order of parameter groups."""


class OptimizersContainer(TorchtitanContainer[Optimizer]):
    """All optimizers of the model parts of this rank, as one.

    Args:
        model_parts: Parts of the model on this rank, sharded.
        config: The ``[optimizer]`` table.
        parallel_dims: Says which ranks hold plain tensors as replicas.
        whole_model: What :func:`members` says of the whole model, where this rank has one stage of
            a pipeline; refreshes are spread over all of its blocks.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        config: Any,  # noqa: ANN401 - merged dataclass
        parallel_dims: ParallelDims,
        whole_model: Members | None = None,
    ) -> None:
        self.model_parts = model_parts
        self.optimizers = []
        self._step_seconds = 0.0
        self._stages = _stage_group(parallel_dims)
        everyone = list(itertools.chain.from_iterable(map(members, model_parts)))
        _check_patterns(whole_model or everyone, config)
        # A stage of a pipeline does not see whether a layer is shaped like an embedding of another.
        kinds = {unwrapped_name(name): kind for name, _, _, kind in whole_model or everyone}
        by_part = [_grouped(members(part), config, kinds) for part in model_parts]
        if not all(by_part):
            raise ConfigError("the model has no parameter that is trained; see optimizer.groups")
        if self._stages is not None:
            _check_stages(by_part, self._stages)
        whole = _grouped(everyone, config, kinds)
        everywhere = {} if whole_model is None else _grouped(whole_model, config, kinds)
        common = {
            "process_group": replica_group(parallel_dims),
            "pipeline_group": self._stages,
        }
        of_parts = [
            pair for part in by_part for pair in part.items() if not _is_of(pair[0], LayerOptimizer)
        ]
        # One optimizer of layers for all parts: its scale is one for the whole model.
        of_layers = [pair for pair in whole.items() if _is_of(pair[0], LayerOptimizer)]
        for method, groups in of_parts + of_layers:
            distribution: dict[str, Any] = common | {"model": model_parts}
            if _takes(method, "all_params"):
                distribution["all_params"] = everywhere.get(method)
            self.optimizers.append(_build(method, groups, config, distribution))
        params = [
            p for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]
        ]
        self._device = params[0].device
        decay = config.average_decay
        self.average = None if decay is None else AveragedWeights(model_parts, decay)
        self._post_init(params, {"lr": config.lr})

    def step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as every optimizer's
        """Step all of them, and count the seconds."""
        start = time.perf_counter()
        super().step(*args, **kwargs)
        self._step_seconds += time.perf_counter() - start

    def take_step_seconds(self) -> float:
        """Seconds spent in :meth:`step` since the last call."""
        seconds, self._step_seconds = self._step_seconds, 0.0
        return seconds

    def failures(self) -> dict[str, int]:
        """What went wrong since the start, over all ranks; every rank must ask.

        ``skipped_steps`` had a gradient that was not finite, ``failed_refreshes`` left a block its
        last good roots.
        """
        methods = [o for o in self.optimizers if isinstance(o, Preconditioner)]
        failed = torch.tensor(sum(method.failed_refreshes for method in methods))
        if dist.is_initialized():
            failed = failed.to(self._device)
            dist.all_reduce(failed)
        skipped = max((method.skipped_steps for method in methods), default=0)
        return {"skipped_steps": skipped, "failed_refreshes": int(failed)}

    def layer_metrics(self) -> LayerNumbers:
        """``rho`` and ``cosine`` of each layer in the last step; every rank must ask."""
        methods = [o for o in self.optimizers if isinstance(o, LayerOptimizer)]
        here = {name: n for method in methods for name, n in method.layer_metrics().items()}
        # All ranks have the same methods, if not the same layers.
        return of_all_stages(on_host(here), self._stages) if methods else {}

    def conditions(self) -> BlockNumbers:
        """Condition numbers of all blocks at their last refresh; every rank must ask."""
        methods = [o for o in self.optimizers if isinstance(o, BlockOptimizer)]
        here = {name: found for method in methods for name, found in method.conditions().items()}
        return of_all_stages(lists_on_host(here), self._stages) if methods else {}

    def state_dict(self) -> dict[str, Any]:
        """Live state as ``"<parameter>.<name>"``; what is loaded into these tensors is loaded."""
        state = {
            f"{name}.{key}": value
            for optimizer in self.optimizers
            for name, state in _state_by_name(optimizer)
            for key, value in state.items()
        }
        return state | (self.average.state_dict() if self.average else {})

    def geometry(self) -> dict[str, dict[str, Any]]:
        """What the state of each parameter on this rank means: method, shape and block grid."""
        return {
            name: description
            for optimizer in self.optimizers
            for name, description in _descriptions(optimizer)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept a state that was loaded in place into the tensors of :meth:`state_dict`.

        Raises:
            ValueError: If it is another state.
        """
        mine = self.state_dict().keys()
        if mine != state_dict.keys():
            differing = sorted(mine ^ state_dict.keys())
            raise ValueError(
                f"optimizer state: {len(differing)} entries differ: {', '.join(differing[:5])}"
            )


def build_optimizers(
    model_parts: list[nn.Module],
    config: Any,  # noqa: ANN401 - merged dataclass
    parallel_dims: ParallelDims,
    whole_model: Members | None = None,
) -> OptimizersContainer:
    """Return the optimizers that the ``[optimizer]`` table asks for."""
    return OptimizersContainer(model_parts, config, parallel_dims, whole_model)


def replica_group(parallel_dims: ParallelDims) -> dist.ProcessGroup | None:
    """Ranks that hold a plain tensor as replicas: DDP's, or each rank alone (pipelines)."""
    if parallel_dims.world_size == 1:
        return None
    if parallel_dims.dp_replicate_enabled:
        return parallel_dims.get_mesh("dp_replicate").get_group()
    # Made by this rank alone: new_subgroups would make one for each rank of the world, everywhere.
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _stage_group(parallel_dims: ParallelDims) -> dist.ProcessGroup | None:
    """Ranks that hold the other stages of the pipeline, if there is one."""
    return parallel_dims.get_mesh("pp").get_group() if parallel_dims.pp_enabled else None


def _check_stages(by_part: Sequence[Mapping[str, object]], stages: dist.ProcessGroup) -> None:
    """Refuse a method that not every stage has: its optimizers decide on all stages together.

    Args:
        by_part: What each method has, in each part of the model on this rank.
        stages: Ranks that hold the other stages.

    Raises:
        ConfigError: The same on all of them.
    """
    if dist.get_backend(stages) == "fake":  # planned only: there is nobody to ask
        return
    mine = [method for part in by_part for method in part if _is_of(method, BlockOptimizer)]
    mine += sorted({m for part in by_part for m in part if _is_of(m, LayerOptimizer)})
    found: list[Any] = [None] * stages.size()
    dist.all_gather_object(found, mine, group=stages)
    if any(other != found[0] for other in found):
        told = "; ".join(
            f"{', '.join(other) or 'none'} in {n + 1}" for n, other in enumerate(found)
        )
        raise ConfigError(
            "optimizer.groups: got stages of the pipeline with different methods "
            f"({told}), wanted the same in all; set a pattern that matches in every stage"
        )


def _check_patterns(
    whole_model: Members,
    config: Any,  # noqa: ANN401 - merged dataclass
) -> None:
    """Refuse a group that no parameter of the whole model belongs to: nothing would read it.

    Raises:
        ConfigError: The same on all ranks, also for a pattern that takes too long.
    """
    names = [unwrapped_name(name) for name, param, *_ in whole_model if param.requires_grad]
    left = names
    for index, group in enumerate(config.groups):
        what = f'optimizer.groups[{index}].pattern = "{group.pattern}"'
        with matching_bounded(what):
            mine = {name for name in left if re.search(group.pattern, name)}
            elsewhere = mine or any(re.search(group.pattern, name) for name in names)
        if not mine:
            problem = "all parameters that it matches belong to groups above it; move it up"
            if not elsewhere:
                parts = {part for name in names for part in name.split(".")}
                hint = nearest(group.pattern, parts) or f"; one is {names[len(names) // 2]}"
                problem = f"matches the name of no trained parameter{hint}"
            raise ConfigError(f"{what}: {problem}")
        left = [name for name in left if name not in mine]


def members(model: nn.Module) -> Members:
    """The parameters of ``model``; experts are stacked along their first dim."""
    experts = {
        param
        for module in model.modules()
        if isinstance(module, GroupedExperts)
        for param in module.parameters(recurse=False)
    }
    kinds = kinds_of([model])
    return [
        (name, param, int(param in experts), kinds.get(param))
        for name, param in model.named_parameters()
    ]


def _grouped(
    params: Members,
    config: Any,  # noqa: ANN401 - merged dataclass
    kinds: Mapping[str, Kind | None],
) -> dict[str, list[dict[str, Any]]]:
    """Parameter groups by method: one per ``[[optimizer.groups]]``, and one for the rest.

    Stacks of experts are a group of their own, where a method works on matrices one by one; so are
    parameters of which modules say other than names.

    Args:
        params: What :func:`members` says of them.
        config: The ``[optimizer]`` table.
        kinds: What modules of the whole model say, by name.
    """
    claims = [*config.groups, tables.Group(pattern="")]
    claimed: dict[tuple[int, int, int], NamedParameters] = {}
    for wrapped_name, param, batch_dims, _ in params:
        name = unwrapped_name(wrapped_name)
        if param.requires_grad:
            index = next(i for i, claim in enumerate(claims) if re.search(claim.pattern, name))
            method = claims[index].optimizer or config.name
            stacked = batch_dims if _takes(method, "batch_dims") else 0
            wanted = claims[index].precondition
            if wanted is None and method in METHODS:
                wanted = _other_than_by_name(name, param, kinds[name])
            key = (index, stacked, _CHOICES.index(wanted))
            claimed.setdefault(key, []).append((name, param))
    by_method: dict[str, list[dict[str, Any]]] = {}
    for (index, batch_dims, wanted), named in sorted(claimed.items(), key=itemgetter(0)):
        claim = claims[index]
        own = {
            "lr": claim.lr,
            "weight_decay": claim.weight_decay,
            "batch_dims": batch_dims or None,
            "precondition": _CHOICES[wanted],
        }
        group = {"params": named} | {
            key: value for key, value in own.items() if value is not None
        }  # fmt: skip
        by_method.setdefault(claim.optimizer or config.name, []).append(group)
    return by_method


def _other_than_by_name(name: str, param: Tensor, kind: Kind | None) -> bool | None:
    """Whether a parameter is preconditioned, if its module and its name say different things."""
    by_module, by_name = (reason_not_multiplied(name, param, {}, k) is None for k in (kind, None))
    return None if by_module == by_name else by_module


def _takes(method: str, argument: str) -> bool:
    """True if a method of the library has an argument of this name."""
    return method in METHODS and argument in inspect.signature(METHODS[method]).parameters


def _is_of(method: str, kind: type[Preconditioner]) -> bool:
    """True if a method is one of the library of this kind."""
    return method in METHODS and issubclass(METHODS[method], kind)


def _build(
    method: str,
    groups: list[dict[str, Any]],
    config: Any,  # noqa: ANN401 - merged dataclass
    distribution: Mapping[str, Any],
) -> Optimizer:
    """One optimizer, with its state allocated."""
    if method in METHODS:
        return _build_from_library(method, groups, config, distribution)
    # DTensor has no fused SGD: the first step would raise.
    sharded = any(isinstance(p, DTensor) for group in groups for _, p in group["params"])
    chosen = config.implementation
    if method == "SGD" and sharded and chosen == "fused":
        chosen = "foreach"
    implementation = {"fused": chosen == "fused", "foreach": chosen == "foreach"}
    if method == "AdamW":
        betas = (config.beta1, config.beta2)
        optimizer: Optimizer = torch.optim.AdamW(
            groups, config.lr, betas, config.eps, config.weight_decay, **implementation
        )
    else:
        own = config.sgd
        optimizer = torch.optim.SGD(
            groups,
            config.lr,
            own.momentum,
            own.dampening,
            config.weight_decay,
            own.nesterov,
            **implementation,
        )
    _allocate_state(optimizer)
    return optimizer


def _build_from_library(
    method: str,
    groups: list[dict[str, Any]],
    config: Any,  # noqa: ANN401 - merged dataclass
    distribution: Mapping[str, Any],
) -> Preconditioner:
    """One of the library's optimizers; its own table beats the shared keys."""
    build, table = METHODS[method], TABLES[method]
    shared_eps = "grafting_eps" if _takes(method, "grafting_eps") else "eps"
    options = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
        shared_eps: config.eps,
        **_library_options(getattr(config, table)),
    }
    try:
        return build(groups, **options, **distribution)
    except ValueError as error:  # does not fit the parameters, which the configuration cannot know
        raise ConfigError(f"optimizer.{table}: {error}") from error


def _library_options(table: tables.Blocks | tables.Layers) -> dict[str, Any]:
    """The keys of a method's own table that are set, as the library takes them."""
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(table).items()
        if value is not None
    }
    for key in ("grafting", "scaling"):
        if options.get(key) == "none":
            options[key] = None
    dtypes = {key: getattr(torch, v) for key, v in options.items() if key.endswith("_dtype")}
    return options | dtypes


def _allocate_state(optimizer: Optimizer) -> None:
    """Give torch's optimizers the state of step zero: what is not there is silently not loaded."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if isinstance(optimizer, torch.optim.AdamW):
                # As torch does: the fused kernel reads the step on the device, the others on the
                # host.
                device = param.device if group["fused"] else "cpu"
                optimizer.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
            elif group["momentum"]:
                # Unlike a buffer that torch makes in the first step, it is dampened in that step.
                optimizer.state[param] = {"momentum_buffer": torch.zeros_like(param)}


def _descriptions(optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    """Method, shape and grid of each parameter, as plain JSON values."""
    grids = optimizer.grids() if isinstance(optimizer, BlockOptimizer) else {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            described: dict[str, Any] = {"shape": list(param.shape)}
            if not isinstance(optimizer, BlockOptimizer):
                described["method"] = type(optimizer).__name__
            elif name in grids:
                described["method"] = group["method"]
                described |= _grid_description(optimizer, grids[name], group)
            else:
                described["method"] = "AdamW"
            yield name, described


def _grid_description(
    optimizer: BlockOptimizer, grid: Grid, group: Mapping[str, Any]
) -> dict[str, Any]:
    """The grid of a parameter, the options that make it, and what else gives state its meaning."""
    options = {key: group[key] for key in optimizer.shape_options if key in group}
    described: dict[str, Any] = {
        "grid": {
            "merged_shape": list(grid.merged_shape),
            "edges": [list(edges) for edges in grid.edges],
            "batch_dims": grid.batch_dims,
        },
        "options": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in options.items()
        },
    }
    if "exponent" in group:
        exponent = group["exponent"]
        described["meaning"] = {
            "exponent": list(exponent) if isinstance(exponent, tuple) else exponent
        }
    return described


def _state_by_name(optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """State of each parameter, by name."""
    if isinstance(optimizer, Preconditioner):
        yield from optimizer.sharded_state().items()
        return
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            yield name, optimizer.state[param]
