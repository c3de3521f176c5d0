"""Iterates of FOOF and K-FAC equal those of a naive optimizer with dense solves."""

from typing import Any

import numpy as np
import pytest

from tests.layers import Mixed, made, seen_by
from tests.reference.kfac import NaiveKFAC
from tests.test_eva_reference import LAYERS, LR, _arrays, learning_rate, loss_at
from titan_shampoo import FOOF, KFAC

METHODS: dict[str, Any] = {"FOOF": FOOF, "KFAC": KFAC}
STEPS, TOLERANCE = 8, 1e-10

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"precondition_frequency": 1},
    "sparse": {"factor_frequency": 2, "precondition_frequency": 3},
    "sparser": {"factor_frequency": 4, "precondition_frequency": 2, "max_factor_dim": 3},
    "sparse together": {"factor_frequency": 3, "precondition_frequency": 2, "refresh": "together"},
    "together": {"precondition_frequency": 3, "refresh": "together"},
    "waiting": {"precondition_frequency": 5, "damping_mode": "relative", "max_factor_dim": 3},
    "blocks": {"max_factor_dim": 2, "precondition_frequency": 2},
    "relative": {"damping_mode": "relative", "scaling": "norm", "weight_decay": 0.1},
    "unscaled": {"scaling": None, "momentum": 0.5, "statistics_decay": 0.9},
}


def turns_of(optimizer: Any) -> dict[str, list[int]]:
    """When the blocks of each layer are refreshed."""
    found: dict[str, list[int]] = {name: [] for name in LAYERS}
    plan = optimizer._step.plan
    for block in plan.blocks:
        found[plan.params[block.param].name.removesuffix(".weight")].append(block.slot)
    return found


def moment_turns_of(optimizer: Any) -> dict[str, int]:
    """When moments of each layer are formed, beside the first step."""
    step = optimizer._step
    names = [layer.name.removesuffix(".weight") for layer in step.layers]
    is_staggered = optimizer.param_groups[0]["refresh"] == "staggered"
    return dict(zip(names, step.turns if is_staggered else [0] * len(names), strict=True))


def compare(method: str, options: dict[str, Any]) -> None:
    model = made(Mixed)
    # The convolutions see several positions of each of six images.
    own = {"loss_normaliser": 6.0} if method == "KFAC" else {}
    optimizer = METHODS[method](model.named_parameters(), lr=LR, model=model, **own, **options)
    naive = NaiveKFAC(
        method,
        {name: _arrays(model.get_submodule(name)) for name in LAYERS},
        {"factored_damping": None, "loss_normaliser": None} | dict(optimizer.param_groups[0]),
        turns_of(optimizer),
        moment_turns_of(optimizer),
    )
    for step in range(STEPS):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step)
        naive.step(seen_by(model, loss_at(step), LAYERS), lr)
        optimizer.zero_grad()
        loss_at(step)(model).backward()
        optimizer.step()
        for name in LAYERS:
            module: Any = model.get_submodule(name)
            pairs = zip((module.weight, module.bias), naive.params[name], strict=True)
            for param, wanted in ((p, w) for p, w in pairs if w is not None):
                error = np.linalg.norm(param.detach().numpy() - wanted) / np.linalg.norm(wanted)
                assert error < TOLERANCE, f"{name}, step {step}: {error:.1e}"
                wanted[...] = param.detach().numpy()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_iterates_are_those_of_dense_solves(method: str, variant: str) -> None:
    compare(method, VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_iterates_of_kfac_with_exact_damping(variant: str) -> None:
    compare("KFAC", VARIANTS[variant] | {"factored_damping": False})
