"""Twenty iterates equal those of a naive optimizer with dense solves, for every option."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.reference.eva import NaiveEva
from tests.support.layer_iterates import (
    LAYERS,
    LR,
    STEPS,
    TOLERANCE,
    arrays_of,
    learning_rate,
    loss_at,
)
from tests.support.layer_models import Mixed, made, seen_by
from titan_shampoo import Eva, EvaF, EvaS
from titan_shampoo.layers.optimizer import LayerOptimizer

METHODS: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "EvaS": EvaS}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "strong": {"damping": 0.01, "statistics_decay": 0.5},
    "no scale, no momentum": {"scaling": None, "momentum": 0.0},
    "as long as the gradient": {"scaling": "norm", "nesterov": True, "weight_decay": 0.1},
    "normalised": {"scaling": "kl_norm", "dampening": 0.3, "damping_mode": "relative"},
    "loose clip": {"kl_clip": 1e9, "damping_mode": "relative"},
    "coupled decay": {"weight_decay": 0.1, "weight_decay_type": "l2"},
    "corrected decay": {"weight_decay": 0.1, "weight_decay_type": "corrected"},
    "independent decay": {"weight_decay": 1e-3, "weight_decay_type": "independent"},
}


def make(method: str, model: nn.Module, **options: Any) -> LayerOptimizer:
    own = {} if method == "EvaS" else {"model": model}
    return METHODS[method](model.named_parameters(), **{"lr": LR, **own, **options})


def compare(method: str, options: dict[str, Any]) -> None:
    model = made(Mixed)
    optimizer = make(method, model, **options)
    # A single row or column is a vector to Eva-s.
    layers = LAYERS[:3] if method == "EvaS" else LAYERS
    naive = NaiveEva(
        method,
        {name: arrays_of(model.get_submodule(name)) for name in layers},
        optimizer.param_groups[0] | {"lr": LR},
    )
    for step in range(STEPS):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step)
        naive.step(seen_by(model, loss_at(step), layers), lr)
        optimizer.zero_grad()
        loss_at(step)(model).backward()
        optimizer.step()
        for name in layers:
            expected = naive.params[name]
            module: Any = model.get_submodule(name)
            for param, wanted in zip((module.weight, module.bias), expected, strict=True):
                if wanted is None or (method == "EvaS" and param.ndim == 1):
                    continue
                error = np.linalg.norm(param.detach().numpy() - wanted) / np.linalg.norm(wanted)
                assert error < TOLERANCE, f"{name}, step {step}: {error:.1e}"
                wanted[...] = param.detach().numpy()  # errors of one step, not of a trajectory


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_iterates_are_those_of_dense_solves(method: str, variant: str) -> None:
    compare(method, VARIANTS[variant])


def test_iterates_with_output_gradients_of_a_batch_mean() -> None:
    compare("Eva", {"kv_scale": "batch_mean", "kv_batch_size": 6, "damping": 0.01})


def test_iterates_with_one_mean_for_each_dim() -> None:
    compare("EvaS", {"merge": "none"})


@pytest.mark.parametrize("method", ["Eva", "EvaF"])
def test_separate_biases_are_stepped_by_adamw(method: str) -> None:
    model = made(Mixed)
    optimizer = make(method, model, bias="separate")
    assert set(optimizer.state[model.wide.bias]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "momentum" in optimizer.state[model.wide.weight]


def test_other_parameters_are_stepped_by_torchs_adamw_on_the_schedule() -> None:
    model, twin = made(Mixed), made(Mixed)
    optimizer = make("Eva", model, fallback_lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(twin.norm.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        adamw.param_groups[0]["lr"] = 0.01 * learning_rate(step) / LR
        for param in model.parameters():
            param.grad = None
        loss_at(step)(model).backward()
        twin.norm.weight.grad = model.norm.weight.grad.clone()
        twin.norm.bias.grad = model.norm.bias.grad.clone()
        optimizer.step()
        adamw.step()
    assert torch.allclose(model.norm.weight, twin.norm.weight, rtol=1e-14)
    assert torch.allclose(model.norm.bias, twin.norm.bias, rtol=1e-14)


def test_other_parameters_are_stepped_by_torchs_sgd() -> None:
    model, twin = made(Mixed), made(Mixed)
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    optimizer = make("Eva", model, fallback="sgd", fallback_lr=None, weight_decay_type="l2",
                     **options)  # fmt: skip
    sgd = torch.optim.SGD(twin.norm.parameters(), lr=LR, **options)
    for step in range(4):
        optimizer.zero_grad()
        loss_at(step)(model).backward()
        twin.norm.weight.grad = model.norm.weight.grad.clone()
        twin.norm.bias.grad = model.norm.bias.grad.clone()
        optimizer.step()
        sgd.step()
    assert torch.allclose(model.norm.weight, twin.norm.weight, rtol=1e-13)
    assert torch.allclose(model.norm.bias, twin.norm.bias, rtol=1e-13)


def test_metrics_are_curvature_over_damping_and_the_angle_to_the_gradient() -> None:
    model = made(Mixed)
    optimizer = make("Eva", model, damping=0.01)
    seen = seen_by(model, loss_at(0), LAYERS)["wide"]
    loss_at(0)(model).backward()
    optimizer.step()
    from tests.reference.eva import eva  # noqa: PLC0415

    a, b = np.append(seen.inputs.mean(0), 1.0), seen.output_grads.sum(0)
    assert seen.bias_grad is not None
    grad = np.concatenate([seen.weight_grad, seen.bias_grad[:, None]], axis=1)
    direction = eva(grad, a, b, 0.01)
    metrics = optimizer.layer_metrics()["wide.weight"]
    cosine = (grad * direction).sum() / np.linalg.norm(grad) / np.linalg.norm(direction)
    assert float(metrics["rho"]) == pytest.approx((a @ a) * (b @ b) / 0.01, rel=1e-12)
    assert float(metrics["cosine"]) == pytest.approx(cosine, rel=1e-12)
