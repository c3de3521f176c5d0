"""What a run reports to Weights & Biases, seen by a stand-in for the package."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import text_run, train_all, write_text


class Recorder(ModuleType):
    """Takes the calls that the package has."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.run: Any = None
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def init(self, *, config, **_):
        self.run, self.config = object(), config

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished = True


def train_and_report(args):
    recorder = sys.modules["wandb"] = Recorder()
    train_all([args])
    return recorder.config, recorder.logged, recorder.finished


@pytest.mark.slow
def test_one_rank_reports_settings_training_and_validation_by_step(tmp_path):
    write_text(tmp_path)
    args = text_run(
        tmp_path, "run", metrics__enable_wandb=True, training__steps=3, optimizer__name="Shampoo",
        validation__enable=True, validation__freq=3, validation__steps=1,
        validation__local_batch_size=2,
    )  # fmt: skip
    (config, logged, finished), (nothing, silent, _) = run_on_ranks(2, train_and_report, args)
    assert not nothing
    assert not silent
    assert finished
    assert config["optimizer"]["name"] == "Shampoo"
    trained = {step: metrics for step, metrics in logged if "loss" in metrics}
    assert list(trained) == [1, 2, 3]
    assert {"grad_norm", "lr", "optimizer_share", "failed_refreshes"} <= trained[2].keys()
    assert any("validation_perplexity" in metrics for _, metrics in logged)
