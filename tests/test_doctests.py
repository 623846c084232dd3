"""Examples in docstrings, run in the modules as they are installed."""

import doctest
import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import bhlog.analysis
import bhlog.capture


def with_examples():
    """Modules whose source shows a prompt; of capture only the contract, where torch is missing."""
    packages = [bhlog.analysis]
    packages += [
        bhlog.capture if find_spec("torch") else importlib.import_module("bhlog.capture.contract")
    ]
    for package in packages:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = module.module_finder.find_spec(module.name).origin
            if source and ">>> " in Path(source).read_text(encoding="utf-8"):
                yield module.name


@pytest.mark.parametrize("name", sorted(with_examples()))
def test_examples_print_what_they_show(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed
