"""The worked examples in docstrings are true: every function that is hard to believe shows three or four tokens."""

import doctest
import importlib

import pytest

MODULES = [
    "specexec.tree.tree",
    "specexec.model.attention",
    "specexec.sampling.noise",
    "specexec.sampling.shared_head",
    "specexec.sampling.verify",
    "specexec.drafters.cost",
    "specexec.engine.step_accounting",
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_come_out_as_written(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert not found.failed
