"""Whether the settings of the optimizers go together, and each is read by a method in use."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from titan_shampoo.config.command_line import PLACE
from titan_shampoo.config.limits import Limit
from titan_shampoo.config.settings import Settings
from titan_shampoo.config.values import show

_TAPPED = {"Eva": "eva", "EvaF": "eva_f", "FOOF": "foof", "KFAC": "kfac"}
"""Methods that look into layers, with their tables."""

_LAYERS = {**_TAPPED, "EvaS": "eva_s"}

TABLES = {
    "Shampoo": "shampoo",
    "SOAP": "soap",
    "KLShampoo": "kl_shampoo",
    "SGD": "sgd",
    **_LAYERS,
}
"""The own table of each method that has one."""

# The layers' averages are of their AdamW fallback.
_ADAPTIVE = {"Shampoo", "SOAP", "KLShampoo", "AdamW", *_LAYERS}

_TORCH = {"AdamW", "SGD"}

_SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Pipeline schedules that leave out what layers measure in their backward pass."""

_READ_BY = {
    "lr": {*_ADAPTIVE, "SGD"},
    "weight_decay": {*_ADAPTIVE, "SGD"},
    "beta1": _ADAPTIVE,
    "beta2": _ADAPTIVE,
    "eps": _ADAPTIVE,
    "implementation": _TORCH,
}

_SHAMPOO, _SOAP, _KL_SHAMPOO, _SGD = (
    f"optimizer.{TABLES[method]}" for method in ("Shampoo", "SOAP", "KLShampoo", "SGD")
)

_WITH_SECOND_MOMENT = ("rmsprop", "adam")


def check_methods(settings: Settings) -> None:
    """Refuse settings of the optimizers that do not go together, or that no method reads.

    Raises:
        ConfigError: Naming the first one found and what to change.
    """
    _check_read_by_a_method(settings)
    _check_patterns(settings)
    _check_precondition(settings)
    for table in (_SHAMPOO, _SOAP, _KL_SHAMPOO, _SGD):
        _check_momentum(settings, table)
    for name in _LAYERS.values():
        _check_momentum(settings, f"optimizer.{name}", default=0.9)
        _check_kl_clip(settings, f"optimizer.{name}")
    _check_batch_mean(settings)
    _check_schedule(settings)
    for table in (_SHAMPOO, _SOAP, _KL_SHAMPOO):
        _check_block_size(settings, table)
    for table in (_SHAMPOO, _KL_SHAMPOO):
        _check_grafting(settings, table)
    _check_damping(settings)
    _check_roots(settings)
    _check_nesterov_of_sgd(settings)
    _check_offload(settings)
    _check_own_tables(settings)


def _check_offload(settings: Settings) -> None:
    """Only torch's own optimizers step parameters that wait in the memory of the host."""
    key = "training.enable_cpu_offload"
    ours = [m for m in (settings["optimizer.name"], *_group_methods(settings)) if m not in _TORCH]
    if settings[key] and ours:
        problem = f"got true, but {ours[0]} cannot step parameters that are kept in host memory"
        raise settings.error(key, f'{problem}; set it to false, or optimizer.name = "AdamW"')


def _check_read_by_a_method(settings: Settings) -> None:
    """A shared key is refused if neither the method nor that of a group reads it."""
    for name, problem in unread_by_methods(settings):
        raise settings.error(name, problem)


def _check_own_tables(settings: Settings) -> None:
    """A file may have tables for several methods; on the command line one of another is a mistake.

    It would be ignored, and the person who wrote it means this one run.
    """
    used = methods_in_use(settings)
    for method, table in TABLES.items():
        for name, setting in settings.explicit.items():
            is_own = name.startswith(f"optimizer.{table}.") and setting.place == PLACE
            if is_own and method not in used:
                problem = f"is not read by {', '.join(used)}; remove it"
                raise settings.error(name, f'{problem} or set optimizer.name = "{method}"')


def unread_by_methods(settings: Settings) -> Iterator[tuple[str, str]]:
    """Keys that are set though no method in use reads them, each with what is wrong about it."""
    methods = methods_in_use(settings)
    for key, readers in _READ_BY.items():
        name = f"optimizer.{key}"
        if settings.is_set(name) and not readers & {*methods}:
            method = settings["optimizer.name"]
            yield name, f"is not read by {method}; remove it{_own_key(method, key)}"
    if settings["metrics.layers"] and not _LAYERS.keys() & {*methods}:
        used = ", ".join(methods)
        yield "metrics.layers", f"no method here looks into layers ({used}); remove it"


def methods_in_use(settings: Settings) -> list[str]:
    """The methods of the optimizer and of its groups, by name."""
    return sorted({settings["optimizer.name"], *_group_methods(settings)})


def _group_methods(settings: Settings) -> Iterator[str]:
    for group in settings["optimizer.groups"]:
        yield group.get("optimizer") or settings["optimizer.name"]


def _own_key(method: str, key: str) -> str:
    return " or set optimizer.sgd.momentum" if (method, key) == ("SGD", "beta1") else ""


def _check_patterns(settings: Settings) -> None:
    for index, group in enumerate(settings["optimizer.groups"]):
        try:
            re.compile(group["pattern"])
        except (re.error, OverflowError, RecursionError) as error:
            name = f"optimizer.groups[{index}].pattern"
            raise settings.error(name, f"not a regular expression: {error}") from None


def _check_precondition(settings: Settings) -> None:
    for index, group in enumerate(settings["optimizer.groups"]):
        method = group.get("optimizer") or settings["optimizer.name"]
        if group.get("precondition") is not None and method in _TORCH:
            name = f"optimizer.groups[{index}].precondition"
            raise settings.error(name, f"is not read by {method}; remove it")


def _check_momentum(settings: Settings, table: str, default: float = 0.0) -> None:
    momentum = settings[f"{table}.momentum"]
    if default if momentum is None else momentum:
        return
    for key in ("nesterov", "dampening"):
        if settings[f"{table}.{key}"]:
            raise settings.error(f"{table}.{key}", f"needs {table}.momentum greater than 0")


def _check_kl_clip(settings: Settings, table: str) -> None:
    default = "none" if table == "optimizer.eva_s" else "kl_clip"
    scaling = settings[f"{table}.scaling"] or default
    if settings[f"{table}.kl_clip"] is not None and scaling != "kl_clip":
        problem = f'is not read with {table}.scaling = "{scaling}"; remove one of the two'
        raise settings.error(f"{table}.kl_clip", problem)


def _check_batch_mean(settings: Settings) -> None:
    scale, size = "optimizer.eva.kv_scale", "optimizer.eva.kv_batch_size"
    if (settings[scale] == "batch_mean") != (settings[size] is not None):
        blamed = scale if settings[size] is None else size
        needed = f"{size} to be set" if settings[size] is None else f'{scale} = "batch_mean"'
        raise settings.error(blamed, f"needs {needed}")


def _check_schedule(settings: Settings) -> None:
    """Taps are skipped, silently, by schedules that split the backward pass."""
    key = "parallelism.pipeline_parallel_schedule"
    if settings["parallelism.pipeline_parallel_degree"] == 1:
        return
    split = [name for name in _SPLIT_BACKWARD if name.lower() == settings[key].lower()]
    for method in methods_in_use(settings):
        if split and method in _TAPPED:
            problem = (
                f'"{split[0]}" leaves out what {method} measures in layers; set it to "1F1B" or '
                '"Interleaved1F1B"'
            )
            raise settings.error(key, problem)


def _check_nesterov_of_sgd(settings: Settings) -> None:
    if settings["optimizer.sgd.nesterov"] and settings["optimizer.sgd.dampening"]:
        raise settings.error("optimizer.sgd.nesterov", "needs optimizer.sgd.dampening = 0")


def _check_block_size(settings: Settings, table: str) -> None:
    """Dims merged until they fill a block know one size."""
    size = settings[f"{table}.block_size"]
    if settings[f"{table}.merge"] == "paper" and isinstance(size, list):
        problem = f'got {show(size)}, expected one number with {table}.merge = "paper"'
        raise settings.error(f"{table}.block_size", problem)


def _check_grafting(settings: Settings, table: str) -> None:
    grafting, own = settings[f"{table}.grafting"] or "adam", f"{table}.grafting_beta2"
    if settings[f"{table}.match_rms"] is not None and grafting != "none":
        raise settings.error(f"{table}.match_rms", f'needs {table}.grafting = "none"')
    if grafting not in _WITH_SECOND_MOMENT:
        if settings[own] is not None:
            problem = f'is not read by {table}.grafting = "{grafting}"; remove it'
            raise settings.error(own, problem)
        return
    # A factor that sums (decay 1) is fine, a second moment of Adam that sums is not.
    betas = settings[f"{table}.betas"]
    inherited = betas[1] if betas else settings["optimizer.beta2"]
    if (settings[own] or inherited) == 1:
        key = own if settings[own] else f"{table}.betas"
        problem = f'grafting = "{grafting}" needs a second moment below 1; set {own} = 0.99'
        raise settings.error(key, problem)


def _check_damping(settings: Settings) -> None:
    relative = f"{_SHAMPOO}.eps_relative"
    if settings[f"{_SHAMPOO}.eps"] is not None and settings[relative] is not None:
        raise settings.error(relative, f"is instead of {_SHAMPOO}.eps; remove one of the two")


def _check_roots(settings: Settings) -> None:
    """Iterations made of products find roots of some orders only."""
    method = settings[f"{_SHAMPOO}.root_method"]
    if method not in _ORDERS:
        return
    words, holds = _ORDERS[method]
    for exponent in _listed(settings[f"{_SHAMPOO}.exponent"]):
        if exponent and not holds(exponent):
            problem = (
                f'got {exponent}, expected {words} with root_method = "{method}"; '
                f'set {_SHAMPOO}.root_method = "eigh"'
            )
            raise settings.error(f"{_SHAMPOO}.exponent", problem)


def _is_whole_root(exponent: float) -> bool:
    return abs(round(1 / exponent) * exponent - 1) < 1e-9


def _is_halved_one(exponent: float) -> bool:
    return exponent < 1 and math.frexp(exponent)[0] == 0.5


# Root method -> its exponents, in words and as a test.
_ORDERS: Mapping[str, Limit] = {
    "newton": Limit("1 / a whole number", _is_whole_root),
    "newton_schulz": Limit("1/2, 1/4, 1/8, ...", _is_halved_one),
}


def _listed(value: Any) -> list[Any]:  # noqa: ANN401  (one value, several or none)
    return value if isinstance(value, list) else [value]
