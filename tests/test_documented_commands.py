"""Every command that README.md, CONTRIBUTING.md and docs/ show works: each has a rule here.

A rule says how a command is tried: what needs a cluster, a GPU, a download or hours has its
settings checked as the run itself would; what is short is run. A command without a rule fails.
"""

import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.run import get_args_parser

from checkpoint.command_line import main as checkpoint
from tests.support.ranks import PATIENCE, run_on_ranks
from tests.support.titan_runs import text_run, train_all, write_text
from tests.support.train_script import start_on_ranks
from titan_shampoo.config import check_world, read_config, read_plan_request
from titan_shampoo.config.command_line import read_command_line
from titan_shampoo.plot import main as plot

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAM = r"(?:\.venv/bin/)?(?:torchrun|python|pytest)\b|make\b|srun\b"


def joined(text: str) -> str:
    return re.sub(r"\\\n\s*", "", text)


def commands_of(page: Path) -> Iterator[str]:
    """The command lines in blocks of code, fenced or indented, and between backticks."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in joined(block).splitlines()]
    lines += [line.strip() for line in re.findall(r"^    \S.*$", text, re.MULTILINE)]
    lines += re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        if re.match(PROGRAM, line) and " " in line:
            yield re.split(r"\s+#|\s{5,}", line)[0]


def all_commands() -> list[tuple[str, str]]:
    found = [(page.name, command) for page in PAGES for command in commands_of(page)]
    return list(dict.fromkeys(found))


COMMANDS = all_commands()


def filled(command: str, folder: Path) -> list[str]:
    """The words of a command with places that exist for those that it invents."""
    for name in ("/shared/llama3-tokenizer", "/models/llama2-tokenizer", "/data/imagenet"):
        (folder / Path(name).name).mkdir(exist_ok=True)
        command = command.replace(name, str(folder / Path(name).name))
    command = re.sub(r"\s\[[^\]]*\]", "", command)  # what a usage line marks as optional
    command = command.replace("FILE", "configs/transformer_debug.toml")
    command = command.replace("$SLURM_NNODES", "4").replace("$SLURM_JOB_ID", "1")
    return shlex.split(command.replace("$head", "node0"))


def check_run(words: list[str], folder: Path) -> None:
    """The launcher's options exist, and the settings are right for that many ranks."""
    programs = [Path(word).name in ("torchrun", "parallel.launch") for word in words]
    options = words[programs.index(True) + 1 :]
    given = get_args_parser().parse_args(options)
    assert given.training_script == "train.py"
    ranks = int(given.nnodes.split(":")[-1]) * int(given.nproc_per_node)
    check_world(read_config(given.training_script_args), ranks)


def check_make(words: list[str], folder: Path) -> None:
    """make knows the target, and what it would start is right."""
    made = subprocess.run(
        ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if words[1] == "train":
        started = joined(made.stdout).splitlines()[-1]
        check_world(read_config(shlex.split(started.partition("train.py ")[2])), 2)


def check_plan(words: list[str], folder: Path) -> None:
    request, args = read_plan_request(words[2:], 1)
    assert request is not None
    check_world(read_config(args), request.world_size)


def check_help(words: list[str], folder: Path) -> None:
    """The module has all these options; what follows ``--`` are those of train.py."""
    if words[2] != "tests.soak.crashes":  # which takes none
        shown = python(*words[1:3], "--help")
        end = words.index("--") if "--" in words else len(words)
        for word in words[3:end]:
            assert not word.startswith("--") or f"{word} " in shown
        read_command_line(words[end + 1 :])


def check_plot(words: list[str], folder: Path) -> None:
    args = [word for word in words[3:] if word not in ("RUN",)] or ["outputs/one"]
    output = args.index("--output") if "--output" in args else len(args)
    for run in args[:output]:
        (folder / run).mkdir(parents=True)
        (folder / run / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.0, "loss": 3.0}\n')
    with contextlib.chdir(folder):
        plot(args)


def check_checkpoint(words: list[str], folder: Path) -> None:
    """The command exists; what it does is tried by the slow test below."""
    with pytest.raises(SystemExit, match="0"):
        checkpoint([*words[3:], "--help"])


def check_tests(words: list[str], folder: Path) -> None:
    """The tests are there, and the rest of the line is pytest's."""
    files = [word for word in words if word.endswith(".py")]
    assert files
    assert all((ROOT / file).is_file() for file in files)
    assert {*words} - {*files} <= {"pytest", "-m", "slow", "slow or not slow"}


def check_reference(words: list[str], folder: Path) -> None:
    assert python(*words[1:4]) == (ROOT / "docs/reference.md").read_text()


def check_api(words: list[str], folder: Path) -> None:
    """The page is what the docstrings say now."""
    page = runpy.run_path(str(ROOT / words[1]))["page"]()
    assert page == (ROOT / "docs/api.md").read_text(), "run python docs/make_api.py > docs/api.md"


def check_nothing(words: list[str], folder: Path) -> None:
    """A command with dots for what is up to the reader, or one that a test of its own runs."""


RULES = [
    (r".*\.\.\.$", check_nothing),
    (r".* window\.toml$", check_nothing),  # tests/test_own_recipe.py
    (r"torchrun --max-restarts=3$", check_nothing),
    (r"make ", check_make),
    (r"(srun .*|\.venv/bin/)?(torchrun|python -m parallel\.launch) .*train\.py ", check_run),
    (r"python -m parallel\.launch$", check_nothing),
    (r"(\.venv/bin/)?python train\.py --plan ", check_plan),
    (r"python -m (benchmarks|tests\.soak)\.\w+", check_help),
    (r"(\.venv/bin/)?python -m titan_shampoo\.plot ", check_plot),
    (r"(\.venv/bin/)?python -m checkpoint \w+", check_checkpoint),
    (r"python -m titan_shampoo\.config --reference", check_reference),
    (r"python docs/make_api\.py", check_api),
    (
        r"(\.venv/bin/)?python -m (build|twine|pip|venv) ?",
        check_nothing,
    ),  # tests/test_installation.py
    (r"(\.venv/bin/)?python examples/\w+\.py", check_nothing),  # tests/test_examples.py
    (r"pytest ", check_tests),
]


def python(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=True,
        timeout=PATIENCE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout


def rule_of(command: str):
    return next((rule for pattern, rule in RULES if re.match(pattern, command)), None)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_documented_command_has_a_rule(page, command):
    assert rule_of(command), f"{page} shows `{command}`: say in RULES how it is tried"


def names_of_slow() -> list[str]:
    return [command for _, command in COMMANDS if rule_of(command) is check_help]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_documented_command_is_right(page, command, tmp_path, monkeypatch):
    if rule_of(command) is check_help:
        pytest.skip("imports torch anew: tried by the slow test")
    monkeypatch.chdir(ROOT)
    rule_of(command)(filled(command, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", names_of_slow())
def test_a_documented_measurement_has_its_options(command, tmp_path):
    check_help(filled(command, tmp_path), tmp_path)


SHORT = {
    "--training.steps": "2",
    "--lr_scheduler.warmup_steps": "1",
    "--training.local_batch_size": "2",
    "--validation.steps": "1",
    "--validation.local_batch_size": "2",
}


def short_runs() -> list[str]:
    return [
        command
        for _, command in COMMANDS
        if re.match(r"make train|\.venv/bin/torchrun", command) and "..." not in command
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", short_runs())
def test_a_documented_run_trains(command, tmp_path):
    words = filled(command, tmp_path)
    if words[0] == "make":
        made = subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
        )
        words = shlex.split(joined(made.stdout).splitlines()[-1])
    args = words[words.index("train.py") + 1 :]
    short = [word for pair in SHORT.items() for word in pair]
    ends = start_on_ranks(
        2, [*args, *short, "--job.dump_folder", str(tmp_path / "run")], tmp_path, timeout=PATIENCE
    )
    assert [end.exit_code for end in ends] == [0, 0], ends[0].error
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_the_documented_plan_is_printed():
    (command,) = [c for _, c in COMMANDS if c.startswith(".venv/bin/python train.py --plan")]
    shown = python(*shlex.split(command)[1:])
    assert shown.startswith("llama3 8B, 8,030,261,248 parameters, on 64 ranks")


@pytest.mark.slow
def test_the_documented_example_of_a_plan_is_what_the_planner_says():
    page = (ROOT / "docs/planning.md").read_text()
    (example,) = re.findall(r"```\n(llama3 8B.*?)```", page, re.DOTALL)
    (settings,) = re.findall(r"\(`(configs/\S+)` with `(--\S+ \d+)`\)", page)
    said = python("train.py", "--plan", "--world-size", "512", "--job.config_file", settings[0],
                  *settings[1].split())  # fmt: skip
    assert [line for line in example.splitlines() if line not in (*said.splitlines(), "...")] == []


@pytest.mark.slow
def test_the_documented_commands_for_checkpoints_work_one_after_the_other(tmp_path, monkeypatch):
    write_text(tmp_path)
    saving = {"checkpoint__enable": True, "checkpoint__interval": 10, "training__steps": 30}
    dump = "outputs/transformer_debug"
    run_on_ranks(2, train_all, [text_run(tmp_path, dump, **saving)])
    (tmp_path / "checkpoint").symlink_to(tmp_path / dump / "checkpoint")
    monkeypatch.chdir(tmp_path)
    # The flavour is that of the run above.
    commands = [c.replace("8B", "byte_debug") for _, c in COMMANDS if "-m checkpoint" in c]
    codes = {
        command: checkpoint(shlex.split(command.partition("checkpoint ")[2]))
        for command in commands
    }
    different = {command for command, code in codes.items() if code}
    assert all(" diff " in command for command in different)
    assert max(codes.values()) <= 1
    assert (tmp_path / "begin").is_dir()


class Small(nn.Module):
    """What the snippets of the documentation call ``model``: the layer that one names, experts."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.ModuleDict({"wq": nn.Linear(4, 2)})
        self.layers = nn.ModuleList([nn.ModuleDict({"attention": attention})])
        self.experts = nn.Parameter(torch.randn(2, 3, 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.get_submodule("layers.0.attention.wq")(inputs)
        return torch.cat([hidden @ expert.mT for expert in self.experts])


def snippets() -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(
            r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
        )
    ]


@pytest.mark.parametrize("page", sorted({page for page, _ in snippets()}))
def test_the_python_of_a_page_runs_from_top_to_bottom(page):
    torch.manual_seed(0)
    model = Small()

    class Loss:
        """A loss that can be asked for its gradient."""

        def backward(self):
            model(torch.randn(4, 4)).square().sum().backward()

    names: dict[str, Any] = {"model": model, "loss": Loss(), "torch": torch}
    for name, block in snippets():
        if name == page:
            if "optimizer" in names and "optimizer =" not in block:
                names["loss"].backward()
                names["optimizer"].step()
            exec(block, names)
