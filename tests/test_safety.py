"""Files from elsewhere are data: nothing in the package loads what could run code."""

import ast
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import BackboneError
from prunevit.trainers import mappo
from prunevit.trainers.common.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_newest,
    write_json,
)
from prunevit.trainers.common.config import parse

CHECKOUT = Path(__file__).parents[1]
FOLDERS = ("envs", "agents", "trainers", "benchmarks", "examples")
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "torch.hub.load"}
# safe with this argument, and with no other value of it
NEEDS = {"torch.load": "weights_only", "load_state_dict": "weights_only"}


def unsafe(source):
    """What in ``source`` could run code that a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in UNSAFE_MODULES:
            # an exception is no loader
            found += [a.name for a in node.names if not a.name.endswith("Error")]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            is_unsafe = name in UNSAFE_CALLS or given.get("allow_pickle", "False") != "False"
            if is_unsafe or (name in NEEDS and given.get(NEEDS[name]) != "True"):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("from pickle import UnpicklingError", 0),
        ("import joblib.numpy_pickle", 1),
        ("torch.load(file)", 1),
        ("torch.load(file, weights_only=False)", 1),
        ("torch.load(file, weights_only=True)", 0),
        ("load_state_dict(file)", 1),
        ("load_state_dict(file, weights_only=True)", 0),
        ("model.load_state_dict(weights)", 0),
        ("np.load(file, allow_pickle=True)", 1),
        ("np.load(file)", 0),
        ("eval(text)", 1),
        ("model.eval()", 0),
        ("yaml.load(text)", 1),
    ],
)
def test_what_counts_as_unsafe(source, expected):
    assert len(unsafe(source)) == expected


def test_nothing_in_the_package_loads_what_could_run_code():
    files = [file for folder in FOLDERS for file in (CHECKOUT / folder).rglob("*.py")]
    assert len(files) > 50
    found = {str(file.relative_to(CHECKOUT)): unsafe(file.read_text()) for file in files}
    assert {name: calls for name, calls in found.items() if calls} == {}


class Malicious:
    """Unpickled, it makes a folder: proof that code ran."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture(params=["pickle", "torch.save"])
def attack(request, tmp_path):
    """A function that writes a malicious file, and what would exist if it was run."""
    proof = tmp_path / "proof"

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "pickle":
            path.write_bytes(pickle.dumps(Malicious(proof)))
        else:
            torch.save({"weights": Malicious(proof)}, path)

    write(tmp_path / "try")
    if request.param == "pickle":
        pickle.loads((tmp_path / "try").read_bytes())
    else:
        torch.load(tmp_path / "try", weights_only=False)
    assert proof.exists()  # it does what it is feared for
    shutil.rmtree(proof)
    return write, proof


def test_a_pickle_named_like_a_checkpoint_is_refused_and_not_run(attack, tmp_path):
    write, proof = attack
    file = tmp_path / "run" / "checkpoint.safetensors"
    write(file)
    for load in (load_checkpoint, load_newest):
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged"):
            load(file)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin", "w.npz"])
def test_a_pickle_named_like_weights_is_refused_and_not_run(attack, name, tmp_path):
    write, proof = attack
    write(tmp_path / name)
    with pytest.raises(BackboneError, match=name):
        create_backbone(checkpoint=tmp_path / name)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["config.json", "checkpoint.safetensors"])
def test_a_run_with_a_pickle_in_it_is_refused_and_not_run(attack, name, tmp_path, monkeypatch):
    write, proof = attack
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/r")
    config = parse(["--device", "cpu", "--num-envs", "8", "--eval-size", "8"])
    write_json(folder / "config.json", config.to_json())
    write(folder / name)
    with pytest.raises(SystemExit) as ended:
        mappo.main(["--resume", str(folder)])
    assert str(ended.value.code).startswith(f"error: {folder / name} is damaged")
    assert not proof.exists()
