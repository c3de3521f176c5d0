"""State that torch's own functions gather into one file is whole, and goes on on any layout."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests.layers import Perceptron, made
from tests.ranks import run_on_ranks
from tests.test_eva_layouts import ddp, fsdp, fsdp_by_tp, fsdp_over_columns, hsdp, train, values
from titan_shampoo import FOOF, KFAC, SOAP, Eva, EvaF, EvaS, KLShampoo, Shampoo

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
QUICK = {"fsdp 2": ("fsdp 4", "hsdp 2x2"), "alone": ("fsdp 2",), "fsdp x tp": ("ddp 2",)}
QUICK_METHODS = ("Shampoo", "KFAC", "Eva")


def make(method: str, model: nn.Module, **options: Any) -> Any:
    kind, defaults = METHODS[method]
    has_model = {} if issubclass(kind, (Shampoo, SOAP, KLShampoo, EvaS)) else {"model": model}
    return kind(model.named_parameters(), **defaults, **has_model, **options)


def full(*, broadcast: bool = False) -> StateDictOptions:
    return StateDictOptions(
        full_state_dict=True, cpu_offload=not broadcast, broadcast_from_rank0=broadcast
    )


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def save(layout: str, methods: tuple[str, ...], folder: Path) -> None:
    """One file for each method, written by rank 0 after four steps."""
    for method in methods:
        model, reader, num_readers = LAYOUTS[layout][1](made(Perceptron))
        optimizer = make(method, model)
        train(model, optimizer, Perceptron, reader, num_readers)
        weights = get_model_state_dict(model, options=full())
        state = get_optimizer_state_dict(model, optimizer, options=full())
        # Further steps change nothing of what was gathered.
        train(model, optimizer, Perceptron, reader, num_readers)
        if rank() == 0:
            torch.save((weights, state), folder / f"{layout}.{method}.pt")


def go_on(
    layout: str, sources: tuple[str, ...], methods: tuple[str, ...], folder: Path
) -> dict[tuple[str, str, bool], Values]:
    """Weights after eight more steps, by source, method, and whether rank 0 alone had the file."""
    found = {}
    for source in sources:
        for method in methods:
            for broadcast in (False, True) if layout != "alone" else (False,):
                model, reader, num_readers = LAYOUTS[layout][1](made(Perceptron, seed=1))
                optimizer = make(method, model)
                weights, state = {}, {}
                if rank() == 0 or not broadcast:
                    weights, state = torch.load(folder / f"{source}.{method}.pt")
                options = full(broadcast=broadcast)
                set_model_state_dict(model, weights, options=options)
                set_optimizer_state_dict(model, optimizer, state, options=options)
                for _ in range(2):
                    train(model, optimizer, Perceptron, reader, num_readers)
                found[source, method, broadcast] = values(model)
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


def check(target: str, sources: tuple[str, ...], methods: tuple[str, ...], folder: Path) -> None:
    for source in sources:
        run(source, save, source, methods, folder)
    for result in run(target, go_on, target, sources, methods, folder):
        for (source, method, broadcast), found in result.items():
            expected, fresh = uninterrupted(method), uninterrupted(method, forgets=True)
            lost = max(float((fresh[name] - value).norm()) for name, value in expected.items())
            for name, value in expected.items():
                error = float((found[name] - value).norm())
                case = f"{method}, {source} to {target}, broadcast {broadcast}, {name}"
                assert error <= 1e-7 * lost, f"{case}: {error:.1e} of {lost:.1e}"


@pytest.mark.parametrize("target", QUICK)
def test_one_file_of_all_ranks_goes_on_on_another_layout(target: str, tmp_path: Path) -> None:
    check(target, QUICK[target], QUICK_METHODS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
def test_one_file_goes_on_from_every_layout_on_every_layout(target: str, tmp_path: Path) -> None:
    check(target, tuple(LAYOUTS), tuple(METHODS), tmp_path)
