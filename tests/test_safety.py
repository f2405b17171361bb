"""Files from elsewhere are data: nothing in the package loads what could run code."""

import ast
import json
import os
import pickle
import shlex
import shutil
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from prunevit.agents.policies.heuristics import KeepAll
from prunevit.agents.policies.serialization import SavedModelError, learned_policy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.agents.pruning import prune
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.described import description_problem
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import DESCRIPTION, BackboneError
from prunevit.trainers import mappo
from prunevit.trainers.backbone import BackboneConfig
from prunevit.trainers.common.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_newest,
    write_json,
    write_network,
)
from prunevit.trainers.common.config import MappoConfig, defaults_for, parse
from prunevit.trainers.common.run import TrainingError, open_run
from prunevit.trainers.dynamic_vit import DynamicViTConfig
from prunevit.trainers.finetune import FinetuneConfig, load_run
from prunevit.trainers.straight_through import StraightThroughConfig

CHECKOUT = Path(__file__).parents[1]
FOLDERS = ("envs", "agents", "trainers", "benchmarks", "examples")
TRAINERS = [MappoConfig, BackboneConfig, DynamicViTConfig, StraightThroughConfig]
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


# --- runs, models and weights of strangers ---

HUB_NAMES = ("hf-hub:attacker/x", "HF-HUB:attacker/x", "hf_hub:attacker/x", "local-dir:/tmp")
BAD_KWARGS = (
    {"checkpoint_path": "weights.pth"},
    {"cache_dir": "/tmp/cache"},
    {"pretrained_cfg": {"url": "https://attacker"}},
    {"pretrained_cfg_overlay": {"hf_hub_id": "attacker/x"}},
    {"pretrained_cfg_overlay": "x"},
    {"features_only": True},
    {"device": "cuda"},
    {"img_size": {"a": 1}},
    {"norm_layer": ["layernorm", {"eps": 1}]},
    {"depth": 10**9},
    {"embed_dim": 10**12},
)
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
VIT = "vit_tiny_patch16_224"


@pytest.fixture
def nothing_built(monkeypatch):
    """To be called where timm is to be asked for no model from there on."""
    asked = []

    def ask(*arguments, **kwargs):
        asked.append((arguments, kwargs))
        raise OSError("not to be built")

    yield lambda: monkeypatch.setattr(timm, "create_model", ask)
    # an error of its own would be reported as one of timm's
    assert not asked


def changed(file, change):
    """Applies ``change`` to the JSON in ``file``."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def hostile_run(folder, **settings):
    """A run that names what it should not."""
    config = parse(["--device", "cpu", "--num-envs", "8", "--eval-size", "8"])
    write_json(folder / "config.json", config.to_json() | settings)
    return folder


def settings_of_a_command(proof):
    settings = defaults_for("pettingzoo:os:system").to_json()
    return settings | {"env_kwargs": {"command": f"touch {proof}"}}


def test_the_command_of_a_hostile_run_would_run(tmp_path):
    """What the tests below fear: a user who gives all of it himself gets what he asks for."""
    with suppress(Exception, SystemExit):
        mappo.main([
            "--env", "pettingzoo:os:system", "--run-name", str(tmp_path / "r"),
            "--env-kwargs", json.dumps({"command": f"touch {tmp_path / 'proof'}"}),
        ])  # fmt: skip
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize("words", [[], ["--env", "pettingzoo:os:system"]])
def test_a_run_from_elsewhere_executes_nothing(words, tmp_path):
    proof = tmp_path / "proof"
    hostile_run(tmp_path / "r", **settings_of_a_command(proof))
    with pytest.raises(SystemExit) as ended:
        mappo.main([*words, "--resume", str(tmp_path / "r")])
    assert not proof.exists()
    message = str(ended.value.code)
    assert "\n" not in message
    expected = shlex.join([
        "--resume", str(tmp_path / "r"), "--env", "pettingzoo:os:system",
        "--env-kwargs", json.dumps({"command": f"touch {proof}"}),
    ])  # fmt: skip
    assert message.endswith(f"if you trust it, resume it with {expected}")


def test_a_module_of_a_run_from_elsewhere_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    settings = defaults_for("pettingzoo:evil").to_json()
    hostile_run(tmp_path / "r", **settings)
    with pytest.raises(SystemExit, match="--env pettingzoo:evil"):
        mappo.main(["--resume", str(tmp_path / "r")])


def test_a_game_given_again_is_resumed(tmp_path):
    """The message's own words are taken."""
    settings = defaults_for("pettingzoo:mpe2.simple_spread_v3").to_json()
    folder = hostile_run(tmp_path / "r", **settings | {"env_kwargs": {"N": 2}})
    with pytest.raises(TrainingError) as refused:
        open_run(parse(["--resume", str(folder)]))
    words = shlex.split(str(refused.value).partition("resume it with ")[2])
    assert open_run(parse(words))[1].env_kwargs == {"N": 2}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("dataset", ["hfds/attacker/x", "wds/:pipe:id", "tfds/x", "HFDS/a/x"])
def test_a_dataset_that_is_fetched_is_given_again(trainer, dataset, tmp_path):
    write_json(tmp_path / "r/config.json", trainer().to_json() | {"dataset": dataset})
    with pytest.raises(TrainingError, match=f"--dataset {dataset}"):
        open_run(trainer(resume=tmp_path / "r"))
    assert open_run(trainer(resume=tmp_path / "r", dataset=dataset))[1].dataset == dataset


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_backbone_on_a_hub_is_given_again(trainer, tmp_path):
    hub = {"backbone": HUB_NAMES[1], "pretrained": True}
    write_json(tmp_path / "r/config.json", trainer().to_json() | hub)
    with pytest.raises(TrainingError, match=f"--backbone {HUB_NAMES[1]}"):
        open_run(trainer(resume=tmp_path / "r"))


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("kwargs", BAD_KWARGS)
def test_a_resumed_run_hands_timm_nothing_but_values(trainer, kwargs, tmp_path):
    settings = {"backbone": VIT, "model_kwargs": kwargs}
    write_json(tmp_path / "r/config.json", trainer().to_json() | settings)
    with pytest.raises(CheckpointError, match=r"config\.json is refused"):
        open_run(trainer(resume=tmp_path / "r"))


def test_fine_tuning_fetches_no_dataset_that_only_the_run_names(tmp_path, finished_run):
    changed(finished_run / "config.json", lambda values: values.update(dataset="hfds/attacker/x"))
    config = FinetuneConfig(run=finished_run)
    with pytest.raises(ValueError, match="--dataset hfds/attacker/x"):
        load_run(config, torch.device("cpu"))
    given = replace(config, dataset="folder:mine")
    assert load_run(given, torch.device("cpu"))[1] == "folder:mine"


def test_fine_tuning_asks_no_hub_that_only_the_run_names(tmp_path, finished_run):
    name = HUB_NAMES[1]
    hub = {"backbone": name, "pretrained": True}
    changed(finished_run / "config.json", lambda values: values.update(hub))
    config = FinetuneConfig(run=finished_run)
    with pytest.raises(ValueError, match=f"if you trust it, give --backbone {name}"):
        load_run(config, torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"--backbone hf-hub:my/own: the backbone .* is {name}"):
        load_run(replace(config, backbone="hf-hub:my/own"), torch.device("cpu"))
    write_json(tmp_path / "r/config.json", replace(config, backbone=name).to_json())
    with pytest.raises(TrainingError, match=f"--backbone {name}"):
        open_run(FinetuneConfig(resume=tmp_path / "r"))


@pytest.fixture
def saved(tmp_path):
    """A folder with a model, as a stranger may have changed it afterwards."""
    vit = create_backbone(VIT, untrained=True, num_classes=3, **TINY)
    prune(vit, KeepAll(), model_kwargs=TINY).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def finished_run(tmp_path):
    """A folder with a finished run on the digits."""
    config = MappoConfig(observation=("stage",), hidden=(4,), attention_prior=0.0, device="cpu")
    write_json(tmp_path / "run/config.json", config.to_json())
    policy = learned_policy(
        StagedViT(create_backbone(), (1, 3)), ("stage",), (4,), attention_prior=False
    )
    write_network(tmp_path / "run/policy.safetensors", policy.actor)
    PrunedViT.from_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_saved_model_leads_to_no_hub_and_no_other_folder(name, saved, nothing_built):
    changed(saved / "config.json", lambda values: values["backbone"].update(name=name))
    nothing_built()
    with pytest.raises(SavedModelError, match="only timm's own models"):
        PrunedViT.from_pretrained(saved)


@pytest.mark.parametrize("kwargs", BAD_KWARGS)
def test_a_saved_model_hands_timm_nothing_but_values(kwargs, saved, nothing_built):
    changed(saved / "config.json", lambda values: values["backbone"]["kwargs"].update(kwargs))
    nothing_built()
    with pytest.raises(SavedModelError, match=next(iter(kwargs)).removesuffix("_overlay")):
        PrunedViT.from_pretrained(saved)


@pytest.mark.parametrize("change", [{"url": "https://attacker"}, {"file": "x"}, {"mean": {}}])
def test_a_saved_model_sets_how_images_are_prepared_and_no_more(change, saved):
    changed(saved / "config.json", lambda values: values["backbone"]["data_config"].update(change))
    with pytest.raises(SavedModelError, match=f"refused: .*{next(iter(change))}"):
        PrunedViT.from_pretrained(saved)


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_run_leads_to_no_hub_unless_its_reader_says_so(name, finished_run, monkeypatch):
    hub = {"backbone": name, "pretrained": True}
    changed(finished_run / "config.json", lambda values: values.update(hub))
    asked = []

    def ask(name, **_):
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", ask)
    with pytest.raises(BackboneError, match="if you trust it"):
        PrunedViT.from_run(finished_run)
    assert not asked
    with pytest.raises(BackboneError, match="offline"):
        PrunedViT.from_run(finished_run, hub_backbone=name)
    assert asked == [name]


@pytest.mark.parametrize("kwargs", BAD_KWARGS)
def test_a_run_hands_timm_nothing_but_values(kwargs, finished_run, nothing_built):
    hostile = {"backbone": VIT, "model_kwargs": kwargs, "pretrained": True}
    changed(finished_run / "config.json", lambda values: values.update(hostile))
    nothing_built()
    with pytest.raises(BackboneError, match=next(iter(kwargs)).removesuffix("_overlay")):
        PrunedViT.from_run(finished_run)


@pytest.mark.parametrize("kwargs", [*BAD_KWARGS, ["x"]])
def test_a_weights_file_hands_timm_nothing_but_values(kwargs, tmp_path, nothing_built):
    described = {"backbone": VIT, "num_classes": 3, "model_kwargs": kwargs}
    file = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, file, {DESCRIPTION: json.dumps(described)})
    nothing_built()
    with pytest.raises(BackboneError, match="is refused"):
        create_backbone(VIT, checkpoint=file)


@pytest.mark.parametrize("name", HUB_NAMES)
def test_only_pretrained_asks_a_hub(name, nothing_built):
    nothing_built()
    for options in ({}, {"untrained": True}):
        with pytest.raises(BackboneError, match="pretrained=True"):
            create_backbone(name, **options)


def test_what_a_backbone_of_ours_is_described_by_is_taken():
    """Before this, with the stem and the overlay; and the plain arguments of other models."""
    written = CHECKOUT / "benchmarks/results/cifar10/backbone.json"
    described = json.loads(written.read_text())
    assert description_problem(described["backbone"], described["model_kwargs"]) is None
    for name, kwargs in [
        (VIT, TINY | {"global_pool": "avg", "act_layer": "relu", "norm_layer": "rmsnorm"}),
        (VIT, {"img_size": [32, 16], "class_token": False, "init_values": None, "reg_tokens": 4}),
        ("eva02_tiny_patch14_224", {"use_rot_pos_emb": True, "num_reg_tokens": 1}),
        ("deit_tiny_distilled_patch16_224.fb_in1k", {"qkv_bias": False}),
    ]:
        assert description_problem(name, kwargs) is None


# --- sizes of strangers ---


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["backbone"]["kwargs"].update(embed_dim=60_000, depth=60),
        lambda values: values["backbone"].update(name="vit_giant_patch14_224", kwargs={}),
        lambda values: values.update(policy=values["policy"] | {
            "kind": "learned", "observation": ["stage"], "hidden": [60_000] * 30,
            "attention_prior": False,
        }),
    ],
)  # fmt: skip
def test_a_model_that_its_weights_file_is_too_small_for_is_not_built(change, saved, no_memory):
    changed(saved / "config.json", change)
    with no_memory(), pytest.raises(SavedModelError, match="can't hold the weights of its model"):
        PrunedViT.from_pretrained(saved)


def test_weights_that_are_too_few_for_their_description_build_no_model(tmp_path, no_memory):
    kwargs = TINY | {"embed_dim": 60_000, "depth": 60}
    described = {"backbone": VIT, "num_classes": 3, "model_kwargs": kwargs}
    file = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, file, {DESCRIPTION: json.dumps(described)})
    with no_memory(), pytest.raises(BackboneError, match="can't hold the weights of its model"):
        create_backbone(VIT, checkpoint=file)


def test_a_run_whose_policy_is_too_large_for_its_file_is_not_built(finished_run, no_memory):
    changed(finished_run / "config.json", lambda values: values.update(hidden=[60_000] * 30))
    with no_memory(), pytest.raises(SavedModelError, match="can't hold the weights of its model"):
        PrunedViT.from_run(finished_run)


@pytest.fixture
def no_memory():
    """A context in which the process can't get more than another 4 GB."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc, which tells the memory in use")
    return limited


NESTED = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize("text", [NESTED, '{"a": ' + NESTED + "}", " " * (2 << 20) + "{}"])
def test_json_that_is_deep_or_huge_is_refused(text, saved, finished_run, tmp_path):
    (saved / "config.json").write_text(text)
    (finished_run / "config.json").write_text(text)
    with pytest.raises(SavedModelError, match=r"config\.json can't be read"):
        PrunedViT.from_pretrained(saved)
    with pytest.raises(SavedModelError, match=r"config\.json can't be read"):
        PrunedViT.from_run(finished_run)
    if NESTED in text:
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            open_run(MappoConfig(resume=finished_run))
        file = tmp_path / "w.safetensors"
        save_file({"x": torch.zeros(1)}, file, {DESCRIPTION: text})
        with pytest.raises(BackboneError, match="is damaged"):
            create_backbone(VIT, checkpoint=file)
        metadata = {"format": "prunevit-checkpoint-1", "skeleton": text}
        save_file({"x": torch.zeros(1)}, file, metadata)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(file)


@pytest.mark.parametrize("skeleton", ['{"$tensor": []}', '{"$dict": 1}', '{"$dict": [1]}', "{}"])
def test_a_checkpoint_whose_index_is_nonsense_is_refused(skeleton, tmp_path):
    file = tmp_path / "c.safetensors"
    metadata = {"format": "prunevit-checkpoint-1", "skeleton": skeleton}
    save_file({"x": torch.zeros(1)}, file, metadata)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(file)


@pytest.mark.parametrize(
    "header",
    [
        b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}',
    ],
)
@pytest.mark.parametrize("length", [None, 1 << 62])
def test_a_header_that_promises_more_than_there_is_is_refused(header, length, saved, tmp_path):
    size = len(header) if length is None else length
    content = size.to_bytes(8, "little") + header + bytes(4)
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(SavedModelError, match=r"model\.safetensors is damaged"):
        PrunedViT.from_pretrained(saved)
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(BackboneError, match="is damaged"):
        create_backbone(VIT, checkpoint=file)


def test_a_link_in_a_run_from_elsewhere_overwrites_nothing(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("kept")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/.report.json.tmp").symlink_to(mine)
    (tmp_path / "r/report.json").symlink_to(mine)
    write_json(tmp_path / "r/report.json", {"a": "$(id)"})
    assert mine.read_text() == "kept"
    assert json.loads((tmp_path / "r/report.json").read_text()) == {"a": "$(id)"}
