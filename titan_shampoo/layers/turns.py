"""In which steps second moments are formed and blocks inverted: turns, spread over the whole model.

Inversions are spread block by block over ``precondition_frequency`` steps, second moments over
``factor_frequency``. Layers of one numbered part of a network (all of ``layers.3``) are measured in
one step: a part that is compiled has a graph with moments and one without, and not one for each
combination.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from titan_shampoo.distributed.assignment import Claim, spread_slots
from titan_shampoo.distributed.plan import Parameter
from titan_shampoo.recognition import reason_not_multiplied
from titan_shampoo.whole_model import Described, claims_of_model, slots_in_model

NUMBERED_PART = re.compile(r"(?:.*?\.)?[0-9]+(?=\.)")


def inversion_turns(
    planned: Sequence[Parameter], whole_model: Sequence[Described] | None
) -> list[list[int]]:
    """Turn of each block of each layer in its period of inversions.

    Args:
        planned: The layers of this stage.
        whole_model: All parameters; None if there are no other stages.

    Raises:
        ValueError: If a layer is not one of the model's.
    """
    names = {param.name for param in whole_model or ()}

    def claim(param: Described) -> Claim | None:
        if not _is_layer(param):
            return None
        extents = [[b - a for a, b in itertools.pairwise(cuts)]
                   for cuts in block_edges(*_joint_shape(param, names), param.options)]  # fmt: skip
        costs = tuple(inversion_cost(extent) for extent in itertools.product(*extents))
        return Claim(param.name, param.group, param.options["precondition_frequency"], costs)

    return slots_in_model([param.claim for param in planned], whole_model, claim)


def moment_turns(
    planned: Sequence[Parameter],
    periods: Sequence[int],
    whole_model: Sequence[Described] | None,
    *,
    two_sided: bool,
) -> list[int]:
    """Turn of each layer in its period of second moments.

    Turns cost about the same if all layers see as many rows, as they do but for convolutions.

    Args:
        planned: As for :func:`inversion_turns`.
        periods: Their ``factor_frequency``.
        whole_model: As for :func:`inversion_turns`.
        two_sided: Whether outputs have moments, too.
    """
    names = {param.name for param in whole_model or ()}

    def cost(shape: Sequence[int]) -> tuple[float]:
        rows, columns = shape[0], math.prod(shape[1:])
        return (float(columns**2 + two_sided * rows**2),)

    def claim(param: Described) -> Claim | None:
        if not _is_layer(param):
            return None
        period = param.options["factor_frequency"]
        return Claim(param.name, param.group, period, cost(_joint_shape(param, names)))

    here = [
        Claim(param.name, param.group, period, cost(param.shape))
        for param, period in zip(planned, periods, strict=True)
    ]
    claims = claims_of_model(here, whole_model, claim)
    parts: dict[Claim, float] = defaultdict(float)
    for one in claims:
        parts[_part(one)] += sum(one.costs)
    spread = spread_slots([part._replace(costs=(total,)) for part, total in parts.items()])
    turns = dict(zip(parts, (turn for (turn,) in spread), strict=True))
    by_name = {one.name: turns[_part(one)] for one in claims}
    return [by_name[param.name] for param in planned]


def _part(claim: Claim) -> Claim:
    """The numbered part of the network that a layer belongs to, without costs; else itself."""
    found = NUMBERED_PART.match(claim.name)
    return claim._replace(name=found[0] if found else claim.name, costs=())


def _is_layer(param: Described) -> bool:
    """Whether a parameter of another stage is the weight of a layer, linear or a convolution.

    Others of two dims and more, such as stacks of experts, are nobody's to invert.
    """
    if param.name.rpartition(".")[2] != "weight" or param.tensor.ndim not in (2, 4):
        return False
    return reason_not_multiplied(param.name, param.tensor, param.options, param.kind) is None


def _joint_shape(param: Described, names: Collection[str]) -> tuple[int, int]:
    """Rows and columns of ``[weight | bias]`` of another stage.

    Args:
        param: The weight.
        names: Of all parameters of the model.
    """
    has_bias = param.name.removesuffix("weight") + "bias" in names
    is_joint = has_bias and param.options["bias"] == "joint"
    return param.tensor.shape[0], math.prod(param.tensor.shape[1:]) + is_joint


def block_edges(rows: int, columns: int, options: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Where a joint matrix is cut into blocks."""
    size = options["max_factor_dim"] or max(rows, columns)
    return (*range(0, rows, size), rows), (*range(0, columns, size), columns)


def inversion_cost(extent: Sequence[int]) -> float:
    """What the inverses of a block cost, up to a constant."""
    return float(sum(extent)) ** 3
