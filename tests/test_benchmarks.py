"""Every benchmark runs, at its smallest size, and prints what it says that it prints."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    ablation,
    asynchronous_saving,
    autoencoder,
    basis_drift,
    checkpoint_cost,
    checkpoint_planning,
    optimizer_step,
    scaling,
    time_to_target,
    training_step,
)

ROOT = Path(__file__).parents[1]
Printed = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Benchmarks are programs of their own: they set threads and silence what is logged."""
    logger, threads = logging.getLogger("titan_shampoo"), torch.get_num_threads()
    level = logger.level
    torch.manual_seed(0)
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """The lines that have been printed since it was called last."""
    return lambda: capsys.readouterr().out.splitlines()


def test_every_benchmark_has_a_test_here() -> None:
    programs = [
        file.stem
        for file in (ROOT / "benchmarks").glob("*.py")
        if "\ndef main(" in file.read_text(encoding="utf-8")
    ]
    assert len(programs) == 10
    for program in programs:
        assert any(name.startswith(f"test_{program}_") for name in globals()), program


# Steps


def test_optimizer_step_compares_ours_with_adamw_and_the_floor(
    tmp_path: Path, printed: Printed
) -> None:
    file = tmp_path / "steps.json"
    optimizer_step.main(["--workload", "transformer-0.7M", "--block", "64", "--period", "2",
                         "--steps", "2", "--threads", "1", "--json", str(file),
                         "--ours", *optimizer_step.OURS])  # fmt: skip
    rows = json.loads(file.read_text())["rows"]
    names = ["Shampoo", *optimizer_step.OURS, "AdamW", "floor"]
    assert [row["optimizer"] for row in rows] == names
    lines = printed()
    assert len(lines) == 2 + len(rows)
    assert lines[1].split()[3] == "optimizer"
    by_name = {row["optimizer"]: row for row in rows}
    assert by_name["floor"]["/floor"] == by_name["AdamW"]["/AdamW"] == 1.0
    assert by_name["bfloat16"]["state_bytes"] < by_name["Shampoo"]["state_bytes"]


def test_optimizer_step_refuses_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["--workload", "transformer-0.7M", "--block", "64", "--threads", "1"]
    monkeypatch.setitem(sys.modules, "heavyball", None)
    with pytest.raises(SystemExit, match=r"heavyball is missing; install titan-shampoo\[bench\]"):
        optimizer_step.main([*small, "--peers"])
    with pytest.raises(SystemExit, match="has no package distributed_shampoo"):
        optimizer_step.main([*small, "--peer", f"published={tmp_path}"])


def test_training_step_clocks_every_part_that_it_names(tmp_path: Path, printed: Printed) -> None:
    originals = [
        (owner, name, getattr(owner, name))
        for functions in training_step.PARTS.values()
        for owner, name in functions
    ]
    file = tmp_path / "training.json"
    training_step.main(["transformer", "--flavor", "byte_debug", "--tokens", "32", "--sequence",
                        "16", "--methods", "AdamW", "EvaF", "EvaS", "KFAC", "Shampoo", "SOAP",
                        "--rounds", "2", "--part-rounds", "1", "--threads", "1",
                        "--json", str(file)])  # fmt: skip
    assert all(getattr(owner, name) is original for owner, name, original in originals)
    rows = {row["method"]: row for row in json.loads(file.read_text())["rows"]}
    assert set().union(*(row["parts"] for row in rows.values())) == set(training_step.PARTS)
    assert {"factors", "roots", "directions", "move"} <= set(rows["SOAP"]["parts"])
    assert {"statistics", "roots", "directions"} <= set(rows["KFAC"]["parts"])
    assert rows["SGD"]["/SGD"] == 1.0
    assert all(row["size"] == "32 tokens" and row["step_s"] > 0 for row in rows.values())
    assert sum("finite check" in line for line in printed()) == 5  # of the methods that are ours


def test_training_step_takes_small_images_too(printed: Printed) -> None:
    training_step.main(["resnet50", "--images", "2", "--pixels", "32", "--methods", "SGD",
                        "--rounds", "1", "--part-rounds", "0",
                        "--threads", "1"])  # fmt: skip
    assert "2 images of 32" in printed()[-1]


@pytest.mark.slow
def test_scaling_measures_few_ranks_and_plans_for_many(printed: Printed) -> None:
    scaling.main(["--workload", "transformer-0.7M", "--block", "64", "--period", "2",
                  "--periods", "1", "--measured", "2", "--planned", "1", "64"])  # fmt: skip
    lines = printed()
    table = json.loads(lines[-1])
    one, two, many = (
        table[kind][world]["GFLOP per step"]
        for kind, world in (("planned", "1"), ("measured", "2"), ("planned", "64"))
    )
    assert many < two < 0.7 * one
    assert any(line.startswith("CPU s per step") for line in lines)


# Training


def test_autoencoder_tunes_compares_and_races(tmp_path: Path, printed: Printed) -> None:
    common = ["small", "--methods", "AdamW", "--trials", "1", "--tuning-seeds", "1", "--seeds", "1",
              "--check-every", "105", "--json", str(tmp_path / "runs.json")]  # fmt: skip
    autoencoder.main(["tune", *common])
    lines = printed()
    assert [line.split()[0] for line in lines[1:]] == ["SGD", "AdamW"]
    tuned = len(json.loads((tmp_path / "runs.json").read_text())["runs"])
    autoencoder.main(["tune", *common])
    assert printed() == lines
    assert tuned == len(json.loads((tmp_path / "runs.json").read_text())["runs"]) == 2
    autoencoder.main(["compare", *common])
    assert [line.split()[0] for line in printed()[1:]] == ["method", "SGD", "AdamW"]
    autoencoder.main(["race", *common])
    sgd = printed()[2].split()
    assert sgd[0] == "SGD"
    assert sgd[-2] == "210", "it reaches its own last loss in its last step"


def made_up(
    name: str, lr: float, seed: int, losses: Sequence[float], *, speed: float = 0.1,
    extra: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """A run with a validation every ten steps."""
    curve = [
        {"step": step, "seconds": speed * step, "validation_loss": loss,
         "validation_accuracy": 1 - loss / 10}
        for step, loss in zip(range(10, 10_000, 10), losses, strict=False)
    ]  # fmt: skip
    return {"task": "digits", "name": name, "settings": list(extra), "lr": lr, "seed": seed,
            "machine": "made up", "curve": curve}  # fmt: skip


def row_of(lines: Sequence[str], name: str) -> str:
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return " ".join(line.removeprefix(name).split())


def test_time_to_target_says_when_each_method_reached_the_better_reference(
    tmp_path: Path, printed: Printed
) -> None:
    file = tmp_path / "results.json"
    runs = [
        made_up(name, lr, 0, [3.0, 2.0 if lr == 9e-3 else 2.5])
        for name in ("AdamW", "Shampoo", "SOAP")
        for lr in (3e-3, 9e-3, 2.7e-2)
    ]
    for seed in (1, 2):
        runs.append(made_up("AdamW", 9e-3, seed, [2.0, 1.0]))
        runs.append(made_up("Shampoo", 9e-3, seed, [1.5, 0.5], speed=0.2))
        runs.append(made_up("SOAP", 9e-3, seed, [1.5, 1.25 - 0.5 * (seed == 1)]))
    file.write_text(json.dumps(runs))
    time_to_target.main(["--task", "digits", "--results", str(file), "--seeds", "2",
                         "--methods", "AdamW", "Shampoo", "SOAP"])  # fmt: skip
    lines = printed()
    assert json.loads(file.read_text()) == runs, "what is there is not run again"
    assert lines[1] == "target: 1.0000, of AdamW"
    assert row_of(lines, "AdamW") == "0.009 1.0000 ±0.0000 0.9000 20.0 ±0.0 2.0 ±0.0 0.1000"
    assert row_of(lines, "Shampoo") == "0.009 0.5000 ±0.0000 0.9500 15.0 ±0.0 3.0 ±0.0 0.2000"
    assert row_of(lines, "SOAP") == "0.009 1.0000 ±0.3536 0.9000 1 of 2 1 of 2 0.1000"


def test_ablation_takes_the_runs_that_are_missing(tmp_path: Path, printed: Printed) -> None:
    file = tmp_path / "ablation.json"
    extra = ["--training.steps=2", "--training.local_batch_size=8", "--validation.steps=1",
             "--validation.freq=1", "--lr_scheduler.warmup_steps=0"]  # fmt: skip
    runs = [
        made_up("no graft", lr, 0, [2.0 + lr], extra=extra)
        for lr in (0.003, 0.03, 0.3)
    ]  # fmt: skip
    runs.append(made_up("no graft", 0.003, 1, [0.25], extra=extra))
    file.write_text(json.dumps(runs))
    ablation.main(["--task", "digits", "--results", str(file), "--seeds", "1", "--threads", "1",
                   "--variants", "no graft", "grafted to Adam", "--", *extra])  # fmt: skip
    *before, made = json.loads(file.read_text())
    assert before == runs
    assert (made["name"], made["lr"], made["seed"]) == ("grafted to Adam", 0.003, 1)
    assert [point["step"] for point in made["curve"]] == [1, 2]
    lines = printed()
    assert row_of(lines, "no graft").startswith("0.003 0.2500 ±0.0000 0.9750 ±0.0000")
    last = made["curve"][-1]["validation_loss"]
    (table_row,) = (line for line in lines if line.startswith("grafted to Adam") and "±" in line)
    assert f"{last:.4f} ±0.0000" in table_row


def test_basis_drift_tells_how_many_bases_still_hold(printed: Printed) -> None:
    basis_drift.main(["--task", "digits", "--threads", "1", "--period", "2", "--",
                      "--training.steps=8", "--training.local_batch_size=8",
                      "--validation.enable=false"])  # fmt: skip
    table = [line.split() for line in printed()[-3:]]
    assert [int(row[0]) for row in table] == [1, 2, 3]
    for _, refreshes, median, *held in table:
        assert int(refreshes) > 0
        assert 0 < float(median) < 1
        assert held == sorted(held)


def test_the_share_off_the_diagonal_is_that_of_the_definition() -> None:
    matrix = torch.tensor([[3.0, 4.0], [4.0, 3.0]])
    basis = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    shares = basis_drift.off_diagonal_share(
        torch.stack([matrix, matrix, 0 * matrix]), torch.stack([torch.eye(2), basis, basis])
    )
    assert torch.allclose(shares, torch.tensor([0.8, 0.0, 0.0]), atol=1e-3)


# Checkpoints


def last_table(printed: Printed) -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(printed()[-1])
    return table


def test_checkpoint_cost_compares_with_torchs_own_format(tmp_path: Path, printed: Printed) -> None:
    checkpoint_cost.main(["--megabytes", "1", "--repeats", "1", "--folder", str(tmp_path)])
    table = last_table(printed)
    assert table["ranks"] == 2
    assert 1.0 <= table["bytes over ideal"] < 1.2
    assert table["save over native, time"] > 0
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_planning_counts_keys_and_boxes(printed: Printed) -> None:
    config = ROOT / "configs" / "transformer_debug.toml"
    checkpoint_planning.main(["--config", str(config), "--ranks", "2"])
    table = last_table(printed)
    assert 0 < table["keys"] < table["boxes"]
    assert table["manifest, bytes"] > 100 * table["boxes"]


def test_asynchronous_saving_pairs_windows_with_and_without_a_save(
    tmp_path: Path, printed: Printed
) -> None:
    asynchronous_saving.main(["--flavor", "byte_debug", "--ranks", "1", "--tokens", "16",
                              "--warmup", "0", "--steps", "1", "--pairs", "1",
                              "--folder", str(tmp_path)])  # fmt: skip
    table = last_table(printed)
    assert table["transformer"] == "byte_debug"
    assert table["checkpoint, bytes"] > 4 * 870_000
    assert table["with over without"] > 0
    assert list(tmp_path.iterdir()) == []
