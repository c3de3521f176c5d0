"""How far eigenbases turn between refreshes: what a test that skips blocks could save.

    python -m benchmarks.basis_drift --task text -- --training.steps 120

Trains with SOAP. Before each refresh the new factor ``A`` is seen in the basis ``Q`` of the last
one: the share of ``A`` off the diagonal there, ``||offdiag(Q^T A Q)|| / ||A||`` in Frobenius norms,
is 0 if the basis still holds (the criterion of the published PyTorch implementation of Shampoo,
where it is off by default). A test costs the products ``Q^T A Q``, ``4 d^3`` operations, and saves
what a refresh costs where the share is below its tolerance.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.runs import TASKS, train
from benchmarks.workloads import machine
from tests.support.ranks import run_on_ranks
from titan_shampoo.functional import soap
from titan_shampoo.functional.roots import BasisMethod, Degenerate, next_basis

TOLERANCES = (0.01, 0.03, 0.1, 0.3)


def off_diagonal_share(matrices: Tensor, bases: Tensor) -> Tensor:
    """``||offdiag(Q^T A Q)|| / ||A||`` of each matrix, ``(n,)``; 0 of a matrix of zeros."""
    seen = bases.mT @ matrices @ bases
    diagonal = seen.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    total = seen.square().sum((-2, -1))
    return ((total - diagonal).clamp(min=0) / total.clamp(min=1e-30)).sqrt()


def drifts(args: list[str], threads: int) -> list[list[float]]:
    """Shares of the matrices of each refresh, but the first ones, in a run in this process."""
    found: list[list[float]] = []

    def observed(
        matrices: Tensor,
        previous: Tensor,
        ready: Tensor | bool,
        *,
        method: BasisMethod,
        degenerate: Degenerate,
    ) -> tuple[Tensor, Tensor]:
        if torch.as_tensor(ready).all():
            found.append(off_diagonal_share(matrices, previous).tolist())
        return next_basis(matrices, previous, ready, method=method, degenerate=degenerate)

    with patch.object(soap, "next_basis", observed):
        train(args, threads)
    return found


def main(args: Sequence[str]) -> None:
    """Train, and print how many bases still held, in each third of the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="text")
    parser.add_argument("--lr", type=float, default=1.8e-2)
    parser.add_argument("--period", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("settings", nargs="*", help="of the run, after --")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"--job.config_file={TASKS[options.task]}",
            f"--job.dump_folder={Path(folder) / 'run'}",
            "--optimizer.name=SOAP",
            f"--optimizer.lr={options.lr}",
            "--optimizer.soap.block_size=256",
            f"--optimizer.soap.precondition_frequency={options.period}",
            *options.settings,
        ]
        (found,) = run_on_ranks(1, drifts, settings, options.threads, timeout=1800)
    print(machine())
    heads = [f"below {tolerance}" for tolerance in TOLERANCES]
    print("  ".join(f"{head:>10}" for head in ("third", "refreshes", "median", *heads)))
    for third in range(3):
        some = found[third * len(found) // 3 : (third + 1) * len(found) // 3]
        part = torch.tensor([share for refresh in some for share in refresh])
        held = [(part < tolerance).double().mean().item() for tolerance in TOLERANCES]
        numbers = "  ".join(f"{value:10.3f}" for value in (part.median().item(), *held))
        print(f"{third + 1:10}  {len(part):10}  {numbers}")


if __name__ == "__main__":
    main(sys.argv[1:])
