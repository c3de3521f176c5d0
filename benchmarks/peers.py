"""Shampoo and SOAP of other libraries, set up to do the same work as far as they can.

They get the matrices only; what falls back to AdamW in ours is left out. The versions are pinned by
the ``bench`` extra; a library that is missing ends the benchmark, so that no comparison is dropped
without a word.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

Parameters = list[torch.nn.Parameter]


def peers(matrices: "dict[str, Parameters]", block: int, period: int) -> dict[str, Any]:
    """Optimizers of other libraries by name.

    Args:
        matrices: Parameters of its own for each name in ``PEERS``.
        block: Block size, where the library has blocks.
        period: Steps between two refreshes.

    Raises:
        SystemExit: If a library is missing.
    """
    try:
        import heavyball  # noqa: PLC0415 (an extra)
        import heavyball.utils  # noqa: PLC0415
        import pytorch_optimizer  # noqa: PLC0415
    except ImportError as error:
        raise SystemExit(f"{error.name} is missing; install titan-shampoo[bench]") from error
    heavyball.utils.compile_mode = None  # as ours and AdamW: eager
    return {
        "pytorch_optimizer Shampoo": pytorch_optimizer.ScalableShampoo(
            matrices["pytorch_optimizer Shampoo"],
            lr=1e-9,
            block_size=block,
            start_preconditioning_step=1,
            preconditioning_compute_steps=period,
        ),
        "pytorch_optimizer SOAP": pytorch_optimizer.SOAP(
            matrices["pytorch_optimizer SOAP"], lr=1e-9, precondition_frequency=period
        ),
        "heavyball SOAP": WithGradients(
            heavyball.SOAP(
                matrices["heavyball SOAP"],
                lr=1e-9,
                precondition_frequency=period,
                max_precond_dim=block,
                split=True,
                use_precond_schedule=False,
            ),
            matrices["heavyball SOAP"],
        ),
    }


def from_folder(folder: Path, matrices: Parameters, block: int, period: int) -> Any:  # noqa: ANN401 (whatever is there)
    """Shampoo of the published PyTorch implementation, from a folder with its sources.

    It is set up as ours by default: Adam grafting, eigendecomposition, all roots in one step.

    Args:
        folder: Holds the package ``distributed_shampoo`` (github facebookresearch/optimizers).
        matrices: Its parameters.
        block: Block size; dims are merged as in the paper.
        period: Steps between two refreshes.

    Raises:
        SystemExit: If the package is not there.
    """
    if not (folder / "distributed_shampoo").is_dir():
        raise SystemExit(f"{folder} has no package distributed_shampoo")
    sys.path.insert(0, str(folder))
    shampoo = importlib.import_module("distributed_shampoo")
    types = importlib.import_module("distributed_shampoo.shampoo_types")
    return shampoo.DistributedShampoo(
        matrices,
        lr=1e-9,
        betas=(0.9, 0.999),
        epsilon=1e-12,
        max_preconditioner_dim=block,
        precondition_frequency=period,
        start_preconditioning_step=max(period, 1),
        grafting_config=types.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
    )


class WithGradients:
    """An optimizer that drops the gradients it has used, given them again in every step."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: Parameters) -> None:
        self.optimizer = optimizer
        self.state = optimizer.state
        self._grads = [(param, param.grad) for param in params]

    def step(self) -> None:
        """One step with the same gradients as always."""
        for param, grad in self._grads:
            param.grad = grad
        self.optimizer.step()


PEERS = ("pytorch_optimizer Shampoo", "pytorch_optimizer SOAP", "heavyball SOAP")
