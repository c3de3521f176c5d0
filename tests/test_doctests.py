"""The examples in docstrings are true."""

import doctest
from types import ModuleType

import pytest

from titan_shampoo.distributed import copies, geometry


@pytest.mark.parametrize("module", [copies, geometry], ids=lambda module: module.__name__)
def test_examples_give_what_they_show(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed
