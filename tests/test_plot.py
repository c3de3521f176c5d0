"""Plots of runs show what was recorded, and its end."""

import math
from pathlib import Path

from matplotlib.image import imread

from titan_shampoo.plot import draw, limits


def run(*losses, key="validation_loss"):
    return [{"step": n, "seconds": 0.5 * n, key: loss} for n, loss in enumerate(losses, 1)]


def size_of(file: Path) -> tuple[int, int]:
    height, width, _ = imread(file).shape
    return height, width


def test_a_loss_that_no_run_has_gets_no_row(tmp_path):
    training = [*run(3.0, 2.0, key="loss"), *run(3.0, 2.0)]
    draw({"one": run(3.0, 2.0), "other": run(3.0, 1.0)}, tmp_path / "one.png")
    draw({"one": training, "other": run(3.0, 1.0)}, tmp_path / "two.png")
    height, width = size_of(tmp_path / "one.png")
    assert size_of(tmp_path / "two.png") == (2 * height, width)


def test_the_first_fall_does_not_hide_what_follows():
    runs = [run(600.0, *[2.0] * 10, 1.0), run(6.0, *[3.0] * 11)]
    found = limits(runs, "validation_loss")
    assert found is not None
    low, high = found
    assert 0.8 < low < 1.0
    assert 3.0 < high < 3.2


def test_runs_that_diverge_leave_the_others_visible():
    runs = [run(3.0, 2.0, math.inf, math.nan), run(3.0, 1.0)]
    found = limits(runs, "validation_loss")
    assert found is not None
    assert all(map(math.isfinite, found))


def test_of_nothing_recorded_there_are_no_limits():
    assert limits([run(1.0, key="loss"), []], "validation_loss") is None
