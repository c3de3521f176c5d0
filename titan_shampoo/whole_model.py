"""The whole model as seen by one stage of a pipeline: names, shapes, options.

Refreshes are spread over the steps of a period for the parameters of all stages together, so that a
stage does the same in each step as a single process.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titan_shampoo.distributed.assignment import Claim, spread_slots
from titan_shampoo.recognition import Kind, kinds_of


class Described(NamedTuple):
    """A parameter of the model, on this stage or another one."""

    group: int
    """Number of its parameter group."""
    name: str
    tensor: Tensor
    """A tensor without memory, for its shape."""
    options: dict[str, Any]
    kind: Kind | None = None
    """Kind by its module, if known."""


def described(
    all_params: Iterable[Any] | nn.Module, defaults: Mapping[str, Any]
) -> list[Described]:
    """Each parameter of a whole model, given as named parameters, as groups or as a module.

    Raises:
        ValueError: If one has no name.
    """
    kinds: dict[Tensor, Kind] = {}
    if isinstance(all_params, nn.Module):
        kinds, all_params = kinds_of([all_params]), all_params.named_parameters()
    given = list(all_params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    found = []
    for number, group in enumerate(groups):
        options = {**defaults, **{k: v for k, v in group.items() if k != "params"}}
        for entry in group["params"]:
            if isinstance(entry, Tensor):
                raise ValueError("all_params: got a tensor without a name, wanted (name, tensor)")
            name, tensor = entry
            shape = torch.empty(tensor.shape, device="meta")
            found.append(Described(number, name, shape, options, kinds.get(tensor)))
    return found


def claims_of_model(
    here: Sequence[Claim],
    whole_model: Sequence[Described] | None,
    claim_elsewhere: Callable[[Described], Claim | None],
) -> list[Claim]:
    """Claims of all preconditioned parameters of the model.

    Args:
        here: Claims of this stage.
        whole_model: All parameters; None if there is only one stage.
        claim_elsewhere: Claim of a parameter of another stage; None if it is not preconditioned.

    Raises:
        ValueError: If a parameter of this stage is not one of the model's.
    """
    if whole_model is None:
        return list(here)
    mine = {claim.name: claim for claim in here}
    claims = []
    for param in whole_model:
        if param.name in mine:
            claims.append(mine.pop(param.name)._replace(group=param.group))
        elif (claim := claim_elsewhere(param)) is not None:
            claims.append(claim)
    if mine:
        raise ValueError(f"{next(iter(mine))}: is not in all_params, which has {len(whole_model)} "
                         "parameters; pass those of the whole model")  # fmt: skip
    return claims


def slots_in_model(
    here: Sequence[Claim],
    whole_model: Sequence[Described] | None,
    claim_elsewhere: Callable[[Described], Claim | None],
) -> list[list[int]]:
    """Refresh slots of the blocks on this stage, spread with those of the whole model.

    Arguments and errors as for :func:`claims_of_model`.
    """
    if whole_model is None:  # parameters may then be without names
        return spread_slots(here)
    claims = claims_of_model(here, whole_model, claim_elsewhere)
    slots = dict(zip((claim.name for claim in claims), spread_slots(claims), strict=True))
    return [slots[claim.name] for claim in here]
