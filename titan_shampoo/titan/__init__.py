"""The training stack on torchtitan: the only package that imports it.

The CPU runtime comes first, because torchtitan chooses its device while it is imported. All
that ``parallel/``, ``checkpoint/`` and ``train.py`` use of torchtitan is re-exported here, so that
another version changes this package alone.
"""

# ruff: noqa: E402  (the CPU runtime must be installed before torchtitan is imported)
from titan_shampoo.extras import require

require("titan_shampoo.titan")

from titan_shampoo.titan.runtime import install_cpu_runtime

install_cpu_runtime()

from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama4.infra.parallelize import parallelize_llama as parallelize_mixture
from torchtitan.protocols.train_spec import TrainSpec

from titan_shampoo.titan.console import log_plainly
from titan_shampoo.titan.initialization import initialize_alike
from titan_shampoo.titan.leaving import wait_for_others
from titan_shampoo.titan.planning import plan_run
from titan_shampoo.titan.recipes import mixture, resnet, text_recipe, transformer
from titan_shampoo.titan.seed import run_seed
from titan_shampoo.titan.trainer import Trainer
from titan_shampoo.titan.weights import weights_adapter

__all__ = [
    "TORCH_DTYPE_MAP",
    "JobConfig",
    "ParallelDims",
    "TrainSpec",
    "Trainer",
    "apply_ac",
    "initialize_alike",
    "log_plainly",
    "mixture",
    "parallelize_llama",
    "parallelize_mixture",
    "pipeline_llm",
    "plan_run",
    "resnet",
    "run_seed",
    "text_recipe",
    "transformer",
    "wait_for_others",
    "weights_adapter",
]
