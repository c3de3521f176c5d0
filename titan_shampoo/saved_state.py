"""Saved state: its forms, what it must have in common with an optimizer, and how it is loaded.

A state is checked as a whole, and by all ranks together, before anything of the optimizer changes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from titan_shampoo.distributed.gathered import (
    await_ranks,
    block_steps,
    gathered,
    is_of_one_step,
    load_,
)
from titan_shampoo.distributed.state import BlockTensor
from titan_shampoo.options import check_alike

BLOCK_STEPS = "block_steps"
"""Key of the step of each block, in a state that is gathered."""

_FIXED_KEYS = ("params", "param_names", "method", "compile")
"""Keys of a parameter group that a loaded state does not change."""

_SCHEDULED = ("lr", "weight_decay")
"""Options that nothing is built from, and that schedules change."""

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)

Groups = Sequence[Mapping[str, Any]]
State = dict[str, Any]
GlobalState = dict[Tensor, dict[str, Tensor]]


class SavedStateOptimizer(torch.optim.Optimizer):
    """An optimizer whose blocks of state lie with different ranks, saved and loaded as torch's."""

    shape_options: ClassVar[tuple[str, ...]]
    """Options that give state its shape: a state with others cannot be loaded."""

    step_options: ClassVar[tuple[str, ...]]
    """Options that all groups share, as they are of the step and of no parameter."""

    _judges: list[dist.ProcessGroup]

    def _named(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Parameters of a group with their names."""
        raise NotImplementedError

    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError if a parameter group has an impossible option."""
        raise NotImplementedError

    def _build(self) -> None:
        """Allocate all state anew; what is replaced is not changed."""
        raise NotImplementedError

    def _replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold plain tensors."""
        raise NotImplementedError

    def _global_state(self) -> GlobalState:
        """State of each parameter as live global tensors, under names without ranks."""
        raise NotImplementedError

    def _owned_blocks(self) -> dict[Tensor, tuple[Sequence[int], int]]:
        """Numbers of this rank's blocks of each parameter, and how many blocks that has."""
        raise NotImplementedError

    # Saving

    def sharded_state(self) -> dict[str, dict[str, Tensor]]:
        """All state by parameter name, as live tensors to save and to load in place.

        For distributed checkpoints: every tensor is global, and its key and shape depend neither
        on the rank nor on the mesh. Nothing is copied or sent.
        """
        names = self._names()
        return {names[param]: state for param, state in self._global_state().items()}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """A copy of all state, in torch's form; every rank must call it.

        Keys and shapes depend neither on the rank nor on the mesh. State of blocks is spread over
        the ranks that hold the parameter as DTensors, which ``torch.distributed.checkpoint`` saves
        and ``get_optimizer_state_dict(..., full_state_dict=True)`` gathers; it is whole on every
        rank where parameters are plain tensors. Later steps do not change it, nor does what is
        loaded into it change the optimizer: pass it to :meth:`load_state_dict`.

        Raises:
            RuntimeError: If other ranks have not called it within ten minutes.
        """
        await_ranks(self._judges, "state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        packed = self._packed(self._gathered_state())
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    def local_state_dict(self) -> dict[str, Any]:
        """The live state of this rank, each block under a key of its own; nothing is sent.

        Together those of all ranks are the whole state. Loads on the layout that it was saved on.
        """
        return self._packed(self.state)

    def _gathered_state(self) -> dict[Any, Any]:
        blocks = self._owned_blocks()
        copies: dict[Any, Any] = {key: value for key, value in self.state.items()
                                  if not isinstance(key, Tensor)}  # fmt: skip
        for param, state in self._global_state().items():
            if param in blocks:
                owned, count = blocks[param]
                stamp = block_steps(owned, count, int(state["cursor"]), param.device)
                state = {**state, BLOCK_STEPS: stamp}
            copies[param] = {
                key: gathered(value, param, self._replicas())
                if isinstance(value, BlockTensor)
                else value.detach().clone()
                for key, value in state.items()
            }
        return copies

    def _packed(self, state: Mapping[Any, Any]) -> dict[str, Any]:
        """A state by parameter as torch saves it, by number."""
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = {param: number for number, param in enumerate(params)}
        by_number = {
            numbers[key] if isinstance(key, Tensor) else key: value for key, value in state.items()
        }
        groups = [
            {**group, "params": [numbers[param] for param in group["params"]]}
            for group in self.param_groups
        ]
        return {"state": by_number, "param_groups": groups}

    def _names(self) -> dict[Tensor, str]:
        """The name of each parameter, without those of wrappers."""
        pairs = [pair for group in self.param_groups for pair in self._named(group)]
        names = bare_names([name for name, _ in pairs])
        return {param: name for (_, param), name in zip(pairs, names, strict=True)}

    # Loading

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` or :meth:`local_state_dict` returned, on every rank.

        State of :meth:`state_dict` fits any layout and any number of ranks, and may be whole on
        every rank. Options of parameter groups are taken over, as torch's optimizers do; dtypes of
        state follow these options, and no value passes through another dtype.

        Raises:
            ValueError: On all ranks, if the state is of another method, of other parameters or of
                other shapes, or if it was put together from several steps or ranks. Nothing is
                changed then.
        """
        await_ranks(self._judges, "load_state_dict()")
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        attributes, options = dict(self.__dict__), [dict(group) for group in self.param_groups]
        try:
            self._load(state_dict)
        except Exception:
            for group, before in zip(self.param_groups, options, strict=True):
                group.clear()
                group.update(before)
            self.__dict__.update(attributes)  # a rebuilt state is let go of
            raise
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, saved: Mapping[str, Any]) -> None:
        refusal, loaded = None, []
        try:
            check_form(saved)
            loaded = self._loaded_options(saved["param_groups"])
        except ValueError as error:
            refusal = str(error)
        changed = any(
            not _equal(new.get(key), group.get(key))
            for group, new in zip(self.param_groups, loaded, strict=False)
            for key in self.defaults
            if key not in _SCHEDULED
        )
        (is_rebuilt,) = self._agreed(refusal, changed)
        for group, new in zip(self.param_groups, loaded, strict=True):
            group.update(new)
        if is_rebuilt:
            self._build()
        self._copy_in(saved)
        params = {key for group in saved["param_groups"] for key in group["params"]}
        self.state.update({k: v for k, v in saved["state"].items() if k not in params})

    def _loaded_options(self, saved: Groups) -> list[dict[str, Any]]:
        """Options of each group as they will be, all of them checked."""
        names = [name for group in self.param_groups for name, _ in self._named(group)]
        check_groups(self.param_groups, saved, names, self.shape_options)
        loaded = [
            dict(group) | {k: v for k, v in other.items() if k not in _FIXED_KEYS}
            for group, other in zip(self.param_groups, saved, strict=True)
        ]
        for number, group in enumerate(loaded):
            self._check_options(group)
            check_alike(loaded[: number + 1], self.step_options)
        return loaded

    def _copy_in(self, saved: Mapping[str, Any]) -> None:
        """Check saved state against that of the optimizer as it is now, and copy it there."""
        blocks = self._owned_blocks()
        others = [(param, other) for _, param, other in self._saved_of_params(saved)]
        stamped = [BLOCK_STEPS in other for param, other in others if param in blocks]
        is_local = not all(stamped)
        state = self.state if is_local else self._global_state()
        refusal, pairs = None, []
        try:
            for name, param, other in self._saved_of_params(saved):
                check_state(name, state.get(param, {}), other, is_local=is_local)
                pairs.append((name, state.get(param, {}), other))
        except ValueError as error:
            refusal = str(error)
        some_local, some_stamped = self._agreed(refusal, is_local, any(stamped))
        if some_local and some_stamped:
            raise ValueError("the state is of local_state_dict() in part, and of state_dict() in "
                             "part; load one form on all ranks")  # fmt: skip
        self._check_steps(pairs)
        for _, mine, other in pairs:
            for key, value in mine.items():
                load_(value, other[key])

    def _check_steps(
        self, pairs: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]
    ) -> None:
        """Refuse blocks of different steps, or of other ranks."""
        refusal = None
        for name, _, other in pairs:  # to the end, as every rank of a parameter takes part
            if BLOCK_STEPS in other and not is_of_one_step(
                other[BLOCK_STEPS], int(other["cursor"])
            ):
                refusal = (f"{name}: blocks of the state are of different steps, or one rank's are "
                           "in the place of another's; save what state_dict() returns on every "
                           "rank, or one file of full_state_dict=True")  # fmt: skip
        self._agreed(refusal)

    def _saved_of_params(self, saved: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, State]]:
        """Name, parameter and saved state; but for frozen ones, which torch leaves out."""
        for group, old in zip(self.param_groups, saved["param_groups"], strict=True):
            for (name, param), key in zip(self._named(group), old["params"], strict=True):
                other = saved["state"].get(key, {})
                if other or param.requires_grad:
                    yield name, param, as_tensors(other)

    def _agreed(self, refusal: str | None, *flags: bool) -> list[bool]:
        """The flags that are set on any rank.

        Raises:
            ValueError: On all ranks, with the sentence of the first rank that refuses.
        """
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        found = torch.tensor([refusal is not None, *flags], device=device, dtype=torch.float32)
        for group in self._judges:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        is_refused, *are_set = map(bool, found.tolist())
        if is_refused:
            sentences = [refusal]
            for group in self._judges:
                parts: list[Any] = [None] * group.size()
                dist.all_gather_object(parts, sentences, group=group)
                sentences = [one for part in parts for one in part]
            raise ValueError(next(one for one in sentences if one is not None))
        return are_set


def bare_names(names: Sequence[str]) -> list[str]:
    """Names without those of the modules that DDP, compile and checkpointing wrap around others.

    >>> bare_names(["module._orig_mod.0.weight", "module._orig_mod.0.bias"])
    ['0.weight', '0.bias']
    """
    bare = [_WRAPPERS.sub("", name) for name in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    return bare


def check_form(saved: Mapping[str, Any]) -> None:
    """Refuse what is not a state of an optimizer, or is one in the flattened form."""
    missing = [key for key in ("state", "param_groups") if key not in saved]
    if missing:
        raise ValueError(f"the state has no {missing[0]!r}: it is none of an optimizer, or in the "
                         "flattened form, which torch cannot broadcast from rank 0; set "
                         "flatten_optimizer_state_dict=False")  # fmt: skip


def check_groups(
    groups: Groups, saved: Groups, names: Sequence[str], shape_options: Sequence[str]
) -> None:
    """Raise ValueError if saved parameter groups do not fit.

    Args:
        groups: Those of the optimizer.
        saved: Those of the state.
        names: All parameters of the optimizer.
        shape_options: Options that give state its shape.
    """
    counts, others = [[len(group["params"]) for group in some] for some in (groups, saved)]
    if counts != others:
        raise ValueError(f"param_groups: the state has {others} parameters, wanted {counts}")
    if all("param_names" in group for group in [*groups, *saved]):
        _check_names(names, [name for group in saved for name in group["param_names"]])
    for group, other in zip(groups, saved, strict=True):
        method, wanted = other.get("method"), group["method"]
        if method != wanted:
            raise ValueError(f"the state is of method {method!r}, wanted {wanted!r}")
        for key in shape_options:
            if key not in other:
                raise ValueError(f"{key}: missing in a parameter group of the state, wanted "
                                 f"{group[key]!r}")  # fmt: skip
            if not _equal(other[key], group[key]):
                raise ValueError(f"{key}: the state has {other[key]!r}, got {group[key]!r}; "
                                 f"set {key} = {other[key]!r}")  # fmt: skip


def _check_names(names: Sequence[str], saved: Sequence[str]) -> None:
    for name, mine, theirs in zip(names, bare_names(names), bare_names(saved), strict=True):
        if mine != theirs:
            raise ValueError(f"{name}: the state has {theirs!r} in its place; load the state of "
                             "this model and, in a pipeline, of this stage")  # fmt: skip


def check_state(
    name: str, mine: Mapping[str, Any], other: Mapping[str, Any], *, is_local: bool
) -> None:
    """Raise ValueError if saved state does not fit a parameter.

    Args:
        name: Of the parameter.
        mine: Its live state.
        other: Its saved state.
        is_local: Whether both are in the form of ``local_state_dict()``.
    """
    differing = sorted(mine.keys() ^ (other.keys() - {BLOCK_STEPS}))
    if differing:
        advice = (": it is one rank's part of another layout; save state_dict() or sharded_state(),"
                  " which fit any") if is_local and mine and other else ""  # fmt: skip
        raise ValueError(f"{name}: the state has {len(other)} entries, wanted {len(mine)}; "
                         f"differing: {', '.join(differing[:5])}{advice}")  # fmt: skip
    for key, value in mine.items():
        if value.shape != other[key].shape:
            raise ValueError(f"{name}: {key} of the state has shape {tuple(other[key].shape)}, "
                             f"wanted {tuple(value.shape)}")  # fmt: skip


def as_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's saved state, in which numbers, as some tools save counters, are tensors."""
    return {
        key: torch.as_tensor(value) if isinstance(value, int | float) else value
        for key, value in state.items()
    }


def copy_state(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Copy state into live memory of the same layout."""
    with torch.no_grad():
        for key, value in other.items():
            mine[key].copy_(value)


def has_begun(state: Mapping[str, Tensor]) -> bool:
    """Whether a parameter has state that is not what it is made with, for all that is known."""
    return bool(state.get("cursor", len(state)))


def _equal(one: object, other: object) -> bool:
    """Whether two options are the same; a tuple that was saved as a list is."""
    return _plain(one) == _plain(other)


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value
