"""A position in data of another order is refused, kept or left, as the settings say.

And equal seeds give equal runs, to the generators of every library.
"""

import logging
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from checkpoint.command_line import main
from checkpoint.data_order import order_differences
from checkpoint.errors import CheckpointError
from checkpoint.rng import problem, rng_rows
from checkpoint.verify import read_manifest
from tests.support.checkpoint_runs import Counter, run_in
from tests.support.log_lines import Lines
from tests.support.ranks import run_on_ranks
from tests.support.titan_runs import text_run, train_all, trainer_of, write_text
from titan_shampoo.distributed.state import BlockTensor

ORDER = {
    "debug.seed": 1,
    "model.hf_assets_path": "",
    "training.dataset": "words.txt",
    "training.seq_len": 32,
    "training.stream_lanes": 64,
    "training.streaming": False,
    "validation.dataset": "",
}
OTHER = {
    "debug.seed": 2,
    "model.hf_assets_path": "tokenizer",
    "training.dataset": "other.txt",
    "training.seq_len": 64,
    "training.streaming": True,
    "validation.dataset": "held-out.txt",
}


def of(settings, num_samples=None):
    return {"settings": settings, "num_samples": num_samples}


@pytest.mark.parametrize("key", OTHER)
def test_every_setting_that_gives_data_their_order_is_compared(key):
    differing = order_differences(of(ORDER), {**ORDER, key: OTHER[key]}, None)
    assert f"{key}: {ORDER[key]!r} in the checkpoint, {OTHER[key]!r} now" in differing


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"training.stream_lanes": 8},  # of no meaning without a stream
        {"training.local_batch_size": 99},
        {"optimizer.lr": 3.0},
    ],
)
def test_what_leaves_the_order_as_it_is_is_none_of_its_business(same):
    assert order_differences(of(ORDER), ORDER | same, None) == ""


def test_settings_that_mean_the_same_are_the_same_order():
    unset = {**ORDER, "debug.seed": None}
    assert order_differences(of(unset), {**ORDER, "debug.seed": 0}, None) == ""
    held_out = {**ORDER, "validation.dataset": "one.txt"}
    assert order_differences(of(held_out), {**ORDER, "validation.dataset": "two.txt"}, None) == ""
    streamed = {**ORDER, "training.streaming": True}
    assert "stream_lanes" in order_differences(
        of(streamed), {**streamed, "training.stream_lanes": 8}, None
    )


def test_a_data_set_that_has_grown_is_another_order():
    assert "100 samples in the checkpoint, 101 now" in order_differences(of(ORDER, 100), ORDER, 101)
    assert order_differences(of(ORDER, 100), ORDER, 100) == ""
    assert order_differences(of(ORDER), ORDER, 100) == ""  # not recorded, or streamed


# ---- runs


def three_steps(folder):
    with run_in(folder, settings=ORDER) as run:
        run.manager.load()
        run.train(3)


def resumed(folder, settings, config):
    """Lines that are said, the position, and a flag: a refusal left everything as it was."""
    logger, said = logging.getLogger("checkpoint"), Lines()
    logger.setLevel(logging.INFO)
    logger.addHandler(said)
    with run_in(folder, settings=ORDER | settings, load_only=True, **config) as run:
        before = run.local_bytes()
        try:
            run.manager.load()
        except CheckpointError as error:
            return str(error), run.progress.value, run.local_bytes() == before
        return "\n".join(said.lines), run.loader.value, run.progress.value


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(1, three_steps, folder)
    return folder


def resume(folder, settings, **config):
    (found,) = run_on_ranks(1, resumed, folder, settings, config)
    return found


@pytest.mark.parametrize("key", ["debug.seed", "training.dataset", "training.seq_len"])
def test_another_order_is_refused_by_the_key_and_nothing_changes(saved, key):
    said, step, unchanged = resume(saved, {key: OTHER[key]})
    assert f"{saved}/checkpoint/step-3: {key}: {ORDER[key]!r} in the checkpoint" in said
    assert "repeats some samples and misses others" in said
    assert 'checkpoint.data_position = "restart" or "keep"' in said
    assert "\n" not in said
    assert (step, unchanged) == (0, True)
    assert (saved / "checkpoint" / "step-3").is_dir()  # it is good, and not of an older step


def test_the_position_is_kept_or_begun_anew_where_that_is_asked_for(saved):
    said, samples, step = resume(saved, {"debug.seed": 2}, data_position="keep")
    assert (samples, step) == (24, 3)
    assert "debug.seed: 1 in the checkpoint, 2 now: the data come in another order" in said
    assert "some samples may be repeated and some missed" in said
    said, samples, step = resume(saved, {"debug.seed": 2}, data_position="restart")
    assert (samples, step) == (0, 3)
    assert "are read from their beginning" in said


@pytest.mark.parametrize("position", ["refuse", "keep", "restart"])
def test_the_same_order_is_gone_on_with_whatever_is_asked_for(saved, position):
    said, samples, step = resume(saved, {}, data_position=position)
    assert (samples, step) == (24, 3)
    assert "another order" not in said


def test_who_leaves_out_the_position_may_have_other_data(saved):
    _, samples, step = resume(saved, {"debug.seed": 2}, exclude_from_loading=["dataloader"])
    assert (samples, step) == (0, 3)


def restarted_twice(folder):
    """Positions of a run with other data, and of the same run resumed once more."""
    other = {**ORDER, "debug.seed": 2}
    found = []
    for until in (5, 6):
        with run_in(folder, settings=other, data_position="restart") as run:
            run.manager.load()
            run.train(until)
            found.append(run.loader.value)
    return found


def test_data_begin_anew_once_and_the_checkpoints_after_that_are_good(tmp_path):
    run_on_ranks(1, three_steps, tmp_path)
    assert run_on_ranks(1, restarted_twice, tmp_path) == [[16, 24]]
    record = read_manifest(tmp_path / "checkpoint" / "step-6").record
    assert record["begun"]["dataloader"] == {"samples": 16}
    assert record["values"]["dataloader"] == {"samples": 24}


class Stream(Counter):
    """The position in a stream that is cut into lanes."""

    def state_dict(self):
        return {"samples": self.value, "lanes": 64}

    def load_state_dict(self, state):
        assert state["lanes"] == 64
        self.value = state["samples"]


def streamed(folder):
    """Positions at which a run reads on that streams data which were indexed."""
    found = []
    for position in ("keep", "restart"):
        settings = {**ORDER, "training.streaming": True}
        with run_in(folder, settings=settings, load_only=True, data_position=position) as run:
            run.manager._state._values["dataloader"] = stream = Stream("samples")
            run.manager.load()
            found.append(stream.value)
    return found


def test_a_position_may_be_that_of_data_which_were_not_streamed(saved):
    assert run_on_ranks(1, streamed, saved) == [[24, 0]]


SAVING = {
    "checkpoint__enable": True, "checkpoint__interval": 2, "training__steps": 2,
    "optimizer__name": "SGD", "debug__seed": 5,
}  # fmt: skip


def positions(folder):
    """Positions at which real trainers read on with other data, or their refusals."""
    train_all([text_run(folder, "run", **SAVING)])
    found = []
    for change in (
        {"debug__seed": 6},
        {"training__seq_len": 16},
        {"training__dataset": folder / "more.txt"},
        {"debug__seed": 6, "checkpoint__data_position": "keep"},
        {"debug__seed": 6, "checkpoint__data_position": "restart"},
    ):
        args = text_run(folder, "run", **{**SAVING, "checkpoint__load_only": True, **change})
        with trainer_of(args) as trainer:
            try:
                trainer.checkpointer.load()
                found.append(trainer.dataloader.state_dict()["samples"])
            except CheckpointError as error:
                found.append(str(error))
    (folder / "words.txt").write_text((folder / "more.txt").read_text())
    with trainer_of(text_run(folder, "run", **SAVING)) as trainer:
        try:
            trainer.checkpointer.load()
        except CheckpointError as error:
            found.append(str(error))
    return found


def test_real_loaders_go_on_where_they_are_told_to(tmp_path):
    words = write_text(tmp_path).read_text()
    (tmp_path / "more.txt").write_text(words + words)
    first, second = run_on_ranks(2, positions, tmp_path, timeout=240)
    assert first == second
    assert "debug.seed: 5 in the checkpoint, 6 now" in first[0]
    assert "training.seq_len: 32 in the checkpoint, 16 now" in first[1]
    assert "training.dataset: " in first[2]
    assert first[3:5] == [16, 0]
    assert "the data set: " in first[5]  # the same name, another text


# ---- generators


def equal_runs(folder):
    random.seed(), np.random.seed()  # whatever was drawn before
    drawn = []
    for name in ("one", "two"):
        with trainer_of(text_run(folder, name, **SAVING)) as trainer:
            drawn.append((random.random(), np.random.random(), torch.rand(1).item()))
            trainer.train()
    return drawn


def test_equal_runs_do_not_differ_in_anything(tmp_path, capsys):
    write_text(tmp_path)
    ranks = run_on_ranks(2, equal_runs, tmp_path, timeout=240)
    assert all(one == two for one, two in ranks)
    assert ranks[0] == ranks[1]  # no rank is another stage of a pipeline
    places = [str(tmp_path / name / "checkpoint" / "step-2") for name in ("one", "two")]
    assert main(["diff", *places]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  no difference"


def stages(folder):
    settings = {**SAVING, "parallelism__pipeline_parallel_degree": 2,
                "parallelism__pipeline_parallel_schedule": "1F1B"}  # fmt: skip
    found = []
    for seed in (5, 6):
        with trainer_of(text_run(folder, f"{seed}", **settings | {"debug__seed": seed})):
            found.append((random.random(), np.random.random(), torch.rand(1).item()))
    return found


def test_stages_of_a_pipeline_draw_other_numbers_as_torch_does(tmp_path):
    write_text(tmp_path)
    drawn = [pair for rank in run_on_ranks(2, stages, tmp_path, timeout=240) for pair in rank]
    for library in zip(*drawn, strict=True):
        # Rank 1 of seed 5 is rank 0 of seed 6: stages count up from the seed.
        assert len({*library}) == 3
        assert library[1] == library[2]


def damaged_states():
    found = []
    for name in ("torch", "python", "numpy"):
        rows = rng_rows(dist.get_rank(), 1)
        found.append(problem(rows))
        row = rows[f"rng.{name}"]
        assert isinstance(row, BlockTensor)
        (chunk,) = row.chunks.values()
        chunk.fill_(77 if name == "torch" else -1)
        found.append(problem(rows))
    return found


def test_a_state_that_no_generator_takes_is_noticed_before_any_takes_it():
    (found,) = run_on_ranks(1, damaged_states)
    assert found[::2] == [None] * 3
    for name, said in zip(("torch", "python", "numpy"), found[1::2], strict=True):
        assert said.startswith(f"rng.{name}: no state of a generator: ")
