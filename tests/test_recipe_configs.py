"""Every file in configs/ passes the checks, with the overrides that it documents."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks
from tests.titan_runs import records, train_all
from titan_shampoo.config import check_world, read_config
from titan_shampoo.config.reference import reference_page
from titan_shampoo.plot import main as plot

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.toml"))
LLAMAS = [name for name in CONFIGS if name.startswith("llama3")]


def arguments(name):
    return ["--job.config_file", str(ROOT / "configs" / name)]


def documented_meshes(name):
    """The overrides that the first lines of a configuration show, by what they call them."""
    text = (ROOT / "configs" / name).read_text()
    found = re.findall(r"^#   (\w[\w ]+?)  +(--.*(?:\n# {10,}--.*)*)", text, re.MULTILINE)
    return {mesh: overrides.replace("#", "").split() for mesh, overrides in found}


def documented_plans():
    """Configuration, overrides, ranks and memory of every line of figures."""
    for name in LLAMAS:
        text, meshes = (ROOT / "configs" / name).read_text(), documented_meshes(name)
        (ranks,) = re.findall(r"--plan --world-size (\d+)`", text)
        for what, memory, rest in re.findall(
            r"^#   (\w[\w ]+?)  +([\d.]+ [GM]iB) (.*)$", text, re.MULTILINE
        ):
            overrides = meshes.get(what, ["--optimizer.name", what])
            own = re.search(r"on (\d+) ranks", rest)
            yield pytest.param(
                name, overrides, own[1] if own else ranks, memory, id=f"{name}-{what}"
            )


def planned(name, overrides, ranks):
    """What ``--plan`` prints."""
    return subprocess.run(
        [sys.executable, "train.py", "--plan", "--world-size", ranks, *arguments(name), *overrides],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True, timeout=600,
    ).stdout  # fmt: skip


def in_mib(memory):
    number, unit = memory.split()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


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
    run_on_ranks(2, train_all, [[*args, *steps]], timeout=300)
    assert set(records(tmp_path, "run", "loss")) == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides", "ranks", "memory"), list(documented_plans()))
def test_documented_figures_are_those_of_the_planner(name, overrides, ranks, memory):
    said = planned(name, overrides, ranks)
    (found,) = re.findall(r"memory of the busiest rank: ([\d.]+ [GM]iB)", said)
    assert in_mib(found) == pytest.approx(in_mib(memory), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in LLAMAS])
def test_every_other_configuration_is_planned_for(name):
    assert "memory of the busiest rank: " in planned(name, [], "8")
