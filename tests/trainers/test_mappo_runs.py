"""Whole runs of ``trainers.mappo``: killed, resumed, refused, and what they leave."""

import dataclasses
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from prunevit import __version__
from prunevit.agents import PrunedViT
from prunevit.agents.policies.actor_critic import Critic, TokenActor
from prunevit.agents.policies.serialization import SavedModelError
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data_config import model_data_config
from prunevit.envs.vit.blocks import packed_block
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.torch_compile import compile_block
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers import mappo
from prunevit.trainers.common.checkpoint import load_checkpoint
from prunevit.trainers.common.config import MappoConfig, defaults_for, parse
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.common.run import RunFolder

SPREAD = "pettingzoo:mpe2.simple_spread_v3"
MPE2 = pytest.mark.integration("mpe2")
TINY = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
POLICIES = ("dense", "learned", "random", "attention")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def photographs(make_photographs):
    return make_photographs()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random ViT of 16 patches."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_backbone(num_classes=2, untrained=True, **TINY)
    write_weights(path, model.state_dict(), "digits_vit", 2, TINY)
    return path


def flags(**settings):
    return [
        part
        for name, value in settings.items()
        for part in (
            f"--{name.replace('_', '-')}",
            *map(str, value if isinstance(value, tuple) else (value,)),
        )
    ]


COMMON = {
    "iterations": 5, "epochs": 2, "minibatches": 2, "checkpoint_every": 2, "eval_every": 3,
    "hidden": (8,), "seed": 3, "device": "cpu", "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokens(photographs, weights):
    """Arguments of a token-pruning run of a second."""

    def arguments(name, **changes):
        own = {
            "checkpoint": weights, "dataset": photographs, "num_envs": 16, "rollouts_per_image": 4,
            "eval_size": 4, "keep_bias": 1.0, "prune_before": (1, 2), "run_name": name,
        }  # fmt: skip
        return flags(**COMMON | own | changes)

    return arguments


@pytest.fixture(scope="module")
def walks(walk):
    """Arguments of a run in an environment that resets itself; episodes outlast an iteration."""

    def arguments(name, **changes):
        own = {
            "env": walk, "env_kwargs": '{"max_cycles": 15}', "num_envs": 2, "rollout_steps": 10,
            "eval_size": 2, "critic_hidden": (8,), "run_name": name,
        }  # fmt: skip
        return flags(**COMMON | own | changes)

    return arguments


def run(arguments):
    return mappo.train(parse(arguments))


def error_of(arguments):
    """What a command that can't be carried out says, in one line, with exit code 1."""
    with pytest.raises(SystemExit) as ended:
        mappo.main(list(map(str, arguments)))
    message = ended.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def metrics(folder):
    """The records without what a clock says."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse_constant) for line in lines]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def report_of(folder):
    """The report without what a clock says."""
    report = json.loads((Path(folder) / "report.json").read_text())
    assert report.pop("seconds") > 0
    for row in report["policies"].values():
        row.pop("images_per_second", None)
    return report


def check_same(folder, other):
    """Both are bit for bit the same run."""
    names = [sorted(f.name for f in Path(path).glob("*.safetensors")) for path in (folder, other)]
    assert names[0] == names[1]
    assert "policy.safetensors" in names[0]
    for name in names[0]:
        if not name.startswith("checkpoint"):  # the clock's seconds are in there
            assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert metrics(folder) == metrics(other)
    assert report_of(folder) == report_of(other)


# --- whole runs, and runs that were killed ---


@pytest.fixture(scope="module")
def whole_walk(tmp_path_factory, walks):
    with pytest.MonkeyPatch.context() as context:
        context.chdir(tmp_path_factory.mktemp("walk"))
        run(walks("whole"))
        return Path("runs/whole").absolute()


# Signals at the n-th call of a function, in a process of its own for each run; then a run that
# nothing stops. Timing would begin yet another process.
KILLER = """
import importlib, json, os, sys
import torch
from torch.utils.tensorboard import SummaryWriter  # once for all
from prunevit.trainers import mappo
from prunevit.trainers.common import report

report.images_per_second = lambda models, *_: dict.fromkeys(models, 1.0)

codes, (scenarios, whole) = [], json.loads(sys.argv[1])
for owner, name, count, numbers, arguments in scenarios:
    child = os.fork()
    if child:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    owner = getattr(torch.optim, owner, None) or importlib.import_module(owner)
    function, calls = getattr(owner, name), []
    def call_or_die(*args, **kwargs):
        calls.append(0)
        if len(calls) == count:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)
    setattr(owner, name, call_or_die)
    try:
        mappo.main(arguments)
    except SystemExit as ended:
        os._exit(ended.code)  # at once: an interpreter's end takes a second
    os._exit(0)
print(codes)
mappo.main(whole)
"""
STEPS = COMMON["epochs"] * COMMON["minibatches"]  # of the optimizer, in an iteration
# name: where, which call, and how many records and which checkpoint stood there
KILLS = {
    "tokens-learning": (("Adam", "step", 3 * STEPS + 2), 2, True),
    "tokens-before-a-checkpoint": (("Adam", "step", STEPS + 1), 0, False),
    # metrics of four iterations are there, the checkpoint beside them is not yet: files are synced
    # in the order config, metrics, checkpoint, metrics, checkpoint
    "tokens-writing": (("os", "fsync", 5), 4, True),
    "walk-learning": (("Adam", "step", 3 * STEPS + 2), 2, True),
    "walk-before-a-checkpoint": (("Adam", "step", STEPS + 1), 0, False),
}


# Ctrl-C and SIGTERM in the middle of the fourth iteration: games whose episodes end with an
# iteration go on from the third, others from the last one after which all began anew
STOPS = {
    "tokens-stopped": ([signal.SIGTERM], 3, {}),
    # twice, as from a terminal and from a parent; and with workers, which change nothing
    "tokens-interrupted": ([signal.SIGINT, signal.SIGINT], 3, {"workers": 1}),
    "walk-stopped": ([signal.SIGTERM], 2, {}),
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory, tokens, walks):
    """The folder with the runs of ``KILLS`` and ``STOPS`` and a whole one, and the process that
    made them.
    """
    cwd = tmp_path_factory.mktemp("commands")
    kinds = {"tokens": tokens, "walk": walks}
    scenarios = [
        (*where, [signal.SIGKILL], kinds[name.partition("-")[0]](name))
        for name, (where, _, _) in KILLS.items()
    ]
    scenarios += [
        ("Adam", "step", 3 * STEPS + 2, numbers, kinds[name.partition("-")[0]](name, **options))
        for name, (numbers, _, options) in STOPS.items()
    ]
    ended = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps([scenarios, tokens("whole")])],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    codes = [-signal.SIGKILL] * len(KILLS) + [128 + numbers[0] for numbers, _, _ in STOPS.values()]
    assert str(codes) in ended.stdout.splitlines()
    return cwd / "runs", ended


@pytest.fixture(scope="module")
def whole(commands):
    return commands[0] / "whole"


def game_again(name, walk):
    """What has to be given again to resume: no file may choose what is imported."""
    if not name.startswith("walk"):
        return []
    return ["--env", walk, "--env-kwargs", '{"max_cycles": 15}']


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(name, commands, whole, whole_walk, walk):
    folder = commands[0] / name
    _, records, has_checkpoint = KILLS[name]
    assert (folder / "checkpoint.safetensors").exists() == has_checkpoint
    assert len(metrics(folder) if has_checkpoint else []) == records
    assert not (folder / "report.json").exists()
    kind = game_again(name, walk)
    mappo.main([*kind, "--resume", str(folder)])
    check_same(folder, whole_walk if kind else whole)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(name, commands, whole, whole_walk, walk):
    folder, said = commands[0] / name, commands[1].stderr
    numbers, iteration, _ = STOPS[name]
    again = f" {shlex.join(game_again(name, walk))}" if name.startswith("walk") else ""
    assert (
        f"stopped by {numbers[0].name}; iteration {iteration} is saved; "
        f"continue with --resume runs/{name}{again}\n"
    ) in said
    assert iteration_of(folder) == len(metrics(folder)) == iteration
    kind = game_again(name, walk)
    mappo.main([*kind, "--resume", str(folder)])
    check_same(folder, whole_walk if kind else whole)


def test_a_finished_run_is_only_reported_again(whole, monkeypatch, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "again")
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    trained = json.loads(last)["seconds"]
    for name in ("report.json", "policy.safetensors", "pruned.png", "curve.png"):
        (folder / name).unlink()
    monkeypatch.setattr(mappo.Trainer, "iterate", lambda self: 1 / 0)
    report = run(["--resume", str(folder)])
    assert report["seconds"] > trained  # what was spent before counts
    check_same(folder, whole)
    assert (folder / "pruned.png").exists()
    assert (folder / "curve.png").exists()


@pytest.mark.parametrize("setting", ["critic_norm", "actor_attention", "prune_at"])
def test_a_run_from_before_a_setting_came_goes_on(whole, tmp_path, setting):
    folder = shutil.copytree(whole, tmp_path / "older")
    (folder / "config.json").write_bytes(
        edited(**{setting: ...})((folder / "config.json").read_bytes())
    )
    assert PrunedViT.from_run(folder).backbone.prune_at == "block"
    run(["--resume", str(folder)])
    check_same(folder, whole)


def test_a_run_that_prunes_inside_of_blocks(tokens, photographs):
    report = run(tokens("inside", prune_before=(0, 1), prune_at="mlp", keep_bias=0))
    model = PrunedViT.from_run("runs/inside")
    assert (model.backbone.prune_at, model.backbone.prune_before) == ("mlp", (0, 1))
    test = open_images(photographs, "test", model_data_config(model.backbone.model))
    result = evaluate(model, test)
    learned = report["policies"]["learned"]
    assert result.accuracy == learned["accuracy"]
    assert result.gmacs == pytest.approx(learned["gmacs"])
    assert learned["gmacs"] < report["policies"]["dense"]["gmacs"]


def test_another_seed_is_another_run(tokens, whole):
    run(tokens("other", seed=4))
    other = Path("runs/other")
    assert report_of(other)["seed"] == 4
    files = [folder / "policy.safetensors" for folder in (other, whole)]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert metrics(other) != metrics(whole)


# --- what a run leaves ---


def test_a_run_leaves_its_files(whole):
    assert sorted(file.name for file in whole.iterdir() if "tfevents" not in file.name) == [
        "calibration.json", "checkpoint-1.safetensors", "checkpoint-2.safetensors",
        "checkpoint.safetensors", "config.json", "critic.safetensors", "curve.png", "metrics.jsonl",
        "policy.safetensors", "pruned.png", "report.json",
    ]  # fmt: skip
    for name in ("pruned.png", "curve.png"):
        with Image.open(whole / name) as image:
            assert image.format == "PNG"
            image.load()
            assert min(image.size) > 100
            assert len(set(image.convert("L").tobytes())) > 2


def test_the_report_is_as_the_issue_says(whole):
    report = json.loads((whole / "report.json").read_text(), parse_constant=refuse_constant)
    assert set(report) == {"policies", "seconds", "seed"}
    assert tuple(report["policies"]) == POLICIES
    for row in report["policies"].values():
        assert set(row) == {"accuracy", "gmacs", "kept", "images_per_second"}
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["gmacs"] < 1
        assert row["images_per_second"] > 0
        assert len(row["kept"]) == 2
        assert all(0 <= share <= 1 for share in row["kept"])
    assert report["policies"]["dense"]["kept"] == [1, 1]
    assert report["seed"] == 3
    assert isinstance(report["seconds"], float)


def test_the_end_of_a_run_is_a_table(commands):
    lines = [line.split() for line in commands[1].stdout.splitlines()]
    for name in POLICIES:
        assert sum(line[:1] == [name] for line in lines) == 1
    assert lines[-1][-2:] == ["seed", "3"]


def test_metrics_of_every_iteration(whole):
    records = metrics(whole)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
    for record in records:
        assert {"policy_loss", "entropy", "reward", "lr", "accuracy", "keep_ratio"} <= set(record)
        # evaluated every three iterations and at the end
        evaluated = record["iteration"] in (3, 5)
        assert ("validation_accuracy" in record) == evaluated
        assert all(map(math.isfinite, record.values()))


def test_tensorboard_sees_the_same(whole):
    board = EventAccumulator(str(whole))
    board.Reload()
    for name in ("reward", "entropy", "validation_accuracy"):
        shown = {event.step: event.value for event in board.Scalars(name)}
        written = {r["iteration"]: r[name] for r in metrics(whole) if name in r}
        assert shown == pytest.approx(written)


def test_the_configuration_is_written(whole, tokens):
    written = RunFolder(whole)
    assert json.loads(written.config.read_text())["version"] == __version__
    assert written.read_settings(MappoConfig) == parse(tokens("whole"))


def test_the_policy_can_be_loaded(whole):
    actor = TokenActor(16 + 16 + 2 + 1, (8,), attention=34)
    actor.load_state_dict(load_file(whole / "policy.safetensors"))


def test_a_run_without_a_name_is_named_after_its_game_and_seed(monkeypatch):
    config = dataclasses.replace(defaults_for(SPREAD), seed=8)
    assert mappo.open_run(config)[0].path.match("runs/mpe2.simple_spread_v3-seed8-*")
    assert mappo.open_run(MappoConfig())[0].path.match("runs/token-prune-seed0-*")


# what an actor among whose agents there is attention is trained with
AMONG_AGENTS = {"actor_attention": 2, "minibatches": 1}


@pytest.mark.parametrize("critic", ["central", "none"])
def test_agents_that_attend_to_each_other_learn_and_go_on(critic, tokens, monkeypatch):
    """In parts as in one; a run that was stopped ends as the one that wasn't."""
    changes = AMONG_AGENTS | {"critic": critic}
    run(tokens("one", accumulate=1, **changes))
    run(tokens("parts", accumulate=3, **changes))
    weights = load_file("runs/one/policy.safetensors")
    assert weights["among_agents.output.weight"].abs().max() > 1e-3
    for key, other in load_file("runs/parts/policy.safetensors").items():
        torch.testing.assert_close(other, weights[key], rtol=1e-3, atol=1e-4)
    iterate = mappo.Trainer.iterate

    def stopped(trainer):
        if trainer.iteration == 3:
            raise KeyboardInterrupt
        return iterate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(mappo.Trainer, "iterate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tokens("stopped", accumulate=3, **changes))
    run(["--resume", "runs/stopped"])
    check_same(Path("runs/stopped"), Path("runs/parts"))
    assert PrunedViT.from_run("runs/one").policy.macs_per_pair > 0


@pytest.mark.parametrize(("critic", "inputs"), [("central", 35 + 35), ("local", 35)])
def test_the_papers_way(critic, inputs, tokens):
    run(
        tokens("r", reward="markov-game", rollouts_per_image=1, critic=critic, iterations=2,
               critic_hidden=(8,))
    )  # fmt: skip
    records = metrics("runs/r")
    assert len(records) == 2
    assert all(record["value_loss"] > 0 for record in records)
    Critic(inputs, (8,)).load_state_dict(load_file("runs/r/critic.safetensors"))


def test_pettingzoo_goes_through_the_same_code(whole_walk):
    report = json.loads((whole_walk / "report.json").read_text())
    assert set(report) == {"policies", "seconds", "seed"}
    assert set(report["policies"]) == {"learned"}
    assert all(value < 0 for value in report["policies"]["learned"].values())
    records = metrics(whole_walk)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
    # begun anew at each checkpoint, no episode of 15 steps ends in the first 10
    assert ["episode_return" in record for record in records] == [False, True, False, True, False]
    assert "validation_episode_return" in records[-1]
    for name in ("policy", "critic"):
        assert load_file(whole_walk / f"{name}.safetensors")
    assert (whole_walk / "curve.png").exists()
    assert not (whole_walk / "pruned.png").exists()


# --- what can't be begun or resumed ---


def test_a_run_is_not_overwritten(tokens):
    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    message = error_of(tokens("mine"))
    assert "runs/mine exists" in message
    assert "--resume runs/mine" in message
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_other_settings_do_not_go_with_resume(whole):
    message = error_of(["--resume", whole, "--lr", 0.5, "--hidden", 9, "--attention-prior", 0])
    assert message.endswith("leave out attention_prior, hidden, lr")
    assert error_of(["--env", SPREAD, "--resume", whole]).endswith("leave out env")


def edited(**changes):
    def edit(content):
        values = json.loads(content) | changes
        return json.dumps({k: v for k, v in values.items() if v is not ...}).encode()

    return edit


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", None, "is no run: it has no config.json"),
        ("config.json", lambda content: content[:-9], "config.json is damaged"),
        ("config.json", lambda content: b"[1, 2]", "config.json is damaged"),
        ("config.json", edited(epoques=3), "unknown settings: epoques"),
        ("config.json", edited(epochs=...), "missing settings: epochs"),
        ("config.json", edited(epochs="many"), "epochs='many' must be of type int"),
        ("config.json", edited(epochs=-3), "epochs=-3 must be at least 1"),
        ("config.json", edited(hidden=[9]), "checkpoint.safetensors doesn't fit the run"),
        ("config.json", edited(observation=["token", "cls_attention"]), "doesn't fit the run"),
        ("config.json", edited(critic="local"), "doesn't fit the run"),
        ("checkpoint.safetensors", lambda content: content[:-99], "is damaged"),
        ("checkpoint.safetensors", lambda content: b"", "is damaged"),
        ("metrics.jsonl", None, "metrics.jsonl can't be resumed"),
        ("metrics.jsonl", lambda content: content[:-5], "metrics.jsonl can't be resumed"),
        ("metrics.jsonl", lambda content: content.splitlines()[0], "has 1 of 5"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(name, damage, message, whole, tmp_path):
    folder = tmp_path / "damaged"
    # without what isn't read, so that nothing can be written either
    shutil.copytree(
        whole, folder, ignore=shutil.ignore_patterns("*.png", "report*", "policy*", "checkpoint-*")
    )
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert message in error_of(["--resume", folder])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "damaged")
    content = bytearray((folder / "checkpoint.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "checkpoint.safetensors").write_bytes(content)
    (folder / "checkpoint-1.safetensors").write_bytes(b"")
    run(["--resume", str(folder)])
    said = capsys.readouterr().err
    for name in ("checkpoint", "checkpoint-1"):
        assert f"warning: {folder / name}.safetensors is damaged" in said
    assert f"going on from {folder}/checkpoint-2.safetensors" in said
    check_same(folder, whole)


def test_the_checkpoint_of_another_backbone_is_named(whole, tokens, tmp_path, weights):
    wider = tmp_path / "wider.safetensors"
    shape = TINY | {"embed_dim": 32}
    model = create_backbone(num_classes=2, untrained=True, **shape)
    write_weights(wider, model.state_dict(), "digits_vit", 2, shape)
    folder = shutil.copytree(whole, tmp_path / "run")
    settings = json.loads((folder / "config.json").read_text())
    del settings["checkpoint_sha256"]  # runs of before 0.2 have none
    settings["checkpoint"] = str(wider)
    (folder / "config.json").write_text(json.dumps(settings))
    message = error_of(["--resume", folder])
    assert "doesn't fit the run" in message
    assert "size mismatch" in message


def test_a_policy_is_not_put_on_other_weights(whole, tmp_path, weights):
    other = tmp_path / "other.safetensors"
    model = create_backbone(num_classes=2, untrained=True, **TINY)
    write_weights(other, model.state_dict(), "digits_vit", 2, TINY)
    folder = shutil.copytree(whole, tmp_path / "run")
    PrunedViT.from_run(folder)
    described = (folder / "config.json").read_text()
    (folder / "config.json").write_text(described.replace(str(weights), str(other)))
    with pytest.raises(SavedModelError, match=r"other weights than those that .*run learned"):
        PrunedViT.from_run(folder)
    assert "holds other weights than those that" in error_of(["--resume", folder])


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"backbone": "digits_vita", "checkpoint": None}, ["digits_vita", "digits_vit"]),
        ({"backbone": "resnet18", "checkpoint": None}, ["ResNet can't be run on a part of its"]),
        ({"checkpoint": "none.safetensors"}, ["no checkpoint none.safetensors"]),
        ({"dataset": "folder:nowhere"}, ["no folder nowhere"]),
        ({"dataset": "digit"}, ["unknown dataset 'digit'", "digits"]),
        ({"reward": "applause"}, ["unknown reward 'applause'", "team", "markov-game"]),
        ({"reward": "released-code", "beta": 2.0}, ["'released-code' has no beta", "keep"]),
        ({"accuracy": "f1"}, ["unknown accuracy 'f1'", "agreement"]),
        ({"observation": ("token", "cls_attention", "smell")}, ["smell", "alive_fraction"]),
        ({"observation": ("token",)}, ["cls_attention", "--attention-prior 0"]),
        ({"redundancy_prior": 20}, ["redundancy: add it", "--redundancy-prior 0"]),
        ({"device": "abacus"}, ["device 'abacus' can't be used here"]),
        ({"num_envs": 18}, ["num_envs=18", "rollouts_per_image=4"]),
        ({"num_envs": 400}, ["100 different images, the dataset has 36"]),
        ({"prune_before": (1, 3)}, ["prune_before=(1, 3) is out of range", "0..2"]),
        ({"prune_before": (2, 1)}, ["must ascend"]),
    ],
)
def test_bad_names_and_values_are_named_at_once(settings, messages, tokens):
    arguments = tokens("r", **{k: v for k, v in settings.items() if v is not None})
    for name in [name for name, value in settings.items() if value is None]:
        place = arguments.index(f"--{name}")
        del arguments[place : place + 2]
    message = error_of(arguments)
    for part in messages:
        assert part in message
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        pytest.param(
            {"env": "pettingzoo:mpe2.simple_spraed_v3"},
            ["simple_spraed_v3", "simple_spread_v3"],
            marks=MPE2,
        ),
        ({"env": "pettingzoo:no_such_package"}, ["no_such_package"]),
        ({"env": "pettingzoo:json"}, ["'json' has no callable 'parallel_env'"]),
        pytest.param({"env": f"{SPREAD}:env"}, ["AECEnv"], marks=MPE2),
        pytest.param({"env": "pettingzoo:mpe2.simple_tag_v3"}, ["not homogeneous"], marks=MPE2),
        ({"env_kwargs": '{"players": 3}'}, ["players"]),
        pytest.param(
            {"env": SPREAD, "env_kwargs": '{"local_ratio": 3}'}, ["local_ratio"], marks=MPE2
        ),
        ({"device": "abacus"}, ["device 'abacus' can't be used here"]),
    ],
)
def test_bad_games_are_named_at_once(settings, messages, walks):
    message = error_of(walks("r", **settings))
    for part in messages:
        assert part in message
    assert not Path("runs").exists()


# --- what goes wrong on the way ---


def iteration_of(folder):
    return load_checkpoint(folder / "checkpoint.safetensors")["iteration"]


@pytest.mark.parametrize(
    ("name", "count"),
    [("config.json", 1), ("metrics.jsonl", 2), ("checkpoint.safetensors", 2),
     ("policy.safetensors", 1), ("pruned.png", 1)],
)  # fmt: skip
def test_a_full_disk_leaves_what_was_there(name, count, tokens, whole, monkeypatch):
    replace, written = Path.replace, []

    def fail(path, target):
        written.append(target.name)
        if written.count(name) == count and target.name == name:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", fail)
        message = error_of(tokens("r"))
    folder = Path("runs/r")
    begun = "" if name == "config.json" else f"; continue with --resume {folder}"
    full = f"error: [Errno 28] could not write {folder / name}: No space left on device"
    assert message == full + begun
    assert not list(folder.glob(".*"))
    if name == "config.json":
        run(tokens("r"))
    else:
        assert iteration_of(folder) == (2 if count == 2 else COMMON["iterations"])
        run(["--resume", str(folder)])
    check_same(folder, whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_tensorboard_is_one_line_too(tokens, whole, monkeypatch):
    write, written = RecordWriter.write, []

    def fail(*args):  # in a thread of TensorBoard's own
        written.append(0)
        if len(written) > 20:  # of the third iteration
            raise OSError(28, "No space left on device")
        return write(*args)

    with monkeypatch.context() as context:
        context.setattr(RecordWriter, "write", fail)
        message = error_of(tokens("r"))
    assert message == "error: [Errno 28] No space left on device; continue with --resume runs/r"
    assert iteration_of(Path("runs/r")) == 2
    run(["--resume", "runs/r"])
    check_same(Path("runs/r"), whole)


# Fills the disk that it runs on, beginning when the second iteration is saved.
FILLER = """
import json, sys
from prunevit.trainers import mappo
from prunevit.trainers.common import run

save = run.save_checkpoint

def save_and_fill(path, tree):
    save(path, tree)
    run.save_checkpoint = save
    with open("filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            pass

run.save_checkpoint = save_and_fill
mappo.main(json.loads(sys.argv[1]))
"""
# what is mounted in a name space is gone with it: the run is carried out of there
ON_A_SMALL_DISK = """
mkdir disk && mount -t tmpfs -o size=4m tmpfs disk || exit 99
(cd disk && "$@")
code=$?
cp -r disk/runs/r .
exit $code
"""


@pytest.mark.stress
def test_a_disk_that_fills_up_is_one_line_and_the_last_checkpoint_is_intact(tokens, whole):
    name_space = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*name_space, "true"]).returncode:
        pytest.skip("needs user namespaces, which this system does not allow")
    script = [sys.executable, "-c", FILLER, json.dumps(list(map(str, tokens("r"))))]
    ended = subprocess.run(
        [*name_space, "sh", "-c", ON_A_SMALL_DISK, "sh", *script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode == 99:
        pytest.skip("needs a tmpfs of its own, which this system does not mount")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "error: [Errno 28] could not write runs/r/metrics.jsonl: No space left on device; "
        "continue with --resume runs/r"
    )
    assert "Traceback" not in ended.stderr
    assert iteration_of(Path("r")) == 2
    assert not list(Path("r").glob(".*"))
    run(["--resume", "r"])
    check_same(Path("r"), whole)


def poisoned(function, count, poison):
    """``function``, whose result goes through ``poison`` from the ``count``-th call on."""
    calls = []

    def call(*args, **kwargs):
        calls.append(0)
        result = function(*args, **kwargs)
        return poison(result) if len(calls) >= count else result

    return call


def not_finite(x):
    return x * math.inf - x * math.inf


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


PLAYS = 2  # the stages of an iteration
# name: which function fails from when on, and how: always in the fourth iteration
FAULTS = {
    "reward": (
        BatchedTokenPrune, "step", 3 * PLAYS + 1,
        lambda transition: dataclasses.replace(transition, reward=transition.reward / 0),
    ),
    "value_loss": (mappo, "value_loss", 3 * STEPS + 1, not_finite),
    "policy_loss": (mappo, "policy_loss", 3 * STEPS + 1, not_finite),
    "grad_norm": (mappo, "policy_loss", 3 * STEPS + STEPS, NanGradient.apply),
}  # fmt: skip


@pytest.mark.parametrize("term", FAULTS)
def test_what_is_not_finite_stops_the_run_before_it_is_saved(term, tokens, whole, monkeypatch):
    owner, name, count, poison = FAULTS[term]
    critic = {"critic": "local", "critic_hidden": (8,)} if term == "value_loss" else {}
    reset, played = BatchedTokenPrune.reset, []

    def watch(env, *args):
        observed = reset(env, *args)
        played.append(env.indices[::4].tolist())
        return observed

    with monkeypatch.context() as context:
        context.setattr(BatchedTokenPrune, "reset", watch)
        context.setattr(owner, name, poisoned(getattr(owner, name), count, poison))
        message = error_of(tokens("r", **critic))
    assert f"error: the {term} of iteration 4 is not finite" in message
    assert len(played) == 4
    assert f"playing training images {' '.join(map(str, played[3]))}" in message
    assert message.endswith("; iteration 3 is saved")
    assert iteration_of(Path("runs/r")) == 3
    state = load_checkpoint(Path("runs/r/checkpoint.safetensors"))
    assert all(tensor.isfinite().all() for tensor in state["learner"].values())
    # what was saved is what a run without the fault is after three iterations
    run(["--resume", "runs/r"])
    if critic:
        run(tokens("sound", **critic))
    check_same(Path("runs/r"), Path("runs/sound") if critic else whole)


def test_other_games_say_what_they_played(monkeypatch, walks, walk):
    monkeypatch.setattr(mappo, "policy_loss", poisoned(mappo.policy_loss, 1, not_finite))
    message = error_of(walks("r"))
    assert f"policy_loss of iteration 1 is not finite, playing 2 episodes of {walk}" in message


def test_bad_images_are_named_or_skipped(tokens, photographs, tmp_path, capsys):
    root = shutil.copytree(photographs.removeprefix("folder:"), tmp_path / "images")
    for name in ("train/dark/3.png", "test/bright/0.png"):
        (root / name).write_bytes(b"")
    changes = {"dataset": f"folder:{root}", "rollouts_per_image": 1, "critic": "local"}
    message = error_of(tokens("r", num_envs=30, critic_hidden=(8,), **changes))
    assert f"{root}/train/dark/3.png can't be read as an image" in message
    shutil.rmtree("runs")
    capsys.readouterr()
    run([*tokens("r", num_envs=30, critic_hidden=(8,), **changes), "--skip-bad-images"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2 damaged images are skipped"
    assert {line.split(" ")[0] for line in lines[1:3]} == {
        f"{root}/train/dark/3.png", f"{root}/test/bright/0.png",
    }  # fmt: skip
    assert tuple(report_of("runs/r")["policies"]) == POLICIES


def test_a_learning_rate_out_of_bounds_is_noticed(tokens):
    assert "not finite" in error_of(tokens("r", lr=1e12))


def test_compiled_blocks_play_the_same_game(tokens, whole, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: calls.append(function) or function)
    compile_block.cache_clear()
    run([*tokens("compiled"), "--compile"])
    compile_block.cache_clear()
    check_same(Path("runs/compiled"), whole)
    assert calls == [torch.sin, packed_block]  # whether it can be done at all, and what was asked
