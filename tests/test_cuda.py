"""On a CUDA device: the iterates of the CPU, no waiting for the device, and steps in a graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.internals import step_blocks
from titan_shampoo import SOAP, KLShampoo, Shampoo

pytestmark = pytest.mark.gpu

METHODS: dict[str, Any] = {"Shampoo": Shampoo, "SOAP": SOAP, "KLShampoo": KLShampoo}
SHAPES = {"a": (24, 16), "b": (16, 16), "bias": (16,), "conv": (8, 4, 2, 2)}
NEVER = 10_000


@pytest.fixture(autouse=True)
def _no_sync_left_forbidden() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def trained(method: str, device: str, steps: int, **options: Any) -> tuple[Any, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).double().to(device))
        for name, shape in SHAPES.items()
    }
    known = {"block_size": 8, "precondition_frequency": 3, "momentum": 0.9}
    if method == "Shampoo":
        known["eps"] = 1e-4
    optimizer = METHODS[method](params.items(), lr=0.1, **known | options)
    for _ in range(steps):
        for param in params.values():
            grad = torch.randn(param.shape, generator=generator).double()
            param.grad = grad.to(device)
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("method", METHODS)
def test_iterates_are_those_of_the_cpu(method: str) -> None:
    _, expected = trained(method, "cpu", 20)
    _, params = trained(method, "cuda", 20)
    for name, param in params.items():
        assert torch.allclose(param.cpu(), expected[name], rtol=1e-8, atol=1e-8), name


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_refresh_does_not_wait_for_the_device(method: str) -> None:
    optimizer, _ = trained(method, "cuda", 12)
    optimizer.param_groups[0]["precondition_frequency"] = NEVER
    for _ in range(2):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(5):
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_gradient_is_skipped_on_the_device(method: str) -> None:
    optimizer, params = trained(method, "cuda", 12)
    before = {name: param.detach().clone() for name, param in params.items()}
    params["a"].grad[0, 0] = torch.nan
    optimizer.step()
    for name, param in params.items():
        assert torch.equal(param, before[name]), name
    params["a"].grad[0, 0] = 1.0
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(params["a"], before["a"])


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_refresh_is_captured_in_a_graph(method: str) -> None:
    optimizer, params = trained(method, "cuda", 12)
    twin, twins = trained(method, "cuda", 12)
    for one in (optimizer, twin):
        one.param_groups[0]["precondition_frequency"] = NEVER
    taken = torch.ones((), dtype=torch.bool, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step_blocks(optimizer, taken)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_blocks(optimizer, taken)
    for _ in range(5):
        graph.replay()
    for _ in range(3 + 5):
        twin.step()
    for name in ("a", "b", "conv"):
        assert torch.allclose(params[name], twins[name], rtol=1e-8, atol=1e-10), name
