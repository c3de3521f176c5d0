"""The one seed from which weights and data order follow."""

from torchtitan.config import JobConfig

DEFAULT_SEED = 0


def run_seed(job_config: JobConfig) -> int:
    """Return ``debug.seed``, or 0: an unset seed too must be the same on every rank."""
    seed = job_config.debug.seed
    return DEFAULT_SEED if seed is None else int(seed)
