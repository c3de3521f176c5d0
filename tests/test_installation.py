"""The wheel holds the library alone and needs torch and numpy alone; the rest is one clear line."""

import email.message
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import titan_shampoo
from tests.support.ranks import PATIENCE
from titan_shampoo.extras import TRAIN

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]
METHODS = ["Shampoo", "SOAP", "KLShampoo", "Eva", "EvaF", "EvaS", "FOOF", "KFAC"]

BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools puts words of its own there
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""

THREE_STEPS = """
import torch
import titan_shampoo

for name in sys.argv[1:]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    before = model[0].weight.detach().clone()
    optimizer = getattr(titan_shampoo, name)(model, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
    weight = model[0].weight.detach()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)
    print(name)
"""


def python(program: str, *args: str, python: str = sys.executable, folder: Path = ROOT):
    """Result of a program that sees nothing of the environment and no site-packages."""
    return subprocess.run(
        [python, "-I", "-c", program, *args], cwd=folder, capture_output=True, text=True,
        timeout=PATIENCE, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, in which a build may leave what it likes."""
    folder = tmp_path_factory.mktemp("source") / "project"
    made = (".?*", "*.egg-info", "__pycache__", "build", "dist", "outputs", "shared")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made))
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    done = python(BUILD, str(folder), folder=source)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: those of the wheel, torch, numpy and what these two require."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for found in required({"torch", "numpy"}):
        for part in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / part).exists():
                (folder / part).symlink_to(Path(str(found.locate_file(part))))
    return folder


def required(names: set[str]) -> Iterator[metadata.Distribution]:
    """The packages of these names, and all that they require on this machine."""
    waiting, seen = [*names], set(names)
    while waiting:
        found = metadata.distribution(waiting.pop())
        yield found
        for line in found.requires or ():
            needed = Requirement(line)
            name = canonicalize_name(needed.name)
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if applies and name not in seen:
                seen.add(name)
                waiting.append(name)


def in_bare(installed: Path, program: str, *args: str):
    """Run a program where nothing but ``installed`` and the standard library can be imported."""
    start = f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; \
sys.path.insert(0, {str(installed)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + program, *args], cwd=installed,
        capture_output=True, text=True, timeout=PATIENCE, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    ours = {file.relative_to(ROOT).as_posix() for file in (ROOT / "titan_shampoo").rglob("*.py")}
    assert {*names} == ours | {"titan_shampoo/py.typed"}


def test_the_wheel_requires_torch_without_an_upper_bound_and_numpy_alone(wheel: Path) -> None:
    lines = metadata_of(wheel).get_all("Requires-Dist") or []
    needed = [line for line in lines if "extra ==" not in line]
    assert sorted(needed) == ["numpy>=1.26", "torch>=2.11"]


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    told = metadata_of(wheel)
    assert {*told.get_all("Provides-Extra", [])} == {*EXTRAS}
    assert told["License-Expression"] == "BSD-3-Clause"
    assert told["Requires-Python"] == ">=3.11"
    assert told["Description-Content-Type"] == "text/markdown"
    for field in ("Summary", "Keywords", "Classifier", "License-File", "Author"):
        assert told[field], field


def test_there_is_one_version(wheel: Path) -> None:
    assert metadata_of(wheel)["Version"] == titan_shampoo.__version__
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited
    assert cited[1] == titan_shampoo.__version__


def test_the_source_distribution_holds_the_whole_project(built: Path, source: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ["tests", "docs", "configs", "examples", "benchmarks", "parallel", "checkpoint"]
    wanted = [path for folder in folders for path in (source / folder).rglob("*")]
    wanted += [source / "train.py", source / "Makefile", source / "constraints.txt"]
    wanted += [source / ".ci/run", source / "titan_shampoo/py.typed", *source.glob("*.md")]
    assert {path.relative_to(source).as_posix() for path in wanted} - names == set()


def test_every_optimizer_trains_where_only_torch_and_numpy_are_installed(installed: Path) -> None:
    done = in_bare(installed, THREE_STEPS, *METHODS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == METHODS


PROGRAMS = {
    "python -m titan_shampoo.plot RUN": "a plot needs matplotlib",
    "python -m titan_shampoo.config --reference": (
        "python -m titan_shampoo.config needs tomli, torchtitan"
    ),
    "python -m checkpoint inspect RUN": "python -m checkpoint needs safetensors, xxhash, tqdm",
    "python train.py --help": "train.py needs torchtitan, safetensors, datasets, huggingface-hub",
}


@pytest.mark.parametrize("command", PROGRAMS)
def test_a_program_without_its_packages_ends_in_one_line(
    command: str, installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.0, "loss": 3.0}\n')
    words = command.replace("RUN", str(tmp_path)).split()
    if words[1] == "-m":
        call = f"runpy.run_module({words[2]!r}, run_name='__main__', alter_sys=True)"
        args = words[3:]
    else:
        call, args = "runpy.run_path('train.py', run_name='__main__')", words[2:]
    # checkpoint and train.py are those of the checkout, titan_shampoo that of the wheel.
    start = f"import os, runpy; os.chdir({str(ROOT)!r}); sys.path.append({str(ROOT)!r}); "
    done = in_bare(installed, start + call, *args)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(PROGRAMS[command])
    assert line.endswith(": pip install 'titan-shampoo[train]'")


def test_the_training_stack_names_its_packages_when_it_is_imported(installed: Path) -> None:
    done = in_bare(installed, "import titan_shampoo.titan")
    line = done.stderr.splitlines()[-1]
    assert "titan_shampoo.titan needs torchtitan, " in line
    assert line.endswith(": pip install 'titan-shampoo[train]'")


def requirements(extra: str) -> list[Requirement]:
    return [Requirement(line) for line in EXTRAS[extra]]


def test_the_modules_that_are_looked_for_are_those_of_the_extra() -> None:
    # triton comes with most builds of torch, whose own range is not a package to install.
    named = {canonicalize_name(needed.name) for needed in requirements("train")}
    assert named - {"torch", "triton"} == {canonicalize_name(name) for name in TRAIN.values()}


def test_constraints_pin_one_public_version_of_each_package() -> None:
    names = [canonicalize_name(pin.name) for pin in CONSTRAINTS]
    assert len(names) == len({*names})
    for pin in CONSTRAINTS:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        assert (pin.url, pin.extras, pin.marker) == (None, set(), None), pin


def test_constraints_fit_what_the_project_requires() -> None:
    pins = {
        canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("=="))
        for pin in CONSTRAINTS
    }
    needed = [Requirement(line) for line in PROJECT["dependencies"]]
    needed += [line for extra in ("train", "test", "lint") for line in requirements(extra)]
    for requirement in needed:
        if requirement.name != "triton":  # torch says which
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


@pytest.mark.slow
def test_the_wheel_installs_into_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """With pip, as configured here; skipped where no index can be reached."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    own = str(tmp_path / "venv/bin/python")
    extra_index = os.environ.get("TORCH_INDEX_URL")
    options = ["--extra-index-url", extra_index] if extra_index else []
    done = subprocess.run(
        [own, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"),
         *options, str(wheel)], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if re.search(r"No matching distribution|Connection|Temporary failure", done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    subprocess.run([own, "-m", "pip", "check"], check=True)
    trained = python("import sys\n" + THREE_STEPS, *METHODS, python=own, folder=tmp_path)
    assert trained.stdout.split() == METHODS, trained.stderr
    absent = python("import torchtitan", python=own, folder=tmp_path)
    assert "No module named 'torchtitan'" in absent.stderr
