"""A run that is asked to stop saves and ends well: one line, its exit code, and no rank left."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.ranks import PATIENCE
from tests.support.titan_runs import text_run, write_text
from titan_shampoo.stopping import STOP_SIGNALS

ROOT = Path(__file__).parents[1]
SAVING = {
    "checkpoint__enable": True,
    "checkpoint__interval": 100_000,
    "training__steps": 100_000,
    "optimizer__name": "AdamW",
}
LAUNCHERS = {
    "launch": [sys.executable, "-m", "parallel.launch", "--standalone", "--nproc_per_node=2"],
    "torchrun": [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
    ],
    # The virtual environment is up to date: it runs this test.
    "make": ["make", "-o", ".venv/installed", "train", f"BIN={Path(sys.executable).parent}"],
}  # fmt: skip


# ---- the quick form: processes that import no torch


def child(program, *, ignored=()):
    """A Python process that has printed its first line; some signals are ignored in it."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert process.stdout
    assert process.stdout.readline()
    return process


WAITING = "print('ready', flush=True); import time; time.sleep(3600)"
ENDING = f"from titan_shampoo.stopping import end_at_once; end_at_once(); {WAITING}"
LAUNCHING = f"from parallel.launch import Stop; stop = Stop(); stop.listen(); {WAITING}"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_the_first_step_ends_a_rank_without_a_traceback(number):
    rank = child(ENDING)
    rank.send_signal(number)
    _, said = rank.communicate(timeout=PATIENCE)
    assert (rank.returncode, said) == (-number, "")


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGQUIT])
def test_a_signal_before_any_rank_is_started_ends_the_launcher_in_one_line(number):
    launcher = child(LAUNCHING)
    launcher.send_signal(number)
    _, said = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 128 + number
    assert said == f"stopped by {signal.Signals(number).name}: no rank was started yet\n"


@pytest.mark.parametrize("program", [ENDING, LAUNCHING])
def test_what_nohup_ignores_stays_ignored(program):
    process = child(program, ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_rank_does_not_outlive_an_agent_that_is_killed():
    rank = f"import os; os.environ['TORCHELASTIC_RUN_ID'] = 'a'; {ENDING}"
    agent = child(
        "import subprocess, sys; "
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE); "
        "rank.stdout.readline(); print(rank.pid, flush=True); rank.wait()"
    )
    left = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert len(left) == 1
    agent.kill()
    agent.communicate()
    wait_until(lambda: not is_running(int(left[0])))


def test_a_launcher_that_ranks_have_outlived_passes_on_what_came_while_they_were_started():
    launcher = child(
        "import subprocess, sys; from parallel.launch import Stop; stop = Stop(); stop.listen(); "
        "stop.begin(); print('ready', flush=True); sys.stdin.read(0)\n"
        "import time\nwhile not stop.received: time.sleep(0.01)\n"
        "ranks = [subprocess.Popen(['sleep', '3600']) for _ in range(2)]\n"
        "stop.watch([rank.pid for rank in ranks])\nprint([rank.wait() for rank in ranks])"
    )
    launcher.send_signal(signal.SIGINT)
    out, said = launcher.communicate(timeout=PATIENCE)
    assert (launcher.returncode, out.strip(), said) == (0, "[-15, -15]", "")


# ---- whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    write_text(folder)
    return folder


class Started:
    """A run of two ranks in a session of its own."""

    def __init__(self, launcher, data, folder, **settings):
        self.run = folder / "run"
        args = text_run(data, str(self.run), **{**SAVING, **settings})
        command = LAUNCHERS[launcher]
        if launcher == "make":
            joined = " ".join([*args, f"--job.dump_folder={self.run}"])
            command = [*command, "CONFIG=configs/transformer_debug.toml", f"ARGS={joined}"]
        else:
            command = [*command, "train.py", *args]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.said = folder / "err"
        with (folder / "out").open("w") as out, self.said.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
            )
        self.out = folder / "out"

    def wait_for(self, moment):
        found = {
            "the launcher": lambda: self.descendants(),
            "ranks": lambda: len(self.ranks()) == 2,
            "training": lambda: (self.run / "metrics.jsonl").exists(),
            "a save": lambda: list((self.run / "checkpoint").glob("step-*")),
        }[moment]
        wait_until(lambda: found() or self.process.poll() is not None)
        assert self.process.poll() is None, self.said.read_text()

    def descendants(self):
        return descendants(self.process.pid)

    def ranks(self):
        return [pid for pid in self.descendants() if " train.py" in command_of(pid)
                and "-m parallel.launch" not in command_of(pid)]  # fmt: skip

    def send(self, target, number):
        if target == "top":
            os.kill(self.process.pid, number)
        elif target == "group":
            os.killpg(self.process.pid, number)
        elif target == "launcher":
            pids = [self.process.pid, *self.descendants()]
            os.kill(next(p for p in pids if "parallel.launch" in command_of(p)), number)
        else:
            os.kill(sorted(self.ranks())[int(target[-1])], number)

    def end(self):
        """Exit code and lines on standard error, once no process of the run is left."""
        everyone = self.descendants()
        code = self.process.wait(timeout=PATIENCE)
        wait_until(lambda: not any(map(is_running, everyone)))
        return code, self.said.read_text().splitlines()

    def saved(self):
        lines = re.findall(r"asked to stop: saved after step (\d+)", self.out.read_text())
        return len(lines) == 1 and (self.run / "checkpoint" / f"step-{lines[0]}").is_dir()


SAVED = [
    ("launch", "top", signal.SIGTERM, "training", 0),
    ("launch", "top", signal.SIGINT, "a save", 0),
    ("launch", "rank0", signal.SIGINT, "training", 0),
    ("launch", "rank1", signal.SIGHUP, "training", 0),
    ("make", "launcher", signal.SIGUSR1, "training", 0),
    ("make", "group", signal.SIGINT, "training", -signal.SIGINT),
    ("make", "group", signal.SIGHUP, "training", -signal.SIGHUP),
    ("make", "top", signal.SIGTERM, "training", -signal.SIGTERM),
    ("torchrun", "top", signal.SIGTERM, "training", 1),
    ("torchrun", "top", signal.SIGINT, "training", 1),
    ("torchrun", "top", signal.SIGHUP, "training", 1),
    ("torchrun", "top", signal.SIGUSR1, "training", -signal.SIGUSR1),
    ("torchrun", "top", signal.SIGKILL, "training", -signal.SIGKILL),
    ("torchrun", "rank1", signal.SIGUSR1, "training", 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "target", "number", "moment", "code"), SAVED)
def test_a_run_that_is_stopped_saves_and_leaves_no_process(
    data, tmp_path, launcher, target, number, moment, code
):
    often = {"checkpoint__interval": 1} if moment == "a save" else {}
    run = Started(launcher, data, tmp_path, **often)
    run.wait_for(moment)
    run.send(target, number)
    ended, said = run.end()
    assert run.saved(), "\n".join([*said, run.out.read_text()[-2000:]])
    assert ended == code
    if launcher != "torchrun":  # whose agent has its own report
        # make says itself what it was ended by.
        assert [line for line in said if not line.startswith("make: ")] == []


@pytest.mark.slow
def test_a_second_signal_changes_nothing(data, tmp_path):
    run = Started("launch", data, tmp_path)
    run.wait_for("training")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        run.send("top", number)
        time.sleep(0.1)
    assert run.end() == (0, [])
    assert run.saved()


NOT_SAVED = [
    ("top", signal.SIGINT, "ranks", {}, "nothing was saved"),
    ("top", signal.SIGHUP, "ranks", {}, "nothing was saved"),
    ("rank1", signal.SIGTERM, "ranks", {}, "sent to rank 1; nothing was saved"),
    ("rank0", signal.SIGUSR1, "ranks", {}, "sent to rank 0; nothing was saved"),
    ("top", signal.SIGTERM, "training", {"checkpoint__enable": False}, "nothing was saved"),
    ("top", signal.SIGQUIT, "training", {}, "at once, without saving"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "number", "moment", "settings", "line"), NOT_SAVED)
def test_a_stopped_run_without_anything_to_save_is_one_line(
    data, tmp_path, target, number, moment, settings, line
):
    run = Started("launch", data, tmp_path, **settings)
    run.wait_for(moment)
    run.send(target, number)
    code, said = run.end()
    assert code == 128 + number, said
    assert len(said) == 1
    assert said[0].startswith(f"stopped by {signal.Signals(number).name}: {line}")


@pytest.mark.slow
def test_ranks_that_are_stopped_are_not_started_again(data, tmp_path):
    LAUNCHERS["restarting"] = [*LAUNCHERS["launch"], "--max-restarts=3"]
    run = Started("restarting", data, tmp_path)
    run.wait_for("ranks")
    run.send("top", signal.SIGTERM)
    code, said = run.end()
    assert (code, len(said)) == (143, 1)


@pytest.mark.slow
def test_workers_that_load_data_outlast_the_signals_of_torchrun(data, tmp_path):
    run = Started("torchrun", data, tmp_path, training__dataloader__num_workers=2)
    run.wait_for("training")
    run.send("top", signal.SIGTERM)
    assert run.end()[0] == 1
    assert run.saved(), run.out.read_text()[-2000:]


# ---- processes


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def descendants(pid):
    """All processes that this one has started, and theirs."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for t in threads for c in (t / "children").read_text().split()]
    except OSError:
        return []
    return [one for child in children for one in (child, *descendants(child))]
