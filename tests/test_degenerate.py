"""Rounding does not decide a basis where eigenvalues are zero or equal, on no mesh.

Gradients that are summed in another order differ in their last bit. In the null space of a factor
any basis is an eigenbasis, and Adam's steps depend on which: with LAPACK's they differ by the
learning rate.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import run_on_ranks
from titan_shampoo import SOAP, KLShampoo, Shampoo
from titan_shampoo.functional.roots import next_basis

LR = 0.01
STEPS = 12


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# The basis


def assert_same_vectors(basis: Tensor, expected: Tensor, tolerance: float) -> None:
    """Columns are equal but for their order and signs."""
    overlaps = (basis.mT @ expected).abs()
    assert (overlaps - overlaps.round()).abs().max() <= tolerance


@pytest.mark.parametrize("method", ["eigh", "qr"])
@pytest.mark.parametrize("value", [0.0, 1.0, 3e-20, 5e20])
def test_the_basis_stays_where_all_eigenvalues_are_equal(method: Any, value: float) -> None:
    previous = torch.linalg.qr(normal(0, 2, 7, 7))[0]
    matrices = value * torch.eye(7, dtype=torch.float64).expand(2, 7, 7)
    noise = 1e-15 * value * normal(1, 2, 7, 7)
    basis, _ = next_basis(matrices + noise + noise.mT, previous, True, method=method)
    assert_same_vectors(basis, previous, 1e-12)


def test_the_first_basis_of_a_matrix_of_low_rank_is_one_of_eigenvectors() -> None:
    """Cleanly: null vectors are orthogonal to the others, and pick nothing up."""
    factor = normal(0, 3, 9, 2)
    matrices = factor @ factor.mT
    identity = torch.eye(9, dtype=torch.float64).expand(3, 9, 9)
    basis, values = next_basis(matrices, identity, False, method="qr")
    turned = basis.mT @ matrices @ basis
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-13
    assert (basis.mT @ basis - identity).abs().max() < 1e-13


def test_untouched_rows_keep_their_axes() -> None:
    """Rows that no gradient reached, as of pixels that are always black, are not mixed."""
    factor = normal(0, 1, 8, 3)
    factor[:, [1, 4, 6]] = 0
    basis, _ = next_basis(
        factor @ factor.mT, torch.eye(8, dtype=torch.float64)[None], False, method="eigh"
    )
    axes = basis[0][[1, 4, 6]].abs()
    assert (axes - axes.round()).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_distinct_eigenvalues_give_the_vectors_that_there_are(
    method: Any, dtype: torch.dtype
) -> None:
    vectors = torch.linalg.qr(normal(0, 1, 6, 6))[0]
    matrices = ((vectors * torch.logspace(0, -2, 6, dtype=torch.float64)) @ vectors.mT).to(dtype)
    basis = torch.eye(6, dtype=dtype)[None]
    for _ in range(1 if method == "eigh" else 60):
        basis, _ = next_basis(matrices, basis, True, method=method)
    assert_same_vectors(basis.double(), vectors, 1e-12 if dtype == torch.float64 else 1e-3)


# Iterates


def _sparse(rows: int, columns: int, step: int) -> Tensor:
    alive = (torch.arange(rows) % 3 != 0).double()[:, None]
    return normal(step, rows, columns) * alive


def _orthogonal(rows: int, columns: int, step: int) -> Tensor:
    size = max(rows, columns)
    return torch.linalg.qr(normal(step, size, size))[0][:rows, :columns]


GRADIENTS: dict[str, Callable[[int, int, int], Tensor]] = {
    "full rank": lambda rows, columns, step: normal(step, rows, columns),
    "rank 1": lambda rows, columns, step: normal(step, rows, 1) @ normal(-step, 1, columns),
    "rank 2": lambda rows, columns, step: normal(step, rows, 2) @ normal(-step, 2, columns),
    "rank 2, of fixed rows": lambda rows, columns, step: (
        normal(0, rows, 2) @ normal(step, 2, columns)
    ),
    "rows without": _sparse,
    "rows without at first": lambda rows, columns, step: (
        _sparse(rows, columns, step) if step < 6 else normal(step, rows, columns)
    ),
    "equal singular values": _orthogonal,
    "equal entries": lambda rows, columns, step: torch.full(
        (rows, columns), float(step), dtype=torch.float64
    ),
    "signs": lambda rows, columns, step: normal(step, rows, columns).sign(),
    "equal rows": lambda rows, columns, step: normal(step, 1, columns).expand(rows, -1).clone(),
    "zero at first": lambda rows, columns, step: normal(step, rows, columns) * (step > 3),
}
SIZES = ((4, 2), (2, 4), (8, 8), (16, 64))


def distance(
    make: Any, kind: str, size: tuple[int, int], *, rounding: float = 2e-16, **options: Any
) -> float:
    """Largest difference of weights after STEPS, if gradients are rounded otherwise."""

    def trained(seed: int | None) -> Tensor:
        weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        optimizer = make([("w", weight)], lr=LR, **options)
        for step in range(1, STEPS + 1):
            weight.grad = GRADIENTS[kind](*size, step)
            if seed is not None:
                weight.grad *= 1 + rounding * normal(1000 * seed + step, *size)
            optimizer.step()
        return weight.detach()

    return max(float((trained(seed) - trained(None)).abs().max()) for seed in (1, 2))


FEW_KINDS = ("full rank", "rank 2", "equal rows")
kinds_but_few_are_slow = pytest.mark.parametrize(
    "kind",
    [k if k in FEW_KINDS else pytest.param(k, marks=pytest.mark.slow) for k in GRADIENTS],
)


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("basis_method", ["eigh", "qr"])
def test_iterates_of_soap_do_not_depend_on_rounding(basis_method: str, kind: str) -> None:
    for size, (period, start) in itertools.product(SIZES, [(1, 1), (3, 1), (3, 2)]):
        found = distance(SOAP, kind, size, basis_method=basis_method,
                         precondition_frequency=period, start_step=start)  # fmt: skip
        assert found < 1e-10, f"{size}, period {period} from step {start}: {found:.1e}"


def test_with_an_arbitrary_basis_they_do() -> None:
    """The option is that of the published code, and the tests above would see it."""
    for basis_method in ("eigh", "qr"):
        options: dict[str, Any] = {"basis_method": basis_method, "precondition_frequency": 3}
        found = distance(SOAP, "rank 2", (8, 8), degenerate_basis="arbitrary", **options)
        assert found > LR / 10


@kinds_but_few_are_slow
def test_iterates_of_kl_shampoo_do_not_depend_on_rounding(kind: str) -> None:
    """Its eigenvalues are floored at a millionth of the largest."""
    for size, period in itertools.product(SIZES, (1, 3)):
        assert distance(KLShampoo, kind, size, precondition_frequency=period) < 1e-13


@kinds_but_few_are_slow
@pytest.mark.parametrize("root_method", ["eigh", "qr"])
def test_damping_above_rounding_keeps_shampoo_from_amplifying_it(
    root_method: Any, kind: str
) -> None:
    for size, period in itertools.product(SIZES, (1, 3)):
        found = distance(Shampoo, kind, size, root_method=root_method, start_step=1,
                         precondition_frequency=period, eps_relative=1e-6)  # fmt: skip
        assert found < 1e-9, f"{size}, period {period}: {found:.1e}"


# Meshes

INPUTS, HIDDEN, OUTPUTS, ROWS = 12, 16, 10, 4


def network() -> nn.Sequential:
    """Weights whose gradients have at most as many dims as there are rows of data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(INPUTS, HIDDEN, bias=False), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS, bias=False)
    )
    return model.double()


def batch(step: int, kind: str) -> tuple[Tensor, Tensor]:
    seed = 0 if kind == "the same rows" else step
    inputs, targets = normal(seed, ROWS, INPUTS), normal(seed + 100, ROWS, OUTPUTS)
    inputs[:, ::5] = 0  # inputs that are never seen
    return inputs, targets


def on_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def on_fsdp(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def on_tp(model: nn.Module) -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


MESHES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP2": on_ddp,
    "FSDP2": on_fsdp,
    "TP2": on_tp,
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SOAP by eigh": (SOAP, {"basis_method": "eigh"}),
    "SOAP by qr": (SOAP, {"basis_method": "qr"}),
    "SOAP in every step": (SOAP, {"precondition_frequency": 1}),
    "Shampoo": (Shampoo, {"eps_relative": 1e-6, "start_step": 1}),
    "Shampoo by qr": (Shampoo, {"eps_relative": 1e-6, "root_method": "qr", "start_step": 1}),
    "KLShampoo": (KLShampoo, {}),
}


def trained(method: str, kind: str, mesh: str | None) -> list[Tensor]:
    """Whole weights after eight steps, with gradients of real backward passes."""
    model = network()
    wrapped = model if mesh is None else MESHES[mesh](model)
    make, own = METHODS[method]
    options = {"precondition_frequency": 3, "block_size": 8} | own
    optimizer = make(model.named_parameters(), lr=LR, **options)
    for step in range(1, 9):
        inputs, targets = batch(step, kind)
        if mesh in ("DDP2", "FSDP2"):
            mine = slice(torch.distributed.get_rank(), None, 2)
            inputs, targets = inputs[mine], targets[mine]
        optimizer.zero_grad()
        (wrapped(inputs) - targets).square().mean().backward()
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [tensor.detach().clone() for tensor in whole]


KINDS = ("the same rows", "other rows")


def _trained_on_ranks(mesh: str) -> dict[tuple[str, str], list[Tensor]]:
    return {(method, kind): trained(method, kind, mesh) for method in METHODS for kind in KINDS}


@pytest.mark.parametrize(
    "mesh", ["FSDP2", *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m != "FSDP2")]
)
def test_all_meshes_give_the_iterates_of_one_process(mesh: str) -> None:
    start = list(network().parameters())
    for found in run_on_ranks(2, _trained_on_ranks, mesh, timeout=240):
        for (method, kind), weights in found.items():
            expected = trained(method, kind, None)
            for weight, other, first in zip(weights, expected, start, strict=True):
                assert (other - first).abs().max() > LR, "it did not move"
                error = float((weight - other).abs().max())
                assert error < 1e-10, f"{method}, {kind}: {error:.1e}"
