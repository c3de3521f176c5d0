"""Saved state: its forms, its checks against an optimizer, and its load.

All ranks check the whole state together before anything of the optimizer changes.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_shampoo.distributed.gathered import await_ranks, gathered, load_, whole_tensor
from titan_shampoo.distributed.plan import Holding
from titan_shampoo.options import check_alike
from titan_shampoo.recognition import without_wrappers

BLOCKS = "blocks"
"""Key of the numbers of a rank's blocks; in saved state, each with the step of its block.

A load thus detects blocks of different steps, and blocks of another rank.
"""

_FIXED_KEYS = ("params", "param_names", "method", "compile", "precondition")
"""Keys of a parameter group that a load does not change."""

_SCHEDULED = ("lr", "weight_decay")
"""Options that schedules change, and that nothing is built from."""


Groups = Sequence[Mapping[str, Any]]
GlobalState = dict[Tensor, dict[str, Tensor]]


class SavedStateOptimizer(torch.optim.Optimizer):
    """An optimizer with blocks of state on different ranks, saved and loaded in torch's form."""

    shape_options: ClassVar[tuple[str, ...]]
    """Options that decide the shape of state: a load requires equal values."""

    step_options: ClassVar[tuple[str, ...]]
    """Options of the step, which all parameter groups share."""

    _deciding_groups: list[dist.ProcessGroup]

    def _named(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Parameters of a group with their names."""
        raise NotImplementedError

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a parameter group has an impossible option."""
        raise NotImplementedError

    def _build(self) -> None:
        """Allocate all state, without changes to the old state."""
        raise NotImplementedError

    def _replicas(self) -> dist.ProcessGroup | None:
        """Ranks that hold plain tensors as replicas."""
        raise NotImplementedError

    def _global_state(self) -> GlobalState:
        """State of each parameter as live global tensors, under names without ranks."""
        raise NotImplementedError

    def _holdings(self) -> dict[Tensor, list[Holding]]:
        """Blocks of each parameter that has any, by shape."""
        raise NotImplementedError

    def _follow_others(self) -> None:
        """Rebuild if other code has replaced parameter groups."""
        raise NotImplementedError

    def _follow_loaded(self) -> None:
        """Adopt the loaded options as those that the optimizer was made with."""
        raise NotImplementedError

    def _is_stage(self) -> bool:
        """True if the parameters are those of one stage of a pipeline."""
        raise NotImplementedError

    # Saving

    def sharded_state(self) -> dict[str, dict[str, Tensor]]:
        """All state by parameter name, as live tensors that are saved and loaded in place.

        For distributed checkpoints: every tensor is global, and its key and shape depend neither
        on the rank nor on the mesh. Nothing is copied or sent.
        """
        self._follow_others()
        names = self._names()
        return {names[param]: state for param, state in self._global_state().items()}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """A copy of all state, in torch's form; every rank must call it.

        Keys and shapes depend neither on the rank nor on the mesh. State of blocks is spread over
        the ranks that hold the parameter as DTensors, which ``torch.distributed.checkpoint`` saves
        and ``get_optimizer_state_dict(..., full_state_dict=True)`` gathers. For plain tensors,
        every rank gets the whole. Later steps do not change the copy, and changes to the copy do
        not change the optimizer: pass it to :meth:`load_state_dict`.

        Raises:
            RuntimeError: If other ranks have not called it within ten minutes.
            ValueError: If torch asks for a form that it would gather incorrectly: one file of all
                stages of a pipeline, or the flattened form to be broadcast from rank 0.
        """
        self._follow_others()
        check_request(requested_by_torch(), is_stage=self._is_stage())
        await_ranks(self._deciding_groups, "state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        packed = self._packed(self._gathered_state())
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    def local_state_dict(self) -> dict[str, Any]:
        """The live state of this rank with its own blocks only; nothing is sent.

        Each rank can load its own state again on the same layout.
        """
        self._follow_others()
        state = {
            key: {name: _picklable(value) for name, value in values.items()}
            if isinstance(key, Tensor)
            else values
            for key, values in self.state.items()
        }
        for param in self._holdings():
            state[param][BLOCKS] = self._block_table(param)
        return self._packed(state)

    def _number_blocks(self) -> None:
        """Add the numbers of its blocks to the state of each parameter."""
        for param, holdings in self._holdings().items():
            indices = [index for holding in holdings for index in holding.indices]
            self.state[param][BLOCKS] = torch.tensor(indices, dtype=torch.int64,
                                                     device=param.device)  # fmt: skip

    def _block_table(self, param: Tensor) -> Tensor:
        """Number and step of each block that this rank owns, ``(blocks, 2)``."""
        numbers = self.state[param][BLOCKS]
        steps = torch.full_like(numbers, int(self.state[param]["cursor"]))
        return torch.stack([numbers, steps], dim=1)

    def _gathered_state(self) -> dict[Any, Any]:
        """A copy of all state, with the state of blocks spread over ranks, or whole."""
        copies: dict[Any, Any] = {key: value for key, value in self.state.items()
                                  if not isinstance(key, Tensor)}  # fmt: skip
        holdings = self._holdings()
        for param in (param for group in self.param_groups for param in group["params"]):
            state, shares = dict(self.state.get(param, {})), {}
            if param in holdings:
                shares = _shares(holdings[param])
                state[BLOCKS] = self._block_table(param)
            copies[param] = {
                key: gathered(value, *share, param, self._replicas())
                if (share := shares.get(key.rpartition(".")[2])) is not None
                else value.detach().clone()
                for key, value in state.items()
            }
        return copies

    def _packed(self, state: Mapping[Any, Any]) -> dict[str, Any]:
        """State by number of the parameter, as torch saves it."""
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
        """Name of each parameter, without the names of wrappers."""
        pairs = [pair for group in self.param_groups for pair in self._named(group)]
        names = bare_names([name for name, _ in pairs])
        return {param: name for (_, param), name in zip(pairs, names, strict=True)}

    # Loading

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict` or :meth:`local_state_dict`, on every rank.

        The result of :meth:`state_dict` fits any layout and any number of ranks, and may be whole
        on every rank. Options of parameter groups are loaded too, as in torch's optimizers. Dtypes
        of state follow these options, and no value passes through another dtype.

        Raises:
            ValueError: On all ranks, if the state is of another method, of other parameters or of
                other shapes, or if it mixes several steps or ranks. Nothing changes then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._follow_others()
        await_ranks(self._deciding_groups, "load_state_dict()")
        attributes, options = dict(self.__dict__), [dict(group) for group in self.param_groups]
        try:
            self._load(state_dict)
        except Exception:
            for group, before in zip(self.param_groups, options, strict=True):
                group.clear()
                group.update(before)
            self.__dict__.update(attributes)  # back to the old state; a rebuilt one is freed
            raise
        self._follow_loaded()
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
        """Options of each group after the load, all of them checked."""
        names = [name for group in self.param_groups for name, _ in self._named(group)]
        check_groups(self.param_groups, saved, names, self.shape_options)
        loaded = [
            dict(group) | {k: copy.deepcopy(v) for k, v in other.items() if k not in _FIXED_KEYS}
            for group, other in zip(self.param_groups, saved, strict=True)
        ]
        for number, group in enumerate(loaded):
            self._check_options(group)
            check_alike(loaded[: number + 1], self.step_options)
        return loaded

    def _copy_in(self, saved: Mapping[str, Any]) -> None:
        """Check saved state against the present state of the optimizer, and copy it there."""
        refusal, entries = None, []
        try:
            entries = list(self._entries(saved))
        except ValueError as error:
            refusal = str(error)
        tables = [entry.saved[BLOCKS] for entry in entries if BLOCKS in entry.saved]
        spread = any(isinstance(table, DTensor) for table in tables)
        local = any(entry.is_local for entry in entries)
        are_spread, are_local = self._agreed(refusal, spread, local)
        if are_spread and are_local:
            raise ValueError("got a state of local_state_dict() on some ranks, and of "
                             "state_dict() on others; load the same form on all")  # fmt: skip
        for entry in entries:  # all of them, as every rank of a parameter takes part
            if BLOCKS in entry.saved and not entry.is_of_one_step():
                refusal = (f"{entry.name}: blocks of the state are of different steps, or belong "
                           "to another rank; save the result of state_dict() on every rank, or "
                           "one file with full_state_dict=True")  # fmt: skip
        self._agreed(refusal)
        for entry in entries:
            entry.load()

    def _entries(self, saved: Mapping[str, Any]) -> Iterator["Entry"]:
        """Live and saved state of each parameter, without frozen parameters that have none.

        Raises:
            ValueError: If they do not fit.
        """
        holdings = self._holdings()
        for group, old in zip(self.param_groups, saved["param_groups"], strict=True):
            for (name, param), key in zip(self._named(group), old["params"], strict=True):
                other = saved["state"].get(key, {})
                if other or param.requires_grad:  # torch leaves out frozen parameters
                    entry = Entry(name, self.state.get(param, {}), as_tensors(other),
                                  _shares(holdings.get(param, ())))  # fmt: skip
                    entry.check()
                    yield entry

    def _agreed(self, refusal: str | None, *flags: bool) -> list[bool]:
        """The flags that are set on any rank.

        Raises:
            ValueError: On all ranks, with the refusal of the first rank that has one.
        """
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        found = torch.tensor([refusal is not None, *flags], device=device, dtype=torch.float32)
        for group in self._deciding_groups:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        is_refused, *are_set = map(bool, found.tolist())
        if is_refused:
            sentences = [refusal]
            for group in self._deciding_groups:
                parts: list[Any] = [None] * group.size()
                dist.all_gather_object(parts, sentences, group=group)
                sentences = [one for part in parts for one in part]
            raise ValueError(next(one for one in sentences if one is not None))
        return are_set


def bare_names(names: Sequence[str]) -> list[str]:
    """Names without the parts that DDP, compile and checkpointing add for their wrappers.

    >>> bare_names(["module._orig_mod.0.weight", "module._orig_mod.0.bias"])
    ['0.weight', '0.bias']
    """
    bare = [without_wrappers(name) for name in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    return bare


def _picklable(value: Tensor) -> Tensor:
    """The tensor, or a copy if torch cannot pickle it: a DTensor that starts inside a storage."""
    is_inside = isinstance(value, DTensor) and value.to_local().storage_offset() > 0
    return value.detach().clone() if is_inside else value


class Request(NamedTuple):
    """The form of state that ``torch.distributed.checkpoint.state_dict`` asks for."""

    gathers: bool = False
    """True for one file on rank 0, or one that rank 0 sends to all."""
    flattens: bool = False
    """True for a flat mapping, loaded from one file."""


def requested_by_torch() -> Request:
    """The request of the caller; all False for callers other than torch's functions.

    torch passes its options to no optimizer, so they are read off its stack frames. Otherwise
    state that it cannot gather would be lost silently.
    """
    frame, infos = inspect.currentframe(), {}
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            infos[frame.f_code.co_name] = frame.f_locals.get("info")
        frame = frame.f_back
    info = next(iter(infos.values()), None)
    is_one_file = "_load_optim_state_dict" in infos  # this function loads no other form
    return Request(
        gathers=getattr(info, "full_state_dict", False)
        or getattr(info, "broadcast_from_rank0", False),
        flattens=is_one_file and getattr(info, "flatten_optimizer_state_dict", False),
    )


def check_request(request: Request, *, is_stage: bool) -> None:
    """Refuse forms of state that torch would lose.

    Args:
        request: Result of :func:`requested_by_torch`.
        is_stage: True if other ranks have other parameters, as stages of a pipeline.
    """
    if is_stage and request.gathers:
        raise ValueError("full_state_dict: got True in a pipeline, where rank 0 would save the "
                         "state of its own stage only; save the sharded form with "
                         "torch.distributed.checkpoint")  # fmt: skip
    if request.flattens:
        raise ValueError("flatten_optimizer_state_dict: got True for a load from one file, which "
                         "torch cannot do; set it to False, in this call and in the one that "
                         "saves")  # fmt: skip


def check_form(saved: Mapping[str, Any]) -> None:
    """Refuse objects that are not the state of an optimizer, and the flattened form."""
    missing = [key for key in ("state", "param_groups") if key not in saved]
    if missing:
        raise ValueError(f"the state has no {missing[0]!r}: got another object, or the flattened "
                         "form, which torch cannot broadcast from rank 0; set "
                         "flatten_optimizer_state_dict=False")  # fmt: skip


def check_groups(
    groups: Groups, saved: Groups, names: Sequence[str], shape_options: Sequence[str]
) -> None:
    """Raise ValueError if saved parameter groups do not fit.

    Args:
        groups: Parameter groups of the optimizer.
        saved: Parameter groups of the state.
        names: Names of all parameters of the optimizer.
        shape_options: Options that decide the shape of state.
    """
    counts, others = [[len(group["params"]) for group in some] for some in (groups, saved)]
    if counts != others:
        raise ValueError(f"param_groups: the state has {others} parameters, wanted {counts}")
    if all("param_names" in group for group in [*groups, *saved]):
        _check_names(names, [name for group in saved for name in group["param_names"]])
    for group, other in zip(groups, saved, strict=True):
        method, wanted = other.get("method"), group["method"]
        if method != wanted:
            raise ValueError(f"the state is of {_called(method)}, wanted {wanted!r}")
        for key in shape_options:
            if key not in other:
                raise ValueError(f"{key}: missing in a parameter group of the state, wanted "
                                 f"{group[key]!r}")  # fmt: skip
            if not _equal(other[key], group[key]):
                raise ValueError(f"{key}: the state has {other[key]!r}, got {group[key]!r}; "
                                 f"set {key} = {other[key]!r}")  # fmt: skip


def _called(method: str | None) -> str:
    return f"method {method!r}" if method else "an optimizer that is not one of titan_shampoo"


def _check_names(names: Sequence[str], saved: Sequence[str]) -> None:
    for name, mine, theirs in zip(names, bare_names(names), bare_names(saved), strict=True):
        if mine != theirs:
            raise ValueError(f"{name}: the state has {theirs!r} in its place; load the state of "
                             "this model and, in a pipeline, of this stage")  # fmt: skip


class Entry(NamedTuple):
    """Live and saved state of one parameter."""

    name: str
    mine: Mapping[str, Tensor]
    saved: Mapping[str, Any]
    shares: Mapping[str, "Share"]
    """This rank's blocks by the suffix of their keys; empty if the parameter has no blocks."""

    @property
    def is_local(self) -> bool:
        """True if it has only this rank's blocks, although other ranks own some, too."""
        if not self.shares:
            return False
        places, total = self.shares[BLOCKS]
        return len(self.saved[BLOCKS]) == len(places) < total

    def check(self) -> None:
        """Raise ValueError if the saved state does not fit."""
        differing = sorted(self.mine.keys() ^ self.saved.keys())
        if differing:
            some = ", ".join(differing[:5])
            raise ValueError(f"{self.name}: the state has {len(self.saved)} entries, wanted "
                             f"{len(self.mine)}; differing: {some}")  # fmt: skip
        for key, value in self.mine.items():
            wanted = self._wanted(key, value, is_local=self.is_local)
            found = self.saved[key].shape
            if found != wanted:
                is_blocks = key.rpartition(".")[2] in self.shares and found[1:] == wanted[1:]
                advice = ("; the state of one rank fits that rank alone: save the result of "
                          "state_dict()") if is_blocks else ""  # fmt: skip
                raise ValueError(f"{self.name}: {key} of the state has shape {tuple(found)}, "
                                 f"wanted {tuple(wanted)}{advice}")  # fmt: skip

    def _wanted(self, key: str, value: Tensor, *, is_local: bool) -> torch.Size:
        share = self.shares.get(key.rpartition(".")[2])
        if share is None:
            return value.shape
        rows = len(share.places) if is_local else share.total
        return torch.Size((rows, 2) if key == BLOCKS else (rows, *value.shape[1:]))

    def is_of_one_step(self) -> bool:
        """True if every saved block is in its place, and of the step of its parameter."""
        table = whole_tensor(self.saved[BLOCKS]).cpu()
        numbers = self.mine[BLOCKS].cpu() if self.is_local else torch.arange(len(table))
        steps = torch.full_like(numbers, int(self.saved["cursor"]))
        return torch.equal(table, torch.stack([numbers, steps], dim=1))

    def load(self) -> None:
        """Copy the saved state into live memory."""
        for key, value in self.mine.items():
            share = self.shares.get(key.rpartition(".")[2])
            if key != BLOCKS:
                load_(value, self.saved[key], None if share is None else share.places)


class Share(NamedTuple):
    """Blocks of a parameter with equal shape."""

    places: Sequence[int]
    """Positions of this rank's blocks among all of them."""
    total: int
    """Number of blocks on all ranks."""


def _shares(holdings: Sequence[Holding]) -> dict[str, Share]:
    """Blocks of one parameter, by the suffix of their keys."""
    if not holdings:
        return {}
    shares = {holding.suffix: Share(holding.places, holding.count) for holding in holdings}
    indices = [index for holding in holdings for index in holding.indices]
    return shares | {BLOCKS: Share(indices, sum(holding.count for holding in holdings))}


def as_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Saved state of a parameter, with numbers as tensors: some tools save counters as numbers."""
    return {
        key: torch.as_tensor(value) if isinstance(value, int | float) else value
        for key, value in state.items()
    }


def copy_state(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Copy state into live memory of the same layout."""
    with torch.no_grad():
        for key, value in other.items():
            mine[key].copy_(value)


def is_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """True if two states of a parameter are of the same kind and of the same blocks."""
    if one.keys() != other.keys():
        return False
    return BLOCKS not in one or torch.equal(one[BLOCKS], other[BLOCKS])


def has_begun(state: Mapping[str, Tensor]) -> bool:
    """True if a parameter's state appears to differ from its initial state."""
    counters = [state[key] for key in ("cursor", "step") if key in state]
    return any(bool(value.any()) for value in counters or state.values())


def _equal(one: object, other: object) -> bool:
    """True if two options are equal; a tuple equals the list that it was saved as."""
    return _plain(one) == _plain(other)


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value
