"""A step without refresh launches as many operations for a hundred blocks as for one.

Operations are those that a profiler sees on the CPU; blocks are small, as tiles that fit in caches
are worked on one after the other.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from titan_shampoo import SOAP, KLShampoo, Shampoo
from titan_shampoo.blocks.optimizer import BlockOptimizer

METHODS: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "coupled decay": {"weight_decay": 0.1, "weight_decay_type": "l2"},
    "together": {"refresh": "together"},
}
MAX_COPIES = 2
"""Gradient into its stack and direction out of it."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counted_step(
    method: str, shapes: list[tuple[int, ...]], options: dict[str, Any]
) -> Counter[str]:
    """How often each operation runs in a step without a refresh, after some with.

    Copies of one element are not counted: on a CPU, torch turns every scalar into a tensor.
    """
    params = {str(number): torch.nn.Parameter(torch.ones(s)) for number, s in enumerate(shapes)}
    optimizer: BlockOptimizer = METHODS[method](
        params.items(), block_size=4, precondition_frequency=3, **options
    )
    generator = torch.Generator().manual_seed(0)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator)
    for _ in range(9):
        optimizer.step()
    # Blocks that are staggered over the period leave no step without a refresh.
    for group in optimizer.param_groups:
        group["precondition_frequency"] = 1000
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        optimizer.step()
    events = profiler.events()
    assert events is not None
    return Counter(
        event.name
        for event in events
        if event.name.startswith("aten::")
        and not (event.name == "aten::copy_" and event.input_shapes[0] == [])
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_number_of_blocks_does_not_change_the_number_of_operations(
    method: str, variant: str
) -> None:
    one, ten, hundred = (
        counted_step(method, [(4 * rows, 4 * columns)], VARIANTS[variant])
        for rows, columns in ((1, 1), (2, 5), (10, 10))
    )
    assert one["aten::copy_"] > 0
    assert one == ten
    assert ten == hundred


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_one_more_parameter_costs_two_copies_at_most(method: str, variant: str) -> None:
    few, many = (counted_step(method, [(8, 8)] * n, VARIANTS[variant]) for n in (2, 12))
    assert many["aten::copy_"] - few["aten::copy_"] <= MAX_COPIES * 10
    for name in ("aten::bmm", "aten::lerp_", "aten::_local_scalar_dense"):
        assert many[name] == few[name], name
