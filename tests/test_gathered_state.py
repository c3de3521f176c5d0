"""State that torch's own functions gather into one file is whole, and goes on on any layout."""

import copy
import dataclasses
import functools
import io
import itertools
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from tests.support.layer_layouts import (
    ddp,
    fsdp,
    fsdp_by_tp,
    fsdp_over_columns,
    hsdp,
    train,
    values,
)
from tests.support.layer_models import Perceptron, made
from tests.support.ranks import run_on_ranks
from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo
from titan_shampoo.distributed import gathered

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

Values = dict[str, Tensor]

BLOCKS = {"block_size": 3, "momentum": 0.9, "lr": 0.02, "precondition_frequency": 3}
LAYERS = {"lr": 0.05, "fallback": "sgd", "statistics_decay": 0.5}
KRONECKER = {**LAYERS, "precondition_frequency": 3, "max_factor_dim": 3, "bias": "separate"}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Shampoo": (Shampoo, {**BLOCKS, "eps": 1e-3}),
    "SOAP": (SOAP, {**BLOCKS, "eps": 1e-3}),
    "KLShampoo": (KLShampoo, BLOCKS),
    "FOOF": (FOOF, KRONECKER),
    "KFAC": (KFAC, {**KRONECKER, "factored_damping": False}),
    "Eva": (Eva, {**LAYERS, "damping_mode": "relative"}),
    "EvaF": (EvaF, LAYERS),
    "EvaS": (EvaS, LAYERS),
}


def alone(model: Any) -> tuple[nn.Module, int, int]:
    return model, 0, 1


LAYOUTS: dict[str, tuple[int, Any]] = {
    "alone": (1, alone),
    "ddp 2": (2, ddp),
    "fsdp 2": (2, fsdp),
    "fsdp 4": (4, fsdp),
    "columns 2": (2, fsdp_over_columns),
    "hsdp 2x2": (4, hsdp),
    "fsdp x tp": (4, fsdp_by_tp),
}
QUICK = {"fsdp 2": ("hsdp 2x2",), "alone": ("fsdp 4",), "fsdp x tp": ("ddp 2",)}
QUICK_METHODS = ("Shampoo", "Eva")


def make(method: str, model: nn.Module, **options: Any) -> Any:
    kind, defaults = METHODS[method]
    has_model = {} if issubclass(kind, (Shampoo, SOAP, KLShampoo, EvaS)) else {"model": model}
    return kind(model.named_parameters(), **defaults, **has_model, **options)


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FORMS = ("file", "broadcast", "nested", "flat", "naive", "in place")
"""Two loads of one file, torch's two sharded forms, and the optimizer's own two."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sharded(form: str, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """State in one of the forms that torch.distributed.checkpoint saves and loads."""
    match form:
        case "naive":
            return {"optim": optimizer.state_dict()}
        case "in place":
            return {"optim": optimizer.sharded_state()}
        case "nested":
            return {"optim": get_optimizer_state_dict(model, optimizer)}
    return {"optim": get_optimizer_state_dict(model, optimizer, options=FLAT)}


def save(layout: str, methods: tuple[str, ...], forms: tuple[str, ...], folder: Path) -> None:
    """State of each method after four steps: one file of rank 0, and torch's checkpoints."""
    for method in methods:
        model, reader, num_readers = LAYOUTS[layout][1](made(Perceptron))
        optimizer = make(method, model)
        train(model, optimizer, Perceptron, reader, num_readers)
        for form in set(forms) - {"file", "broadcast"}:
            path = folder / f"{layout}.{method}.{form}"
            dcp.save(sharded(form, model, optimizer), checkpoint_id=path)
        # torch hands out the weights of a model that is not sharded, not copies of them.
        weights = copy.deepcopy(get_model_state_dict(model, options=FULL))
        state = get_optimizer_state_dict(model, optimizer, options=FULL)
        # Further steps change nothing of what was gathered.
        train(model, optimizer, Perceptron, reader, num_readers)
        if rank() == 0:
            torch.save((weights, state), folder / f"{layout}.{method}.pt")


def load(form: str, model: nn.Module, optimizer: Any, path: Path) -> None:
    weights, state = torch.load(f"{path}.pt")
    set_model_state_dict(model, weights, options=FULL)
    if form in ("file", "broadcast"):
        options = FULL if form == "file" else BROADCAST
        given = state if form == "file" or rank() == 0 else {}
        set_optimizer_state_dict(model, optimizer, given, options=options)
        return
    found = sharded(form, model, optimizer)
    dcp.load(found, checkpoint_id=f"{path}.{form}")
    match form:
        case "naive":
            optimizer.load_state_dict(found["optim"])
        case "in place":
            optimizer.zero_grad()
        case "nested":
            set_optimizer_state_dict(model, optimizer, found["optim"])
        case "flat":
            set_optimizer_state_dict(model, optimizer, found["optim"], options=FLAT)


def go_on(
    layout: str,
    sources: tuple[str, ...],
    methods: tuple[str, ...],
    forms: tuple[str, ...],
    folder: Path,
) -> dict[tuple[str, str, str], Values]:
    """Weights after eight more steps, by source, method and form."""
    found = {}
    for source, method, form in itertools.product(sources, methods, forms):
        model, reader, num_readers = LAYOUTS[layout][1](made(Perceptron, seed=1))
        optimizer = make(method, model)
        load(form, model, optimizer, folder / f"{source}.{method}")
        for _ in range(2):
            train(model, optimizer, Perceptron, reader, num_readers)
        found[source, method, form] = values(model)
    return found


@functools.cache
def uninterrupted(method: str, *, forgets: bool = False) -> Values:
    """Weights after twelve steps in one process; with state that is lost after the fourth."""
    model = made(Perceptron)
    optimizer = make(method, model)
    train(model, optimizer, Perceptron, 0, 1)
    if forgets:
        optimizer = make(method, model)
    for _ in range(2):
        train(model, optimizer, Perceptron, 0, 1)
    return values(model)


def run(layout: str, function: Any, *args: Any) -> list[Any]:
    size = LAYOUTS[layout][0]
    return [function(*args)] if size == 1 else run_on_ranks(size, function, *args, timeout=300)


def check(
    target: str,
    sources: tuple[str, ...],
    methods: tuple[str, ...],
    forms: tuple[str, ...],
    folder: Path,
) -> None:
    for source in sources:
        run(source, save, source, methods, forms, folder)
    if target == "alone":
        forms = tuple(form for form in forms if form != "broadcast")
    for result in run(target, go_on, target, sources, methods, forms, folder):
        for (source, method, form), found in result.items():
            expected, fresh = uninterrupted(method), uninterrupted(method, forgets=True)
            lost = max(float((fresh[name] - value).norm()) for name, value in expected.items())
            for name, value in expected.items():
                error = float((found[name] - value).norm())
                case = f"{method}, {source} to {target}, {form}, {name}"
                assert error <= 1e-7 * lost, f"{case}: {error:.1e} of {lost:.1e}"


@pytest.mark.parametrize("target", QUICK)
def test_state_of_any_form_goes_on_on_another_layout(target: str, tmp_path: Path) -> None:
    check(target, QUICK[target], QUICK_METHODS, ("file", "broadcast", "flat"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
def test_state_of_every_form_goes_on_from_every_layout(target: str, tmp_path: Path) -> None:
    check(target, tuple(LAYOUTS), tuple(METHODS), FORMS, tmp_path)


def trained(method: str, layout: str = "fsdp 2") -> tuple[Any, Any, Any]:
    """A model, its optimizer after four steps, and what takes four more."""
    model, reader, num_readers = LAYOUTS[layout][1](made(Perceptron))
    optimizer = make(method, model)

    def step() -> None:
        train(model, optimizer, Perceptron, reader, num_readers)

    step()
    return model, optimizer, step


def pickled(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpickled(data: bytes) -> Any:
    return torch.load(io.BytesIO(data))


def refusal(load: Any, state: Any) -> str:
    try:
        load(state)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "taken"


def states(optimizer: Any) -> list[Tensor]:
    """All state of this rank, copied."""
    saved = optimizer.local_state_dict()["state"]
    return [value.clone() for state in saved.values() for value in state.values()]


def copy_and_pickle(methods: tuple[str, ...]) -> None:
    for method in methods:
        _, optimizer, step = trained(method)
        before = states(optimizer)
        saved = [
            form
            for state in (optimizer.state_dict(), optimizer.local_state_dict())
            for form in (copy.deepcopy(state), unpickled(pickled(state)))
        ]
        for state in saved:
            step()
            optimizer.load_state_dict(state)
            for mine, wanted in zip(states(optimizer), before, strict=True):
                assert torch.equal(local(mine), local(wanted)), method


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_copied_and_pickled_state_is_bit_for_bit_the_same() -> None:
    run_on_ranks(2, copy_and_pickle, ("SOAP", "KFAC", "Eva", "EvaS"), timeout=300)


def load_what_is_not_whole(method: str) -> dict[str, tuple[str, bool]]:
    """Refusals on this rank, and whether they left the state as it was."""
    _, optimizer, step = trained(method)
    early = optimizer.state_dict()
    ours = pickled(optimizer.state_dict()), pickled(optimizer.local_state_dict())
    of_rank_0 = [ours]
    dist.broadcast_object_list(of_rank_0)
    step()
    mixed = optimizer.state_dict()
    mixed["state"][0] = {**early["state"][0], "cursor": mixed["state"][0]["cursor"]}
    missing = optimizer.state_dict()
    if rank() == 1:
        del missing["state"][0]
    forms = optimizer.local_state_dict(), optimizer.state_dict()
    wrong = {
        "rank 0's DTensors": unpickled(of_rank_0[0][0]),
        "rank 0's blocks": unpickled(of_rank_0[0][1]),
        "two steps": mixed,
        "missing on rank 1": missing,
        "two forms": forms[rank()],
    }
    found = {}
    for case, state in wrong.items():
        before = states(optimizer)
        message = refusal(optimizer.load_state_dict, state)
        pairs = zip(states(optimizer), before, strict=True)
        found[case] = message, all(torch.equal(local(a), local(b)) for a, b in pairs)
    return found


@pytest.mark.parametrize("method", ["Shampoo", "FOOF"])
def test_state_that_is_not_whole_is_refused_on_all_ranks_and_changes_nothing(method: str) -> None:
    wanted = {
        "rank 0's DTensors": "blocks of the state are of different steps, or belong to another",
        "rank 0's blocks": (
            "or belong to another rank",
            "the state of one rank fits that rank alone",
        ),
        "two steps": "blocks of the state are of different steps",
        "missing on rank 1": "the state has 0 entries",
        "two forms": "local_state_dict() on some ranks",
    }
    results = run_on_ranks(2, load_what_is_not_whole, method, timeout=300)
    for result in results:
        for case, message in wanted.items():
            told, is_unchanged = result[case]
            some = message if isinstance(message, tuple) else (message,)
            assert any(one in told for one in some), f"{case}: {told}"
            assert is_unchanged, case
    assert {case: told for case, (told, _) in results[0].items()} == {
        case: told for case, (told, _) in results[1].items()
    }


def ask_for_what_torch_loses() -> list[str]:
    model, optimizer, _ = trained("Shampoo")
    flat = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    told = []
    for broadcasts in (False, True):
        options = dataclasses.replace(flat, broadcast_from_rank0=broadcasts)
        given = {} if broadcasts and rank() else state
        told.append(
            refusal(lambda s, o=options: set_optimizer_state_dict(model, optimizer, s, options=o),
                    given)
        )  # fmt: skip
    # One of two stages of a pipeline, each on a rank of its own.
    lone = [dist.new_group([one]) for one in range(2)][rank()]
    stage = nn.Linear(4, 4)
    kwargs = {"process_group": lone, "pipeline_group": dist.group.WORLD}
    optimizer = Shampoo([(f"{rank()}.{n}", p) for n, p in stage.named_parameters()], **kwargs)
    model = nn.ModuleDict({str(rank()): stage})
    told.append(
        refusal(lambda o: get_optimizer_state_dict(model, optimizer, options=o), FULL)
    )  # fmt: skip
    return told


def test_what_torch_cannot_put_together_is_refused_on_all_ranks() -> None:
    for told in run_on_ranks(2, ask_for_what_torch_loses, timeout=300):
        flat, broadcast, pipeline = told
        assert flat == broadcast
        assert flat.startswith("flatten_optimizer_state_dict: got True")
        assert pipeline.startswith("full_state_dict: got True in a pipeline")


def save_on_one_rank() -> tuple[str, list[str]]:
    _, optimizer, _ = trained("Shampoo", "ddp 2")
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titan_shampoo").addHandler(handler)
    found = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "PATIENCE", timedelta(seconds=0.2))
        patch.setattr(gathered, "LIMIT", timedelta(seconds=1))
        if rank() == 0:
            found = refusal(lambda _: optimizer.state_dict(), None)
    dist.barrier()
    optimizer.load_state_dict(optimizer.state_dict())  # ranks that come later find each other
    return found, told


def test_a_rank_that_saves_alone_says_so_and_gives_up() -> None:
    (refused, told), _ = run_on_ranks(2, save_on_one_rank, timeout=300)
    missing = "1 of 2 ranks have not called state_dict()"
    assert told == [f"{missing} yet: waiting for them; call it on all ranks, and save on one"]
    assert refused.startswith(f"{missing} within 0:00:01")
