"""Learning-rate schedules that are resumed by their step alone.

torchtitan saves the first scheduler's whole state, base learning rates included, and loads it into
all: several optimizers would come back with the first one's rate, and a changed ``lr`` in the TOML
file would be undone.
"""

from typing import Any

from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler


class LearningRates(LRSchedulersContainer):
    """torchtitan's schedules, one per optimizer, whose state is the number of steps done.

    Args:
        built: What torchtitan made of the job configuration.
    """

    def __init__(self, built: LRSchedulersContainer) -> None:
        """Take over the schedules of ``built``."""
        self.schedulers = built.schedulers

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps done, the same for all."""
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set every learning rate to what the TOML file says for the step after."""
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
    """Return torchtitan's warmup, constant and decay schedule for every optimizer."""
    return LearningRates(build_lr_schedulers(optimizers, config, num_steps))
