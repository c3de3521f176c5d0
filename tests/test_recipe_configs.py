"""Every file in configs/ passes the checks, with the overrides that it documents."""

import re
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
    text = (ROOT / "configs" / name).read_text()
    found = re.findall(r"^#   [A-Z][\w ]+?  +(--.*(?:\n# {10,}--.*)*)", text, re.MULTILINE)
    return [part.replace("#", "").split() for part in found]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("world_size", [2, 8])
def test_every_configuration_passes_the_checks(name, world_size):
    check_world(read_config(arguments(name)), world_size)


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("method", ["SOAP", "KLShampoo", "Eva", "AdamW"])
def test_a_transformer_changes_its_method_by_name_alone(name, method):
    check_world(read_config([*arguments(name), "--optimizer.name", method]), 8)


def test_the_meshes_documented_for_8b_fit_64_ranks():
    meshes = documented_meshes("llama3_8b.toml")
    assert len(meshes) == 3
    for overrides in meshes:
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
    if "digits" in name:
        steps = ["--training.epochs", "0.0084", "--training.local_batch_size", "2"]
    run_on_ranks(2, train_all, [[*args, *steps]], timeout=300)
    assert set(records(tmp_path, "run", "loss")) == {1, 2, 3}
