"""Whether a configuration fits the number of ranks it was started on."""

import math

from titan_shampoo.config.settings import Settings

# In the order in which a wrong one is most easily changed.
_DEGREES = (
    "parallelism.data_parallel_shard_degree",
    "parallelism.data_parallel_replicate_degree",
    "parallelism.tensor_parallel_degree",
    "parallelism.pipeline_parallel_degree",
    "parallelism.context_parallel_degree",
)
_SHARD, _REPLICATE, _TENSOR, _PIPELINE, _CONTEXT = _DEGREES


def check_world(settings: Settings, world_size: int) -> None:
    """Refuse degrees, batch sizes and sequence lengths that ``world_size`` ranks cannot divide.

    Raises:
        ConfigError: Naming the key to change, and to what.
    """
    degrees = _degrees(settings, world_size)
    _check_experts(settings, degrees)
    _check_batch(settings, degrees[_SHARD] * degrees[_REPLICATE])
    _check_microbatches(settings, degrees[_PIPELINE])
    _check_sequence(settings, degrees[_TENSOR], degrees[_CONTEXT])


def _degrees(settings: Settings, world_size: int) -> dict[str, int]:
    """The degree of each kind of parallelism, -1 resolved; their product is ``world_size``."""
    degrees = {key: int(settings[key]) for key in _DEGREES}
    if degrees[_SHARD] == -1:
        degrees[_SHARD] = max(world_size // math.prod(degrees[key] for key in _DEGREES[1:]), 1)
    product = math.prod(degrees.values())
    if product == world_size:
        return degrees
    factors = " x ".join(
        f"{key.removeprefix('parallelism.')} {degree}"
        for key, degree in degrees.items()
        if degree > 1
    )
    key, change = _remedy(settings, degrees, world_size)
    problem = f"{factors or 'every degree 1'} makes {product}, but there {_ranks(world_size)}"
    raise settings.error(key, f"{problem}; {change}")


def _remedy(settings: Settings, degrees: dict[str, int], world_size: int) -> tuple[str, str]:
    """The key whose change alone makes the product right, and that change in words."""
    for key in _DEGREES:
        others = math.prod(degree for other, degree in degrees.items() if other != key)
        # A shard degree of -1 is right already: the key to change is another one.
        if world_size % others == 0 and settings[key] != -1:
            return key, f"set {key} = {world_size // others}"
    key = max(_DEGREES[1:], key=lambda name: degrees[name])
    return key, f"set {key} = 1, or start {math.prod(degrees.values())} ranks"


def _ranks(world_size: int) -> str:
    return "is 1 rank" if world_size == 1 else f"are {world_size} ranks"


def _check_experts(settings: Settings, degrees: dict[str, int]) -> None:
    experts = settings["parallelism.expert_parallel_degree"]
    inner = settings["parallelism.expert_tensor_parallel_degree"]
    if experts == 1:
        return
    if inner not in (1, degrees[_TENSOR]):
        key = "parallelism.expert_tensor_parallel_degree"
        raise settings.error(key, f"got {inner}, expected 1 or {_TENSOR} ({degrees[_TENSOR]})")
    ranks = degrees[_SHARD] * degrees[_CONTEXT] * (degrees[_TENSOR] if inner == 1 else 1)
    if ranks % experts:
        key = "parallelism.expert_parallel_degree"
        raise settings.error(key, f"got {experts}, expected a divisor of {ranks}")


def _check_batch(settings: Settings, replicas: int) -> None:
    whole = settings["training.global_batch_size"]
    share = settings["training.local_batch_size"] * replicas
    if whole != -1 and whole % share:
        nearest = max(round(whole / share), 1) * share
        problem = (
            f"got {whole}, expected a multiple of training.local_batch_size x data-parallel ranks "
            f"({settings['training.local_batch_size']} x {replicas} = {share}), such as {nearest}"
        )
        raise settings.error("training.global_batch_size", problem)


def _check_microbatches(settings: Settings, stages: int) -> None:
    key = "parallelism.pipeline_parallel_microbatch_size"
    batch, microbatch = settings["training.local_batch_size"], settings[key]
    if stages > 1 and batch % microbatch:
        problem = f"got {microbatch}, expected a divisor of training.local_batch_size ({batch})"
        raise settings.error(key, problem)


def _check_sequence(settings: Settings, tensor: int, context: int) -> None:
    """Refuse lengths that cannot be cut into the tensor x 2 x context parts of torchtitan."""
    if tensor == 1 and context == 1:
        return
    parts = tensor * 2 * context
    keys = ["training.seq_len"] + ["validation.seq_len"] * bool(settings["validation.enable"])
    for key in keys:
        length = settings[key]
        if length and length % parts:
            nearest = max(round(length / parts), 1) * parts
            problem = (
                f"got {length}, expected a multiple of {parts} (2 x {_TENSOR} x {_CONTEXT}), "
                f"such as {nearest}"
            )
            raise settings.error(key, problem)
