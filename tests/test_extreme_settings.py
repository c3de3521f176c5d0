"""Whatever stands in a file, on the command line or in a folder: one line, at once."""

import os
import re
import socket
import time

import pytest
import tomli

from tests.support.train_script import start_on_ranks
from titan_shampoo import plot
from titan_shampoo.config import (
    ConfigError,
    check_dump_folder,
    check_launch,
    check_world,
    read_config,
    read_plan_request,
    started_ranks,
)
from titan_shampoo.config.checks import checked_value
from titan_shampoo.config.errors import one_line
from titan_shampoo.config.patterns import matching_bounded
from titan_shampoo.config.schema import job_schema
from titan_shampoo.config.values import from_text

LONG = "9" * 5000
DEEP = "[" * 100_000

# TOML text, what the message says after the file's name.
FILES = [
    (f"[optimizer]\nlr = {'9' * 400}", ":2: optimizer.lr: got 9{57}..., expected greater than 0"),
    (f"[optimizer]\nlr = -{'9' * 400}", ":2: optimizer.lr: got -9{56}..., expected greater"),
    (f"[optimizer]\nlr = {LONG}", ":2: not valid TOML: an integer of thousands of digits"),
    (f"[optimizer]\nlr = 0x{'f' * 5000}", ":2: optimizer.lr: got 0xf{55}..., expected greater"),
    (f"[optimizer.shampoo]\nbetas = [0x{'f' * 5000}]", ":2: optimizer.shampoo.betas: got a num"),
    ("[optimizer]\nlr = 1e400", ":2: optimizer.lr: got Infinity, expected greater than 0"),
    ("[optimizer]\nlr = 1979-05-27", ':2: optimizer.lr: got "1979-05-27", expected a number'),
    (f"[training]\n\nsteps = {'9' * 400}", ":3: training.steps: got 9{57}..., expected at most"),
    (f"[training]\nsteps = {LONG}", ":2: not valid TOML: an integer of thousands of digits"),
    (
        f"[training]\nsteps = {2**63}",
        f":2: training.steps: got {2**63}, expected at most {2**31 - 1}",
    ),
    (f"[training]\nsteps = {-(2**63)}", f":2: training.steps: got {-(2**63)}, expected at least"),
    (f"[training]\nglobal_batch_size = {2**31}", f":2: training.global_batch_size: got {2**31}"),
    ("[training]\nepochs = 1e300", ":2: training.epochs: got 1e\\+300, expected .* at most 1e9"),
    ("[training.dataloader]\nnum_workers = 100000", ":2: .*num_workers: got 100000, .* to 1024"),
    (f"[debug]\nseed = {2**70}", f":2: debug.seed: got {2**70}, expected at most {2**63 - 1}"),
    (f"[comm]\ninit_timeout_seconds = {2**40}", ":2: comm.init_timeout_seconds: got .* at most"),
    (f"[lr_scheduler]\nmilestones = [1, {2**40}]", ":2: lr_scheduler.milestones: got .* at most"),
    (f"[optimizer.shampoo]\nblock_size = [{2**40}, 8]", ":2: .*block_size: got .* at most"),
    ("[optimizer.soap]\nprecondition_frequency = 100000000", ":2: .*: got 1.*, .* to 1000000"),
    ("[images]\nsize = 1000000", ":2: images.size: got 1000000, expected from 1 to 16384"),
    ('[job]\ndump_folder = "a\\u0000b"', ':2: job.dump_folder: got "a.u0000b", expected text in'),
    (f'[job]\ndump_folder = "{"a" * 5000}"', ":2: job.dump_folder: got .* at most 4095 char"),
    (f'[job]\ndump_folder = "{"a" * 300}"', ":2: job.dump_folder: got .* 255 bytes between two"),
    (f'[job]\ndump_folder = "{"é" * 200}"', ":2: job.dump_folder: got .* 255 bytes between two"),
    (f'[job]\ndump_folder = "{"a/" * 2000}"', ":2: job.dump_folder: a path of more than 3839"),
    ('[job]\ndescription = """a\nb"""', ":2: job.description: got .* expected text in one line"),
    ('[job]\ndescription = "\\u001b[2J"', ":2: job.description: got .* without control char"),
    ('[job]\ndescription = "\\u2028"', ":2: job.description: got .* expected text in one line"),
    ('[checkpoint]\nfolder = "\\u0000"', ":2: checkpoint.folder: got .* without control"),
    ('[checkpoint]\nexclude_from_loading = ["a\\nb"]', ":2: checkpoint.exclude_from_loading: got"),
    (f'[model]\nhf_assets_path = "{"a" * 300}"', ":2: model.hf_assets_path: got .* 255 bytes"),
    (f'[training]\ndataset = "/{"a" * 300}"', ":2: training.dataset: got .* 255 bytes"),
    (f'[training]\ndataset = "{"a" * 300}"\nstreaming = true', ":2: training.dataset: got .* 255"),
    (
        '[training]\ndataset = "~nobody-is-called-so/x.txt"',
        ":2: training.dataset: .*home directory",
    ),
    (
        '[training]\ndataset = "/dev/zero"',
        ':2: training.dataset: "/dev/zero": is neither a file nor',
    ),
    (f"x = {DEEP}", ":1: not valid TOML: nested too deeply"),
    (
        f"[optimizer]\n\nlr = {DEEP}{DEEP.replace('[', ']')}",
        ":3: not valid TOML: nested too deeply",
    ),
    (f"x = {'{a=' * 100_000}", ":1: not valid TOML: nested too deeply"),
    ("\n" + ".".join(["a"] * 100_000) + " = 1", ":2: not valid TOML: nested too deeply"),
    (f"[optimizer]\nlr = {'[' * 300}{']' * 300}", ":2: optimizer.lr: got .*, expected a number"),
    ('"a\\nb" = 1', ": a\\\\nb: unknown table"),
    (f'"{"k" * 100_000}" = 1', ": k+ ... .*valid here|: k+ ... "),
    (f"[training]\nsteps = 1{' ' * 900_000}x", ":2: not valid TOML"),
    (f"[training]\nsteps{' ' * 900_000}x", ":2: not valid TOML"),
    ("[[optimizer.groups]]\npattern = 'a{4294967296}'", ":2: .*pattern: not a regular expression"),
    (f"[[optimizer.groups]]\npattern = '{'(' * 3000}'", ":2: .*pattern: not a regular expression"),
    ("[[optimizer.groups]]\npattern = 'a'\nlr = 1e400", ":3: .*lr: got Infinity"),
]

ARGUMENTS = [
    ([f"--training.steps={LONG}"], "training.steps: got .*, expected an integer"),
    ([f"--training.steps={2**63}"], "training.steps: got .*, expected at most 2147483647"),
    ([f"--debug.seed={2**70}"], "debug.seed: got .*, expected at most 9223372036854775807"),
    ([f"--optimizer.lr={LONG}"], "optimizer.lr: got Infinity, expected greater than 0"),
    (["--optimizer.lr=-nan"], 'optimizer.lr: got NaN, expected a number'),
    ([f"--optimizer.shampoo.betas={DEEP}"], "optimizer.shampoo.betas: got .*, expected a list"),
    ([f"--optimizer.shampoo.betas=[{LONG}]"], "optimizer.shampoo.betas: got .*, expected a list"),
    (["--optimizer.shampoo.betas=,"], 'optimizer.shampoo.betas: got ",", expected a list'),
    (["--job.dump_folder=a\nb"], "job.dump_folder: got .a\\\\nb., expected text in one line"),
    (["--job.dump_folder=\udcff"], "job.dump_folder: got .*, expected text .* in UTF-8"),
    (["--job.dump_folder="], 'job.dump_folder: got "", expected not empty'),
    (["--job.dump_folder=/proc/x"], "job.dump_folder: /proc cannot be written to: .*; set another"),
    (["--job.dump_folder=/dev/null/x"], "job.dump_folder: /dev/null is a file; set another"),
    (["--job.config_file="], 'job.config_file: got "", expected not empty'),
    (["--job.config_file=/dev/zero"], "job.config_file: cannot read /dev/zero: a folder, pipe"),
    (["--job.config_file=\0"], "job.config_file: got .*, expected text in one line"),
    (["--a\nb=1"], "a\\\\nb: unknown table"),
    (["--"], ": unknown table|unknown key"),
    (["--training..steps=3"], "training.: unknown key|unknown"),
    (["\udcff"], "\\\\udcff: settings are written --table.key value"),
    ([""], ": settings are written --table.key value"),
]  # fmt: skip


def accept(args):
    settings = read_config(args)
    check_world(settings, 2)
    check_dump_folder(settings)


def refusal(args):
    """The one line in which a command line is refused, without any delay."""
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        accept(args)
    assert time.process_time() - start < 5
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1300
    return message


@pytest.mark.parametrize(("text", "said"), FILES, ids=range(len(FILES)))
def test_an_extreme_file_is_one_line_with_place_and_key(tmp_path, text, said):
    file = tmp_path / "run.toml"
    file.write_text(text)
    message = refusal(["--job.config_file", str(file)])
    assert re.match(re.escape(str(file)) + said, message), message


@pytest.mark.parametrize(("args", "said"), ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_an_extreme_argument_is_one_line_with_its_key(args, said):
    message = refusal(args)
    assert re.match(f"command line: ({said})", message), message


# Values of every type, in TOML, which no key of another type may take.
VALUES = [
    "-1", str(2**31), str(2**63), "9" * 400, f"0x{'f' * 5000}", "1e400", "-1e400", "nan", "1e-320",
    "''", '"\\u0000"', f'"{"a" * 5000}"', f'"{"é" * 200}"', '"(a+)+"', "[]", "[[]]", "{}",
    "{a = 1}",
    "1979-05-27T07:32:00Z", "07:32:00", "true", '["a", 1]', '"../.."', '"~nobody/x"', "[1e400]",
]  # fmt: skip
TEXTS = [LONG, "٣", "1_0", "nan", "inf", "[[", ",", "", "\udcff", "\n", "none", "True", "=", "--x"]


def test_every_key_takes_or_refuses_every_value_in_one_line(tmp_path):
    values = [(text, tomli.loads(f"value = {text}")["value"]) for text in VALUES]
    file = tmp_path / "run.toml"
    refused, messages = 0, []
    for name, key in job_schema().walk():
        table, _, last = name.rpartition(".")
        given = [(f"[{table}]\n{last} = {text}\n", value) for text, value in values]
        given += [(f"--{name}={text}", from_text(text, key.type)) for text in TEXTS]
        for text, value in given:
            try:
                checked_value(name, key, value, "here")
                if text.startswith("["):
                    file.write_text(text)
                read_config([text if text.startswith("--") else f"--job.config_file={file}"])
            except ConfigError as error:
                refused += 1
                messages.append(str(error))
    assert refused > 5000
    assert [message for message in messages if not message.isprintable()] == []


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "large"])
def test_what_is_no_file_is_not_read_as_one(tmp_path, kind):
    place = tmp_path / "run.toml"
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(place))
    elif kind == "device":
        place.symlink_to("/dev/urandom")
    else:
        with place.open("wb") as file:
            file.truncate(5 * 2**30)
    wanted = "larger than" if kind == "large" else "a folder, pipe, socket or device"
    message = refusal(["--job.config_file", str(place)])
    assert message.startswith(f"command line: job.config_file: cannot read {place}: {wanted}")


def test_a_file_with_a_newline_in_its_path_does_not_break_the_line(tmp_path):
    file = tmp_path / "a\nb.toml"
    file.write_text("[training]\nstep = 1\n")
    message = refusal(["--job.config_file", str(file)])
    assert message.startswith("command line: job.config_file: got ")
    assert message.endswith("expected text in one line, without control characters, in UTF-8")


def test_a_pipe_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "text.txt")
    message = refusal([f"--training.dataset={tmp_path / 'text.txt'}"])
    assert message.endswith('text.txt": is neither a file nor a folder')


@pytest.mark.parametrize(
    ("name", "kind", "args"),
    [
        ("metrics.jsonl", "folder", []),
        ("metrics.jsonl", "pipe", []),
        ("loss.png", "folder", []),
        ("checkpoint", "file", ["--checkpoint.enable"]),
        ("tb", "file", ["--metrics.enable_tensorboard"]),
        ("profile_traces", "pipe", ["--profiling.enable_profiling"]),
        ("memory_snapshot", "file", ["--profiling.enable_memory_snapshot"]),
        ("settings.json", "folder", ["--job.save_config_file=settings.json"]),
    ],
)
def test_what_stands_where_a_run_writes_is_named_before_it_begins(tmp_path, name, kind, args):
    place = tmp_path / name
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir() if kind == "folder" else place.touch()
    message = refusal([f"--job.dump_folder={tmp_path}", *args])
    assert f": {place} is no " in message
    assert "that can be written to; remove it, or set another " in message
    place.rmdir() if kind == "folder" else place.unlink()
    accept([f"--job.dump_folder={tmp_path}", *args])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("link", ["nowhere", "loop"])
def test_a_link_to_nowhere_is_no_folder(tmp_path, link):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    message = refusal([f"--job.dump_folder={tmp_path / link}/run"])
    assert message.startswith("command line: job.dump_folder: ")


@pytest.mark.parametrize("number", [str(10**12), LONG, "0", "-1", "٣", "", "1e3", "65537"])
def test_a_number_of_ranks_that_cannot_be_planned_is_refused_with_the_largest_that_can(number):
    with pytest.raises(ConfigError) as caught:
        read_plan_request(["--plan", "--world-size", number], 1)
    assert "expected a number of ranks from 1 to 65536, the most that are planned" in str(
        caught.value
    )


TORCHRUN = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", LONG), ("WORLD_SIZE", "0"), ("RANK", "٣"), ("RANK", "-1"), ("RANK", ""),
        ("LOCAL_WORLD_SIZE", "0"), ("LOCAL_RANK", LONG), ("MASTER_PORT", "70000"),
        ("MASTER_PORT", "http"), ("MASTER_PORT", LONG),
    ],
)  # fmt: skip
def test_an_extreme_environment_is_refused_by_its_variable(name, value):
    with pytest.raises(ConfigError, match=f"^environment: {name}: got "):
        check_launch(TORCHRUN | {name: value})


def test_a_number_of_ranks_is_counted_or_refused():
    assert started_ranks({"WORLD_SIZE": "16"}) == 16
    with pytest.raises(ConfigError, match='WORLD_SIZE: got "0", expected a whole number greater'):
        started_ranks({"WORLD_SIZE": "0"})


def test_a_message_is_one_line_of_bearable_length():
    assert one_line("a\nb\x1b\udcff") == "a\\nb\\x1b\\udcff"
    assert one_line("key" * 1000 + "remedy").endswith("remedy")
    assert len(one_line("x" * 10**6)) < 1000


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(.*)*x", "(a*)*(a*)*b"])
def test_a_pattern_that_takes_for_ever_is_refused(monkeypatch, pattern):
    monkeypatch.setattr("titan_shampoo.config.patterns._SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"^the pattern: takes more than 0\.2 s to match"):  # noqa: SIM117
        with matching_bounded("the pattern"):
            re.search(pattern, "a" * 60 + "!")


def test_a_pattern_that_takes_for_ever_ends_all_ranks_in_one_line(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        "[[optimizer.groups]]\npattern = '([a-z_.0-9]+)+!'\n[model]\nflavor = 'byte_debug'"
    )
    args = ["--job.config_file", str(file), f"--job.dump_folder={tmp_path / 'out'}"]
    for end in start_on_ranks(2, [*args, "--model.flavor=byte_debug"], tmp_path):
        assert end.exit_code == 2
        (line,) = end.error
        assert line.startswith("optimizer.groups[0].pattern = ")
        assert "takes more than 5 s to match the names of the parameters" in line


def test_records_that_are_none_are_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    bad = [b"\xff", DEEP.encode(), f'{{"step": {LONG}}}'.encode(), b'{"step": "1"}', b"3", b"{"]
    file.write_bytes(b"\n".join([b'{"step": 1}', *bad, b'{"step": 2}']))
    assert plot.read_records(file) == [{"step": 1}, {"step": 2}]
    file.unlink()
    file.mkdir()
    assert plot.read_records(file) == []


@pytest.mark.parametrize("output", ["", "none/x.png"])
def test_a_plot_that_cannot_be_written_is_one_line(tmp_path, capsys, output):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(SystemExit) as caught:
        plot.main([str(tmp_path), "--output", str(tmp_path / output)])
    assert caught.value.code == 2
    assert "error: --output " in capsys.readouterr().err.splitlines()[-1]
