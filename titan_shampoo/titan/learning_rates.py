"""Learning-rate schedules whose only saved state is the step.

torchtitan saves the whole state of the first scheduler, base learning rates included, and loads it
into all. Several optimizers would get the rate of the first one after a resume, and a changed
``lr`` in the TOML file would have no effect. Milestones are this project's addition.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler

_logger = logging.getLogger(__name__)


class LearningRates(LRSchedulersContainer):
    """torchtitan's schedules, one per optimizer; their state is the number of steps done.

    Args:
        built: Schedules that torchtitan made from the job configuration.
    """

    def __init__(self, built: LRSchedulersContainer) -> None:
        """Take over the schedules of ``built``."""
        self.schedulers = built.schedulers

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps done, the same for all."""
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set every learning rate to the TOML file's value for the next step."""
        for scheduler in self.schedulers:
            last_epoch = scheduler.last_epoch = state_dict["last_epoch"]
            factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            rates = [base * factor(last_epoch) for base, factor in factors]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates


def build_learning_rates(
    optimizers: OptimizersContainer, config: LRScheduler, num_steps: int
) -> LearningRates:
    """Return the schedule of every optimizer: torchtitan's, or warmup and milestones."""
    if config.milestones:
        return LearningRates(LRSchedulersContainer(optimizers, _falling_at_milestones(config)))
    last = num_steps if config.total_steps is None else config.total_steps
    if config.warmup_steps > last and (not dist.is_initialized() or dist.get_rank() == 0):
        _logger.warning(
            "lr_scheduler.warmup_steps = %s is more than all %s steps: the learning rate rises "
            "until the end",
            config.warmup_steps,
            last,
        )
    return LearningRates(build_lr_schedulers(optimizers, config, num_steps))


def _falling_at_milestones(config: Any) -> Callable[[int], float]:  # noqa: ANN401 - merged dataclass
    """Return the factor of the learning rate after so many steps."""
    warmup_steps = config.warmup_steps

    def factor(num_done: int) -> float:
        warmed_up = min((num_done + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
        return float(warmed_up * config.factor ** bisect_right(config.milestones, num_done))

    return factor
