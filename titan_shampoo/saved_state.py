"""Saved state: its forms, what it must have in common with an optimizer, and how it is loaded.

A state is checked as a whole, and by all ranks together, before anything of the optimizer changes.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_shampoo.distributed.gathered import await_ranks, gathered, load_, whole_tensor
from titan_shampoo.distributed.plan import Holding
from titan_shampoo.options import check_alike

BLOCKS = "blocks"
"""Key of the numbers of the blocks that a rank owns; when saved, each with the step of its state.

So blocks of different steps, or of one rank in the place of another's, are found when they are
loaded.
"""

_FIXED_KEYS = ("params", "param_names", "method", "compile", "precondition")
"""Keys of a parameter group that a loaded state does not change."""

_SCHEDULED = ("lr", "weight_decay")
"""Options that nothing is built from, and that schedules change."""

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)

Groups = Sequence[Mapping[str, Any]]
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

    def _check_options(self, group: dict[str, Any]) -> None:
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

    def _holdings(self) -> dict[Tensor, list[Holding]]:
        """The blocks of each parameter that has any, by their shape."""
        raise NotImplementedError

    def _follow_others(self) -> None:
        """Build anew for parameter groups that others have replaced."""
        raise NotImplementedError

    def _follow_loaded(self) -> None:
        """Take the options that have been loaded for those that the optimizer was made with."""
        raise NotImplementedError

    def _is_stage(self) -> bool:
        """Whether the parameters are those of one stage of a pipeline."""
        raise NotImplementedError

    # Saving

    def sharded_state(self) -> dict[str, dict[str, Tensor]]:
        """All state by parameter name, as live tensors to save and to load in place.

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
        and ``get_optimizer_state_dict(..., full_state_dict=True)`` gathers; it is whole on every
        rank where parameters are plain tensors. Later steps do not change it, nor does what is
        loaded into it change the optimizer: pass it to :meth:`load_state_dict`.

        Raises:
            RuntimeError: If other ranks have not called it within ten minutes.
            ValueError: If torch asks for what it would not put together rightly: one file of all
                stages of a pipeline, or the flattened form to be broadcast from rank 0.
        """
        self._follow_others()
        check_request(requested_by_torch(), is_stage=self._is_stage())
        await_ranks(self._judges, "state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        packed = self._packed(self._gathered_state())
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    def local_state_dict(self) -> dict[str, Any]:
        """The live state of this rank, of its own blocks alone; nothing is sent.

        Loads on the layout that it was saved on, each rank its own.
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
        """Have the state of each parameter name the blocks that it is of."""
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
        """A copy of all state, in which that of blocks is spread over ranks, or whole."""
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
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._follow_others()
        await_ranks(self._judges, "load_state_dict()")
        attributes, options = dict(self.__dict__), [dict(group) for group in self.param_groups]
        try:
            self._load(state_dict)
        except Exception:
            for group, before in zip(self.param_groups, options, strict=True):
                group.clear()
                group.update(before)
            self.__dict__.update(attributes)  # a rebuilt state is let go of
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
        """Options of each group as they will be, all of them checked."""
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
        """Check saved state against that of the optimizer as it is now, and copy it there."""
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
            raise ValueError("the state is of local_state_dict() on some ranks, and of "
                             "state_dict() on others; load one of them on all")  # fmt: skip
        for entry in entries:  # to the end, as every rank of a parameter takes part
            if BLOCKS in entry.saved and not entry.is_of_one_step():
                refusal = (f"{entry.name}: blocks of the state are of different steps, or one "
                           "rank's are in the place of another's; save what state_dict() returns "
                           "on every rank, or one file of full_state_dict=True")  # fmt: skip
        self._agreed(refusal)
        for entry in entries:
            entry.load()

    def _entries(self, saved: Mapping[str, Any]) -> Iterator["Entry"]:
        """State of each parameter with what is saved of it; but for frozen ones without any.

        Raises:
            ValueError: If they do not fit.
        """
        holdings = self._holdings()
        for group, old in zip(self.param_groups, saved["param_groups"], strict=True):
            for (name, param), key in zip(self._named(group), old["params"], strict=True):
                other = saved["state"].get(key, {})
                if other or param.requires_grad:  # torch leaves out frozen ones
                    entry = Entry(name, self.state.get(param, {}), as_tensors(other),
                                  _shares(holdings.get(param, ())))  # fmt: skip
                    entry.check()
                    yield entry

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


def _picklable(value: Tensor) -> Tensor:
    """The same, or a copy: torch can neither copy nor pickle a DTensor that begins in a storage."""
    is_inside = isinstance(value, DTensor) and value.to_local().storage_offset() > 0
    return value.detach().clone() if is_inside else value


class Request(NamedTuple):
    """What ``torch.distributed.checkpoint.state_dict`` makes of the state that it asks for."""

    gathers: bool = False
    """One file of rank 0, or one that rank 0 hands to all."""
    flattens: bool = False
    """Of one level, to be loaded from one file."""


def requested_by_torch() -> Request:
    """The caller's request; nothing special where others than torch's functions ask.

    torch hands its options to no optimizer, so that they are read off its frames: what it cannot
    put together would else be lost without a word.
    """
    frame, infos = inspect.currentframe(), {}
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            infos[frame.f_code.co_name] = frame.f_locals.get("info")
        frame = frame.f_back
    info = next(iter(infos.values()), None)
    is_one_file = "_load_optim_state_dict" in infos  # it asks for no other form
    return Request(
        gathers=getattr(info, "full_state_dict", False)
        or getattr(info, "broadcast_from_rank0", False),
        flattens=is_one_file and getattr(info, "flatten_optimizer_state_dict", False),
    )


def check_request(request: Request, *, is_stage: bool) -> None:
    """Refuse what torch would lose.

    Args:
        request: From :func:`requested_by_torch`.
        is_stage: Whether other ranks have other parameters, as stages of a pipeline.
    """
    if is_stage and request.gathers:
        raise ValueError("full_state_dict: got True in a pipeline, where rank 0 would have the "
                         "state of its own stage alone; save the sharded form with "
                         "torch.distributed.checkpoint")  # fmt: skip
    if request.flattens:
        raise ValueError("flatten_optimizer_state_dict: got True for the load of one file, which "
                         "torch cannot put together; set it to False, here and in the call that "
                         "saves")  # fmt: skip


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
    """State of one parameter, and what is saved of it."""

    name: str
    mine: Mapping[str, Tensor]
    saved: Mapping[str, Any]
    shares: Mapping[str, "Share"]
    """This rank's blocks by the end of their keys; empty if the parameter has no blocks."""

    @property
    def is_local(self) -> bool:
        """Whether it is of this rank's blocks alone, where others own some, too."""
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
                advice = ("; what one rank has of its own fits that rank alone: save "
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
        """Whether every saved block is in its place, and of the step of its parameter."""
        table = whole_tensor(self.saved[BLOCKS]).cpu()
        numbers = self.mine[BLOCKS].cpu() if self.is_local else torch.arange(len(table))
        steps = torch.full_like(numbers, int(self.saved["cursor"]))
        return torch.equal(table, torch.stack([numbers, steps], dim=1))

    def load(self) -> None:
        """Copy what is saved into live memory."""
        for key, value in self.mine.items():
            share = self.shares.get(key.rpartition(".")[2])
            if key != BLOCKS:
                load_(value, self.saved[key], None if share is None else share.places)


class Share(NamedTuple):
    """Some of the blocks of a parameter that are alike."""

    places: Sequence[int]
    """Of those that this rank owns among all of them."""
    total: int
    """Blocks on all ranks."""


def _shares(holdings: Sequence[Holding]) -> dict[str, Share]:
    """This rank's blocks of one parameter by the end of their keys, and all together."""
    if not holdings:
        return {}
    shares = {holding.suffix: Share(holding.places, holding.count) for holding in holdings}
    indices = [index for holding in holdings for index in holding.indices]
    return shares | {BLOCKS: Share(indices, sum(holding.count for holding in holdings))}


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


def is_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states of a parameter are of the same kind, and of the same blocks."""
    if one.keys() != other.keys():
        return False
    return BLOCKS not in one or torch.equal(one[BLOCKS], other[BLOCKS])


def has_begun(state: Mapping[str, Tensor]) -> bool:
    """Whether a parameter has state that is not what it is made with, for all that is known."""
    counters = [state[key] for key in ("cursor", "step") if key in state]
    return any(bool(value.any()) for value in counters or state.values())


def _equal(one: object, other: object) -> bool:
    """Whether two options are the same; a tuple that was saved as a list is."""
    return _plain(one) == _plain(other)


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value
