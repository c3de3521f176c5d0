"""What holds for all tests."""

import pytest
from hypothesis import settings

# Before their import: what a failed assertion in a helper compared is shown as in a test.
pytest.register_assert_rewrite("tests.support")

# How long an example takes is no promise of ours, and torch's first calls are slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
