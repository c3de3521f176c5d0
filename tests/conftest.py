"""What holds for all tests."""

import re
import signal

import pytest
from hypothesis import settings

# Before their import: what a failed assertion in a helper compared is shown as in a test.
pytest.register_assert_rewrite("tests.support")

from tests.support.slow_cases import SLOW_CASES  # noqa: E402 - rewritten, as said above

# A shell without a terminal, and nohup, start tests that ignore these; runs in tests would, too.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# How long an example takes is no promise of ours, and torch's first calls are slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow cases."""
    slow = re.compile("|".join(SLOW_CASES))
    for item in items:
        if slow.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
