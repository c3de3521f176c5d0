"""The table in docs/memory.md is true."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import titan_shampoo

TABLE = Path(__file__).parents[1] / "docs" / "memory.md"
ROWS = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\| ([\d.]+) \|", TABLE.read_text(), re.MULTILINE)


def bytes_per_element(name: str, options: dict[str, Any]) -> float:
    """Bytes of state for a matrix of four square blocks, counters of blocks not included."""
    layer = torch.nn.Linear(512, 512, bias=False)
    weight = layer.weight
    if name == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([weight])
        weight.grad = torch.zeros(512, 512)
        optimizer.step()
    else:
        if name in ("Eva", "EvaF", "FOOF", "KFAC"):
            options = {"model": layer} | options
        elif name != "EvaS":
            options = {"block_size": 256} | options
        optimizer = getattr(titan_shampoo, name)([("weight", weight)], **options)
    tensors = [tensor for tensor in optimizer.state[weight].values() if tensor.ndim]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / weight.numel()


def test_the_table_has_a_row_for_every_optimizer() -> None:
    assert {name for name, _, _ in ROWS} == {"AdamW", *titan_shampoo.__all__}


@pytest.mark.parametrize(("name", "options", "expected"), ROWS)
def test_state_takes_the_bytes_that_the_table_says(name: str, options: str, expected: str) -> None:
    arguments = eval(f"dict({options})", {"torch": torch, "dict": dict})
    assert bytes_per_element(name, arguments) == pytest.approx(float(expected), abs=0.01)
