"""Which values the options of a parameter group of Eva and its relatives may have.

Every rank has the same options, so every rank refuses the same ones, before any collective.
"""

from collections.abc import Mapping
from typing import Any

from titan_shampoo.options import CHOICES as SHARED_CHOICES
from titan_shampoo.options import LIMITS as SHARED_LIMITS
from titan_shampoo.options import Limit, check_alone, check_heavy_ball

_POSITIVE: Limit = (lambda x: x > 0, "greater than 0")
_AVERAGING: Limit = (lambda x: 0 <= x < 1, "in [0, 1)")
_STEPS: Limit = (lambda x: isinstance(x, int) and x >= 1, "at least 1")

_LIMITS: dict[str, Limit] = {
    **{key: SHARED_LIMITS[key] for key in (
        "lr", "weight_decay", "momentum", "dampening", "max_skipped", "max_failures")},
    "betas": (lambda x: len(x) == 2 and 0 <= x[0] < 1 and 0 <= x[1] < 1, "two numbers in [0, 1)"),
    "eps": _POSITIVE,
    "damping": _POSITIVE,
    "statistics_decay": _AVERAGING,
    "kl_clip": _POSITIVE,
    "loss_normaliser": (lambda x: x is None or x > 0, "greater than 0"),
    "kv_batch_size": (lambda x: x is None or x > 0, "greater than 0"),
    "fallback_lr": (lambda x: x is None or x >= 0, "at least 0"),
    "factor_frequency": _STEPS,
    "precondition_frequency": _STEPS,
    "max_factor_dim": (lambda x: x is None or (isinstance(x, int) and x >= 1), "at least 1"),
}  # fmt: skip

_CHOICES: dict[str, tuple[Any, ...]] = {
    "weight_decay_type": SHARED_CHOICES["weight_decay_type"],
    "damping_mode": ("absolute", "relative"),
    "kv_scale": ("per_token", "batch_mean"),
    "scaling": ("kl_clip", "norm", "kl_norm", None),
    "bias": ("joint", "separate"),
    "merge": ("matrix", "none"),
    "batch_dims": (0, 1),
    "refresh": SHARED_CHOICES["refresh"],
    "fallback": ("adamw", "sgd"),
    "precondition": SHARED_CHOICES["precondition"],
    "factored_damping": (True, False),
}

OF_THE_WHOLE_STEP = ("scaling", "kl_clip", "max_skipped", "max_failures")
"""Options that all groups share: one number is formed of all layers, and steps are counted once."""


def check_layer_options(options: Mapping[str, Any]) -> None:
    """Refuse what is impossible in a parameter group.

    Raises:
        ValueError: Naming the option, what was got and what is wanted.
    """
    check_alone(options, _LIMITS, _CHOICES)
    check_heavy_ball(options)
    _check_pairs(options)


def _check_pairs(options: Mapping[str, Any]) -> None:
    """Options that are possible alone but not together."""
    if options.get("batch_dims") and "factor_frequency" in options:
        raise ValueError(f"batch_dims: got 1, wanted 0: {options['method']} takes no stacks of "
                         "matrices one by one; give them to Eva, EvaF or EvaS")  # fmt: skip
    if options["scaling"] == "kl_norm" and "factor_frequency" in options:
        raise ValueError(f"scaling: got 'kl_norm', wanted 'kl_clip', 'norm' or None with "
                         f"{options['method']}: it makes up for a division by the damping, which "
                         "only Eva, EvaF and EvaS make")  # fmt: skip
    if options.get("kv_scale") == "batch_mean" and options["kv_batch_size"] is None:
        raise ValueError("kv_batch_size: got None with kv_scale='batch_mean', wanted the batch "
                         "size that the damping was tuned for")  # fmt: skip
