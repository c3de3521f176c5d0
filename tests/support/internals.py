"""The inside of an optimizer, as far as tests and benchmarks see it.

Nothing else reads private attributes of the optimizers, so that their inside can change freely.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from titan_shampoo.blocks.optimizer import BlockOptimizer
from titan_shampoo.distributed.plan import Plan
from titan_shampoo.functional.rule import State
from titan_shampoo.layers.layer import Layer
from titan_shampoo.layers.optimizer import LayerOptimizer
from titan_shampoo.library_optimizer import LibraryOptimizer
from titan_shampoo.statistics import TappedLayer

# Methods for blocks


def plan_of(optimizer: Any) -> Plan:
    """The blocks of an optimizer and their owners; also that of FOOF and K-FAC."""
    plan: Plan = _inside(optimizer).plan
    return plan


def stacks_of(optimizer: Any) -> list[State]:
    """Live state of the blocks that this rank owns, by stack of equal blocks."""
    stacks: list[State] = _inside(optimizer).state.stacks
    return stacks


def turns_of(optimizer: Any) -> dict[tuple[str, int], int]:
    """The step of the refresh period of each block, by parameter name and number of the block.

    Empty for an optimizer that has no blocks.
    """
    if _inside(optimizer) is None:
        return {}
    plan = plan_of(optimizer)
    return {(plan.params[b.param].name, b.index): b.slot for b in plan.blocks}


def is_compiled(optimizer: BlockOptimizer) -> bool:
    """True if the step of the blocks is compiled."""
    assert optimizer._engine is not None
    return optimizer._engine._compiled


def step_blocks(optimizer: BlockOptimizer, taken: Tensor) -> None:
    """The step of the blocks alone, with the gradients that there are, as a GPU takes it."""
    engine = optimizer._engine
    assert engine is not None
    grads = {number: member.param.grad for number, member in enumerate(engine.members)}
    engine.step({n: grad for n, grad in grads.items() if grad is not None}, taken)


# Methods for layers


def layers_of(optimizer: Any) -> list[Layer]:
    """The layers that this rank steps."""
    layers: list[Layer] = optimizer._step.layers
    return layers


def taps_of(optimizer: LayerOptimizer) -> list[TappedLayer]:
    """The taps of these layers."""
    return optimizer._tapped


def moment_turns_of(optimizer: Any) -> dict[str, int]:
    """The step of the period in which moments of each layer are formed, by the name of its weight.

    Of FOOF and K-FAC; the first step forms all of them.
    """
    names = [layer.name for layer in layers_of(optimizer)]
    return dict(zip(names, optimizer._step.turns, strict=True))


def rates_on_device(optimizer: LayerOptimizer) -> set[tuple[float, ...]]:
    """Numbers of the host that were sent to the device and are kept there."""
    assert optimizer._step is not None
    return set(optimizer._step._constants)


# All methods


def repair(optimizer: LibraryOptimizer) -> None:
    """Repeat failed refreshes in float64, which the next step would do."""
    optimizer._repair()


def read_late(optimizer: Any, late: bool = True) -> None:
    """Have the host read the status of a step in the next one, as it does of accelerators."""
    optimizer._statuses.late = late


def deciding_groups(optimizer: LibraryOptimizer) -> list[dist.ProcessGroup]:
    """Process groups over which ranks agree on whether to take a step."""
    return list(optimizer._deciding_groups)


def kept_tensors(optimizer: Any) -> dict[str, list[Tensor]]:
    """Tensors that are kept from step to step and are no state, by their use."""
    workspace = getattr(_inside(optimizer), "_workspace", None)
    return {} if workspace is None else dict(workspace._kept)


def _inside(optimizer: Any) -> Any:
    """Engine or step of layers; None if there is nothing that the method steps itself."""
    if isinstance(optimizer, BlockOptimizer):
        return optimizer._engine
    return optimizer._step if isinstance(optimizer, LayerOptimizer) else None
