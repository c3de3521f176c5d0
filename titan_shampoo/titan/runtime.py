"""The CPU runtime of torchtitan: the functions of a device module for CPUs.

torchtitan 0.2.2 asks once for the accelerator, while ``torchtitan.tools.utils`` is imported, and
then calls memory and device functions that ``torch.cpu`` lacks. The answer to that one question is
replaced by our module; torch itself is unchanged after the import. With an accelerator nothing is
replaced.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch._utils

_ASKED_AT_IMPORT = "torchtitan.tools.utils"


def install_cpu_runtime() -> None:
    """Make torchtitan run on CPU if there is no accelerator; the second call does nothing.

    Raises:
        RuntimeError: If torchtitan was imported before, with a device that does not exist here.
    """
    if torch._utils._get_available_device_type() is not None:
        return
    if _ASKED_AT_IMPORT not in sys.modules:
        with _answer_cpu():
            importlib.import_module(_ASKED_AT_IMPORT)
    settled = sys.modules[_ASKED_AT_IMPORT].device_type
    if settled != "cpu":
        raise RuntimeError(
            f"torchtitan was imported first and chose {settled!r}, which this machine lacks; "
            "import titan_shampoo.titan before torchtitan"
        )


@contextmanager
def _answer_cpu() -> Iterator[None]:
    device_type, device_module = (
        torch._utils._get_available_device_type,
        torch._utils._get_device_module,
    )
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda _: CpuDevice()  # type: ignore[assignment]
    try:
        yield
    finally:
        torch._utils._get_available_device_type = device_type
        torch._utils._get_device_module = device_module


class CpuDevice(ModuleType):
    """``torch.cpu`` with the functions that torchtitan expects of ``torch.cuda``."""

    def __init__(self) -> None:
        """Create the module."""
        super().__init__("cpu_device", CpuDevice.__doc__)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever torch.cpu has)
        """Return the attribute of ``torch.cpu``."""
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        """Return 0: torchtitan uses it as an index, and ``torch.cpu`` returns a string."""
        return 0

    def get_device_name(self, device: object = None) -> str:
        """Return the processor's name."""
        with suppress(OSError):
            found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
            if found:
                return found[1]
        return "CPU"

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        """Return this machine's ``total_memory`` in bytes."""
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return SimpleNamespace(name=self.get_device_name(), total_memory=total)

    def memory_stats(self, device: object = None) -> dict[str, int]:
        """Return this process's peak resident memory in bytes, under ``torch.cuda``'s names."""
        peak = _peak_resident_bytes()
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """Restart the peak from the present resident memory."""
        with suppress(OSError):  # Some containers forbid it: the peak is then the whole run's.
            Path("/proc/self/clear_refs").write_text("5")

    def empty_cache(self) -> None:
        """Do nothing: the CPU allocator keeps no cache."""


def _peak_resident_bytes() -> int:
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    return 0
