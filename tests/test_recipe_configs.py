"""Every file in configs/ passes the checks, with the overrides that it documents."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import PATIENCE, run_on_ranks
from tests.support.titan_runs import records, train_all
from titan_shampoo.config import check_world, read_config
from titan_shampoo.config.reference import reference_page
from titan_shampoo.plot import main as plot

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.toml"))
LLAMAS = [name for name in CONFIGS if name.startswith("llama3")]
PLANNED = ["transformer_debug.toml", *LLAMAS]


def arguments(name):
    return ["--job.config_file", str(ROOT / "configs" / name)]


def documented_meshes(name):
    """The overrides that the first lines of a configuration show, by what they call them."""
    text = (ROOT / "configs" / name).read_text()
    found = re.findall(r"^#   (\w[\w ]+?)  +(--.*(?:\n# {10,}--.*)*)", text, re.MULTILINE)
    return {mesh: overrides.replace("#", "").split() for mesh, overrides in found}


def cells(line):
    """What stands in the columns of a line of a comment."""
    return re.split(r" {2,}", line.removeprefix("#").strip())


def documented_plans(name):
    """For each mesh and method in the first lines of a configuration: ranks, and what it shows."""
    text = (ROOT / "configs" / name).read_text().partition("`python train.py --plan ")[2]
    begin = re.match(r"--world-size (\d+)`(?: \((\w+): (\d+)\))?", text)
    assert begin, f"{name} has no figures"
    ranks, special, of_special = begin.groups()
    methods, *rows = [cells(line) for line in text.split("\n\n")[0].splitlines()[3:]]
    return {
        (mesh, method): (of_special if mesh == special else ranks, figures)
        for mesh, *shown in rows
        for method, figures in zip(methods, shown, strict=True)
    }


def every_documented_plan():
    for name in PLANNED:
        for (mesh, method), (ranks, figures) in documented_plans(name).items():
            overrides = [*documented_meshes(name).get(mesh, []), "--optimizer.name", method]
            plan = f"{name}-{mesh}-{method}"
            yield pytest.param(name, overrides, ranks, figures, id=plan)


def planned(name, overrides, ranks):
    """What ``--plan`` says, for programs."""
    said = subprocess.run(
        [sys.executable, "train.py", "--plan", "--json", "--world-size", ranks, *arguments(name),
         *overrides],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True, timeout=PATIENCE,
    ).stdout  # fmt: skip
    return json.loads(said)["stages"]


def of_busiest_rank(stages, *rows):
    """Sum of the rows that end so, on the rank that has most."""
    sums = [
        sum(of_rank)
        for stage in stages
        for of_rank in zip(
            *[of for row, of in stage["per_rank"].items() if row.endswith(rows)], strict=True
        )
    ]
    return max(sums)


UNITS = {"MiB": 2**20, "GiB": 2**30, "GFLOP": 1e9, "TFLOP": 1e12}


def number(figure):
    value, unit = figure.split()
    return float(value) * UNITS[unit]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("world_size", [2, 8])
def test_every_configuration_passes_the_checks(name, world_size):
    check_world(read_config(arguments(name)), world_size)


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("method", ["SOAP", "KLShampoo", "EvaF", "AdamW"])
def test_a_transformer_changes_its_method_by_name_alone(name, method):
    check_world(read_config([*arguments(name), "--optimizer.name", method]), 8)


def test_the_meshes_documented_for_8b_fit_64_ranks():
    meshes = documented_meshes("llama3_8b.toml")
    assert set(meshes) == {"HSDP", "FSDP x TP", "PP x FSDP", "70B"}
    for overrides in meshes.values():
        check_world(read_config([*arguments("llama3_8b.toml"), *overrides]), 64)


def test_every_configuration_names_itself_in_its_command():
    for name in CONFIGS:
        assert f"configs/{name}" in (ROOT / "configs" / name).read_text()


def test_the_reference_page_is_that_of_the_tables():
    assert (ROOT / "docs/reference.md").read_text() == reference_page()


def test_runs_are_drawn_beside_each_other(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            '{"step": 1, "seconds": 2.0, "loss": 3.0}\n'
            '{"step": 1, "seconds": 2.5, "validation_loss": 3.0}\n{"st'
        )
    output = tmp_path / "both.png"
    plot([str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(output)])
    assert output.read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out == f"{output}\n"


def test_a_run_without_records_is_refused_by_its_path(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        plot([str(tmp_path)])
    assert f"{tmp_path / 'metrics.jsonl'}: no records of a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if "debug" in name or "digits" in name])
def test_small_configurations_train_three_steps(name, tmp_path):
    dump = ["--job.dump_folder", str(tmp_path / "run"), "--validation.steps", "1"]
    steps = ["--training.steps", "3", "--training.local_batch_size", "2"]
    args = [*arguments(name), *dump, "--metrics.log_freq", "1"]
    run_on_ranks(2, train_all, [[*args, *steps]])
    assert set(records(tmp_path, "run", "loss")) == {1, 2, 3}


def test_first_lines_have_figures_of_every_method_and_of_every_mesh():
    for name in PLANNED:
        meshes = ["FSDP2", *documented_meshes(name)]
        methods = ["Shampoo", "SOAP", "EvaF", "AdamW"]
        wanted = [(mesh, method) for mesh in meshes for method in methods]
        assert list(documented_plans(name)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "ranks", "figures"), list(every_documented_plan())
)  # fmt: skip
def test_documented_figures_are_those_of_the_planner(name, overrides, ranks, figures):
    stages = planned(name, overrides, ranks)
    memory, *work = map(number, figures.split(", "))
    assert max(max(stage["memory"]) for stage in stages) == pytest.approx(memory, rel=0.02)
    if work:
        flops = of_busiest_rank(stages, "arithmetic in every step", "refreshes, per step")
        sent = of_busiest_rank(stages, "sent in a step")
        assert [flops, sent] == pytest.approx(work, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in PLANNED])
def test_every_other_configuration_is_planned_for(name):
    assert all(min(stage["memory"]) > 0 for stage in planned(name, [], "8"))
