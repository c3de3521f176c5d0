"""Whether the ranks were started in a way that can work: what each can see in its environment."""

from collections.abc import Mapping

from titan_shampoo.config.errors import ConfigError
from titan_shampoo.config.values import whole_number

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_USE_TORCHRUN = "start train.py by torchrun, which sets it"


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse an environment that would train twice, or wait for ranks that never come.

    Args:
        environment: Of this process; without any of torchrun's variables it is one rank.

    Raises:
        ConfigError: Naming the variable and what to do.
    """
    set_ones = [name for name in (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT") if name in environment]
    if not {"RANK", "WORLD_SIZE"} & set(set_ones):
        _check_scheduler(environment)
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            others = ", ".join(set_ones)
            raise _mistake(name, f"not set, though {others} are; {_USE_TORCHRUN}")
    port = whole_number(environment["MASTER_PORT"])
    if port is None or port > 65535:
        got = environment["MASTER_PORT"]
        raise _mistake("MASTER_PORT", f'got "{got}", expected a port from 0 to 65535')
    rank, world_size, local_rank, local_size = (_number(environment, n) for n in _NUMBERS)
    if rank >= world_size:
        raise _mistake("RANK", f"got {rank}, expected less than WORLD_SIZE ({world_size})")
    if not local_rank < local_size <= world_size:
        wanted = f"less than LOCAL_WORLD_SIZE ({local_size}), itself at most {world_size}"
        raise _mistake("LOCAL_RANK", f"got {local_rank}, expected {wanted}")


def started_ranks(environment: Mapping[str, str]) -> int:
    """How many ranks were started: ``WORLD_SIZE``, or 1.

    Raises:
        ConfigError: If that is no number.
    """
    return _number({"WORLD_SIZE": "1", **environment}, "WORLD_SIZE")


def _check_scheduler(environment: Mapping[str, str]) -> None:
    """A task of srun that is no rank would train alone, beside its equals."""
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if (whole_number(num_tasks) or 1) > 1:
        problem = (
            f"this is one of {num_tasks} tasks of srun, each of which would train alone; start one "
            "torchrun per node, as docs/cluster.md shows"
        )
        raise _mistake("SLURM_STEP_NUM_TASKS", problem)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, environment["WORLD_SIZE"])
    number = whole_number(text)
    if number is None or (number == 0 and name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")):
        least = " greater than 0" if number == 0 else ""
        raise _mistake(name, f'got "{text}", expected a whole number{least}; {_USE_TORCHRUN}')
    return number


def _mistake(name: str, problem: str) -> ConfigError:
    return ConfigError(f"environment: {name}: {problem}")
