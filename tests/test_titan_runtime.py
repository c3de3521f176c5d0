"""torchtitan runs without an accelerator, and torch stays as it was."""

import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch._utils

from tests.support.ranks import PATIENCE, run_on_ranks
from tests.support.titan_runs import text_run, train_all, write_text

pytestmark = pytest.mark.skipif(
    torch._utils._get_available_device_type() is not None, reason="has an accelerator"
)

INSTALL_TWICE = """
import json, torch
before = (torch._utils._get_available_device_type, torch._utils._get_device_module)
attributes = dir(torch.cpu)

from titan_shampoo.titan.runtime import install_cpu_runtime
from torchtitan.tools import utils
device = utils.device_module
install_cpu_runtime()

peaks = [device.memory_stats()["active_bytes.all.peak"]]
ballast = torch.ones(75_000_000)
peaks.append(device.memory_stats()["active_bytes.all.peak"])
del ballast
device.reset_peak_memory_stats()
peaks.append(device.memory_stats()["active_bytes.all.peak"])

print(json.dumps({
    "device_type": utils.device_type,
    "installed_once": utils.device_module is device,
    "questions_as_before": before
        == (torch._utils._get_available_device_type, torch._utils._get_device_module),
    "torch_cpu_as_before": attributes == dir(torch.cpu),
    "index": device.current_device(),
    "name": device.get_device_name(),
    "total": device.get_device_properties(0).total_memory,
    "peaks": peaks,
}))
"""

RESIDENT_BYTES = """
import json, re
from pathlib import Path
import torch
from titan_shampoo.host_memory import keep_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

kept, before = keep_freed_memory(), resident()
for _ in range(4):
    ballast = torch.ones(75_000_000)
    del ballast
print(json.dumps({"kept": kept, "more": resident() - before}))
"""

TORCHTITAN_FIRST = "import torchtitan.tools.utils, titan_shampoo.titan"


def python(program, **environment):
    """What a fresh interpreter does with ``program``."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=Path(__file__).parents[1],
        env=own | environment,
    )


@pytest.fixture(scope="module")
def installed():
    finished = python(INSTALL_TWICE)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_torchtitan_settles_on_the_cpu_once(installed):
    assert installed["device_type"] == "cpu"
    assert installed["installed_once"]
    assert installed["index"] == 0
    assert installed["name"]


def test_torch_is_not_left_patched(installed):
    assert installed["questions_as_before"]
    assert installed["torch_cpu_as_before"]


def test_memory_numbers_are_those_of_the_process(installed):
    at_first, with_ballast, after = installed["peaks"]
    assert 0 < at_first < with_ballast < installed["total"]
    assert with_ballast - at_first > 250e6  # of the 300 MB
    assert after <= with_ballast


def test_importing_torchtitan_first_is_refused_with_the_way_out():
    refused = python(TORCHTITAN_FIRST)
    assert refused.returncode != 0
    assert "import titan_shampoo.titan before torchtitan" in refused.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
@pytest.mark.parametrize("environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_freed_memory_is_kept_unless_the_environment_says_how(environment):
    found = json.loads(python(RESIDENT_BYTES, **environment).stdout)
    assert found["kept"] is not bool(environment)
    if found["kept"]:
        assert found["more"] > 250e6  # of a ballast of 300 MB
    else:
        assert found["more"] < 50e6


def warnings_of_a_run(args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_all([args])
    return [str(warning.message) for warning in caught]


def test_one_rank_trains_in_float32_without_a_warning_of_autocast(tmp_path):
    write_text(tmp_path)
    (said,) = run_on_ranks(1, warnings_of_a_run, text_run(tmp_path, "run"))
    assert not [message for message in said if "utocast" in message]
