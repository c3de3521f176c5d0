"""What a step of Eva does with matrices: as SGD with momentum, and two more reads of gradients."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.layer_models import normal
from titan_shampoo import Eva, EvaF, EvaS

METHODS: dict[str, Any] = {"Eva": Eva, "EvaF": EvaF, "EvaS": EvaS}
SHAPE = (160, 110)
"""Too large to be stacked with others of its shape."""
VIEWS = {"view", "_unsafe_view", "reshape", "detach", "t", "alias", "as_strided", "unsqueeze"}


class MatrixPasses(TorchDispatchMode):
    """Counts the operations that read or write a matrix, once for each matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.synchronizations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        lists = [arg for arg in args if isinstance(arg, (list, tuple))]
        number = max((_matrices(arg) for arg in lists), default=0) or min(1, _matrices(args))
        if name not in VIEWS:
            self.counts[name] += number
        self.synchronizations += name == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def _matrices(args: Iterable[Any]) -> int:
    return sum(isinstance(arg, Tensor) and arg.numel() == SHAPE[0] * SHAPE[1] for arg in args)


def passes(method: str, depth: int, **options: Any) -> MatrixPasses:
    """Of the third step."""
    torch.manual_seed(0)
    layers = [nn.Linear(SHAPE[1], SHAPE[0], bias=False) for _ in range(depth)]
    model = nn.ModuleList(layers)
    own = {} if method == "EvaS" else {"model": model}
    optimizer = METHODS[method](model.named_parameters(), **own, **options)
    for step in range(3):
        optimizer.zero_grad()
        loss = sum((layer(normal(step, 5, SHAPE[1]).float()) ** 2).sum() for layer in layers)
        assert isinstance(loss, Tensor)
        loss.backward()
        with MatrixPasses() as counted:
            optimizer.step()
    return counted


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_costs_five_operations_on_matrices(method: str) -> None:
    counted = passes(method, 4).counts
    expected = {"_foreach_norm": 4, "mv": 4, "addr_": 4, "addcmul_": 4, "_foreach_add_": 4}
    if method == "EvaS":
        expected["sum"] = 8  # its marginal means
    assert {name: count for name, count in counted.items() if count} == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_step_status_is_all_that_the_host_reads_however_many_layers_there_are(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    read: Any = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        lengths.append(len(tensor))
        return read(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    for depth in (2, 9):
        assert passes(method, depth).synchronizations == 0
    first_steps_check_taps = 0 if method == "EvaS" else 1
    assert len(lengths) == 2 * (3 + first_steps_check_taps)
    assert lengths[-2:] == [5, 5]
