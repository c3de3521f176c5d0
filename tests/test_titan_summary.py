"""The lines before a run say who steps what, and at which learning rate."""

from typing import Any

import pytest
import torch
from torch import nn

from titan_shampoo import EvaF, Shampoo
from titan_shampoo.titan.summary import decay_warnings, optimizer_line

EMBEDDING, LAYERS, NORM = 7 * 6, 6 * 9 + 9 + 9 * 6 + 6, 6 + 6


def model() -> nn.Module:
    parts = {
        "tok_embeddings": nn.Embedding(7, 6),
        "first": nn.Linear(6, 9),
        "second": nn.Linear(9, 6),
        "norm": nn.LayerNorm(6),
    }
    return nn.ModuleDict(parts)


def line_of(optimizer: torch.optim.Optimizer) -> str:
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    return optimizer_line(optimizer)


@pytest.mark.parametrize(
    ("options", "fallback", "rates"),
    [
        ({"fallback_lr": 0.01}, "AdamW", "0.3, fallback 0.01"),
        ({"fallback": "sgd", "fallback_lr": 0.3}, "SGD", "0.3"),
        ({"fallback_lr": None}, "AdamW", "0.3"),
    ],
)
def test_what_a_method_for_layers_leaves_to_its_fallback_is_said(
    options: dict[str, Any], fallback: str, rates: str
) -> None:
    network = model()
    optimizer = EvaF(network.named_parameters(), lr=0.3, model=network, **options)
    assert line_of(optimizer) == (
        f"EvaF on 4 tensors ({LAYERS}), {fallback} (fallback) on 3 tensors ({EMBEDDING + NORM}); "
        f"learning rate {rates}"
    )


def test_what_a_method_for_blocks_leaves_to_adamw_is_said() -> None:
    biases = 9 + 6
    assert line_of(Shampoo(model().named_parameters(), lr=0.006)) == (
        f"Shampoo on 2 tensors ({LAYERS - biases}), "
        f"AdamW (fallback) on 5 tensors ({EMBEDDING + NORM + biases}); learning rate 0.006"
    )


def test_one_of_torchs_optimizers_steps_everything() -> None:
    assert line_of(torch.optim.SGD(model().parameters(), lr=0.1)) == (
        f"SGD on 7 tensors ({EMBEDDING + NORM + LAYERS}); learning rate 0.1"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight_decay": 0.1}, ["0.3 per step"]),
        ({"weight_decay": 0.1, "momentum": 0.0}, ["0.03 per step"]),
        ({"weight_decay": 1e-4}, []),
        ({"weight_decay": 0.1, "weight_decay_type": "independent"}, []),
    ],
)
def test_decay_that_erases_the_weights_is_warned_of(
    options: dict[str, Any], said: list[str]
) -> None:
    network = model()
    optimizer = EvaF(network.named_parameters(), 0.3, model=network, **options)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    warned = list(decay_warnings([optimizer]))
    assert len(warned) == len(said)
    assert all(share in line for share, line in zip(said, warned, strict=True))
    assert all("set optimizer.weight_decay" in line for line in warned)
