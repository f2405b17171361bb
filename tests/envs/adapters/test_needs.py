"""A module whose library is missing says what brings it."""

import importlib
import sys

import pytest

# what an adapter, trainer or benchmark imports, and the extra that has it
NEEDS = [
    ("prunevit.envs.adapters.sb3_contrib", "sb3_contrib", "sb3"),
    ("prunevit.envs.adapters.rllib", "ray", "rllib"),
    ("prunevit.trainers.rllib", "ray", "rllib"),
    ("prunevit.envs.adapters.torchrl", "tensordict", "torchrl"),
    ("prunevit.envs.adapters.benchmarl", "benchmarl", "benchmarl"),
    ("prunevit.trainers.benchmarl", "benchmarl", "benchmarl"),
    ("prunevit.benchmarks.compare", "pandas", "benchmarks"),
    ("prunevit.benchmarks.figures", "matplotlib", "benchmarks"),
    ("prunevit.benchmarks.tables", "pandas", "benchmarks"),
]


@pytest.mark.parametrize(("module", "library", "extra"), NEEDS)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, module, library, extra):
    ours = {name for name, _, _ in NEEDS}
    for name in list(sys.modules):
        # as if none had been imported before
        if name in ours or library in (name.partition(".")[0], name.rpartition(".")[2]):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    expected = rf"{library}\S* is missing.* extra '{extra}'.*pip install -e '\.\[{extra}\]'"
    with pytest.raises(ImportError, match=expected):
        importlib.import_module(module)
