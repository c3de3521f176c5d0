"""Ranks that do not fit together are refused in a sentence, on all of them, before they hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.ranks import PATIENCE, run_on_ranks
from titan_shampoo.config import ConfigError, check_launch
from titan_shampoo.titan import environment
from titan_shampoo.titan.config import JobConfig

ROOT = Path(__file__).parents[1]

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("given", [{}, TORCHRUN, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_one_rank_and_torchrun_may_start(given):
    check_launch(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "4"}, r"RANK: got 4, expected less than WORLD_SIZE \(4\)"),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK: got 2, expected less than LOCAL_WORLD_SIZE \(2\)"),
        ({"MASTER_ADDR": None}, r"MASTER_ADDR: not set, though RANK, .* are; start train.py by"),
        ({"WORLD_SIZE": "four"}, 'WORLD_SIZE: got "four", expected a whole number'),
    ],
)
def test_an_impossible_environment_is_refused_by_its_variable(changes, message):
    given = {name: value for name, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        check_launch(given)


def test_a_rank_with_an_impossible_environment_ends_in_one_line():
    ended = subprocess.run(
        [sys.executable, "train.py"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | TORCHRUN | {"WORLD_SIZE": "two", "LOCAL_RANK": "0"}, timeout=PATIENCE,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith('environment: WORLD_SIZE: got "two", expected a whole number')
    assert len(ended.stderr.splitlines()) == 1


def test_tasks_of_srun_that_would_train_alone_are_refused():
    with pytest.raises(ConfigError, match="one of 16 tasks of srun"):
        check_launch({"SLURM_STEP_NUM_TASKS": "16"})


def test_another_version_is_named_with_its_ranks_and_host():
    facts = [
        {"host": f"node{rank // 2}", "torch": "2.13" if rank < 2 else "2.11"} for rank in range(4)
    ]
    assert environment.disagreement(facts) == (
        "the ranks differ in torch: 2.13 on ranks 0, 1 (node0), 2.11 on ranks 2, 3 (node1); "
        "make it the same on all nodes"
    )
    assert environment.disagreement([{"host": name, "torch": "2.13"} for name in "ab"]) is None


def refusal(check, *args):
    try:
        check(*args)
    except ConfigError as error:
        return str(error)
    return None


def start_with_other_settings(folder):
    config = JobConfig()
    config.job.dump_folder = folder
    rank = dist.get_rank()
    same = refusal(environment.check_environment, config)
    config.training.seq_len = 128 * (1 + rank)
    return same, refusal(environment.check_environment, config)


def test_different_settings_are_refused_on_all_ranks(tmp_path):
    answers = run_on_ranks(2, start_with_other_settings, str(tmp_path))
    assert answers[0] == answers[1]
    assert answers[0][0] is None
    assert "the ranks differ in the setting training.seq_len: 128 on rank 0" in answers[0][1]


def write_apart(folder):
    own = Path(folder) / str(dist.get_rank())
    return refusal(environment.check_shared, own), refusal(environment.check_shared, Path(folder))


def test_a_folder_that_is_not_shared_is_refused_on_all_ranks(tmp_path):
    answers = run_on_ranks(2, write_apart, str(tmp_path))
    for apart, together in answers:
        assert "are not seen on" in apart
        assert together is None
    assert not list(tmp_path.rglob(".seen*"))


def test_ranks_that_do_not_meet_are_told_where_and_what_to_check(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    with (
        pytest.raises(ConfigError, match=r"rank 1 did not meet all 4 ranks at 127.0.0.1:29500 .*"),
        environment.rendezvous_explained(300),
    ):
        raise dist.DistStoreError("timed out")
