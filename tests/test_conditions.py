"""Condition numbers of preconditioners: those of the factors, on all ranks, in no checkpoint."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.reference.blocks import Array
from tests.support.block_layouts import LAYOUTS, METHODS, OPTIONS, Layout, gradients, plain
from tests.support.block_layouts import full_tensors as tensors
from tests.support.block_views import of_blocks
from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import records, text_run, train_all, write_text
from titan_shampoo import SOAP, KLShampoo, Shampoo
from titan_shampoo.blocks.optimizer import BlockOptimizer
from titan_shampoo.titan.layer_metrics import condition_numbers, lists_on_host

STEPS = 5
BETA2 = 0.9
DAMPED: dict[str, tuple[Any, dict[str, Any]]] = {
    "Shampoo": (Shampoo, {"eps": 1e-3, "root_method": "eigh"}),
    "Shampoo, relative": (Shampoo, {"eps_relative": 1e-2}),
    "SOAP": (SOAP, {"basis_method": "eigh"}),
    "KLShampoo": (KLShampoo, {}),
}


def damped(values: Array, name: str) -> Array:
    """What each method makes of the eigenvalues of a factor after ``STEPS`` steps."""
    if name == "KLShampoo":
        return np.maximum(values, 1e-6 * values.max())
    if name == "SOAP":
        return np.maximum(values, 0) + np.finfo(np.float64).eps * values.max()
    values = values / (1 - BETA2**STEPS)
    return values + (1e-2 * values.max() if "relative" in name else 1e-3)


@pytest.mark.parametrize("name", DAMPED)
def test_that_of_a_block_is_of_its_worst_factor(name: str) -> None:
    make, own = DAMPED[name]
    weight = torch.nn.Parameter(tensors(0)["wide"])
    optimizer: BlockOptimizer = make(
        [("wide", weight)], betas=(0.9, BETA2), block_size=4, precondition_frequency=1,
        start_step=1, **own,
    )  # fmt: skip
    assert optimizer.conditions()["wide"].tolist() == [0.0] * 10
    for step in range(1, STEPS + 1):
        weight.grad = tensors(step)["wide"]
        optimizer.step()
    state = optimizer.state[weight]
    for block, found in enumerate(optimizer.conditions()["wide"].tolist()):
        worst = 0.0
        for side in ("left", "right"):
            factor = of_blocks(state, side)[block].numpy()
            extent = math.isqrt(factor.size)
            values = damped(np.linalg.eigvalsh(factor.reshape(extent, extent)), name)
            worst = max(worst, values.max() / values.min())
        assert found == pytest.approx(worst, rel=1e-3), block


def conditions(layout: Layout, method: str) -> dict[str, list[float]]:
    """Those of the blocks of this rank's parameters after some steps."""
    start = tensors(0)
    params = {name: torch.nn.Parameter(layout.placed(name, start[name])) for name in layout.names}
    make, own = METHODS[method]
    optimizer = make(params.items(), **{**OPTIONS, **own, **layout.distribution})
    for step in range(1, STEPS + 1):
        grads = gradients(step)
        for name, param in params.items():
            param.grad = layout.placed(name, grads[name]) if name in grads else None
        optimizer.step()
    assert not any("condition" in key for key in _keys(optimizer))
    return lists_on_host(optimizer.conditions())


def _keys(optimizer: BlockOptimizer) -> list[str]:
    views = [key for state in optimizer.state.values() for key in state]
    return views + [key for state in optimizer.sharded_state().values() for key in state]


def on_layouts() -> dict[tuple[str, str], dict[str, list[float]]]:
    layouts = {name: make() for name, make in LAYOUTS[dist.get_world_size()].items()}
    return {
        (name, method): conditions(layout, method)
        for name, layout in layouts.items()
        for method in METHODS
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_knows_those_of_all_blocks_of_its_parameters(ranks: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = {method: conditions(Layout(plain), method) for method in METHODS}
    torch.set_num_threads(before)
    for blocks in expected.values():
        assert not any(blocks.pop("frozen")), "it is never refreshed"
        assert all(min(numbers) >= 1 for numbers in blocks.values())
    for found in run_on_ranks(ranks, on_layouts):
        for (layout, method), blocks in found.items():
            if "pipeline" in layout:
                assert blocks
            else:
                assert blocks.keys() - {"frozen"} == expected[method].keys()
            for name, numbers in ((n, some) for n, some in blocks.items() if n != "frozen"):
                assert numbers == pytest.approx(expected[method][name], rel=1e-4), (layout, name)


def test_a_failed_refresh_keeps_the_number_of_the_last_good_one() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([("w", weight)], precondition_frequency=1, start_step=1, max_failures=9)
    weight.grad = tensors(1)["square"][:4, :4].float()
    optimizer.step()
    before = optimizer.conditions()["w"].clone()
    assert before.item() > 1
    of_blocks(optimizer.state[weight], "left")[0].fill_(torch.nan)
    optimizer.step()
    assert optimizer.failed_refreshes == 1
    assert torch.equal(optimizer.conditions()["w"], before)


def test_a_person_reads_the_median_over_blocks_and_the_worst_of_them() -> None:
    blocks: dict[str, Tensor] = {
        "a.weight": torch.tensor([5.0, 0.0]),
        "b.weight": torch.tensor([7.0, 9.0, 1.0, 2.0]),
    }
    assert condition_numbers(lists_on_host(blocks)) == {
        "condition_median": 5.0,
        "condition_max": 9.0,
        "condition_max_layer": "b.weight",
    }
    nothing_yet = {"a.weight": torch.zeros(2)}
    assert condition_numbers(lists_on_host(nothing_yet)) == condition_numbers({}) == {}


MESHES: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {"training__local_batch_size": 8}},
    2: {
        "fsdp": {},
        "pp": {
            "training__local_batch_size": 8,
            "parallelism__pipeline_parallel_degree": 2,
            "parallelism__pipeline_parallel_microbatch_size": 4,
        },
    },
}


def test_a_run_records_them_from_the_first_refresh_on(tmp_path: Path) -> None:
    write_text(tmp_path)
    common = {
        "optimizer__name": "Shampoo", "optimizer__shampoo__block_size": 64,
        "optimizer__shampoo__eps_relative": 1e-3,
        "optimizer__shampoo__precondition_frequency": 2, "training__steps": 4,
        "training__local_batch_size": 4,
    }  # fmt: skip
    for ranks, meshes in MESHES.items():
        runs = [text_run(tmp_path, name, **(common | own)) for name, own in meshes.items()]
        run_on_ranks(ranks, train_all, runs)
    for key in ("condition_median", "condition_max"):
        expected = records(tmp_path, "one", key)
        assert list(expected) == [2, 3, 4]
        assert all(1 < value < 1002 for value in expected.values())
        for name in ("fsdp", "pp"):
            assert records(tmp_path, name, key) == pytest.approx(expected, rel=2e-2)
    worst = records(tmp_path, "one", "condition_max_layer")
    assert all(str(name).endswith(".weight") for name in worst.values())
