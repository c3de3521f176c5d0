"""What a step communicates: at most two fused sums, whatever the number of layers."""

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from tests.support.layer_layouts import LAYOUTS, batch, make
from tests.support.layer_models import Mixed, Perceptron, made, normal
from tests.support.ranks import run_on_ranks

CHECK = 1
"""The element that says on all ranks whether gradients are finite."""

# Layout -> method -> sums besides the check: statistics, and scalars of layers.
EXPECTED = {
    "fsdp 2": {"Eva": 2, "EvaF": 2, "EvaF unscaled": 1, "EvaS": 2},
    "fsdp 3": {"Eva": 2, "EvaF": 2, "EvaF unscaled": 1, "EvaS": 2},
    "hsdp 2x2": {"Eva": 2, "EvaF": 2, "EvaF unscaled": 1, "EvaS": 2},
    "ddp 2": {"Eva": 1, "EvaF": 1, "EvaF unscaled": 1, "EvaS": 0},
    # One more vector where columns are cut: of products with the input.
    "tp": {"Eva": 1, "EvaF": 2, "EvaF unscaled": 2, "EvaS": 2},
    "fsdp x tp": {"Eva": 2, "EvaF": 3, "EvaF unscaled": 3, "EvaS": 2},
}


def deep(depth: int) -> type[nn.Module]:
    """A model with ``depth`` more layers."""

    class Deep(Mixed):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Sequential(*[nn.Linear(3, 3) for _ in range(depth)]).double()

        def forward(self, images: Tensor) -> Tensor:
            return self.more(super().forward(images))

    return Deep


def count(layout: str, depth: int) -> dict[str, dict[str, int]]:
    """Collectives of the second step, by method and kind."""
    _, place, kind = LAYOUTS[layout]
    found = {}
    for name in EXPECTED[layout]:
        method, *unscaled = name.split()
        model, reader, num_readers = place(made(kind if kind is Perceptron else deep(depth)))
        optimizer = make(method, model, **({"scaling": None} if unscaled else {}))
        for step in range(2):
            optimizer.zero_grad()
            inputs, targets = (t[reader::num_readers] for t in batch(kind, step))
            ((model(inputs) - targets) ** 2).mean().backward()
            with CommDebugMode() as mode:
                optimizer.step()
        found[name] = {str(kind): number for kind, number in mode.get_comm_counts().items()}
    return found


@pytest.mark.parametrize("layout", EXPECTED)
def test_a_step_communicates_as_often_as_the_method_must(layout: str) -> None:
    few, many = (run_on_ranks(LAYOUTS[layout][0], count, layout, depth) for depth in (0, 3))
    assert few == many
    for result in few:
        for name, expected in EXPECTED[layout].items():
            assert sum(result[name].values()) == expected + CHECK, name
            assert all("allreduce" in kind for kind in result[name]), name


def without_peers(method: str) -> int:
    model = made(Perceptron)
    optimizer = make(method, model)
    model(normal(0, 2, 3, 6)).sum().backward()
    with CommDebugMode() as mode:
        optimizer.step()
    return mode.get_total_counts()


@pytest.mark.parametrize("method", ["Eva", "EvaF", "EvaS"])
def test_one_process_communicates_nothing(method: str) -> None:
    assert not dist.is_initialized()
    assert without_peers(method) == 0
