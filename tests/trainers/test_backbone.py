import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.layers import PatchDropout
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from prunevit.envs.data import cluttered_digits
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_sources import DatasetError
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import BackboneError, sha256
from prunevit.trainers import backbone
from prunevit.trainers.backbone import BackboneConfig, main, train
from prunevit.trainers.common import classification, epochs
from prunevit.trainers.common.checkpoint import CheckpointError
from prunevit.trainers.common.distributed import Ranks
from prunevit.trainers.common.evaluation import accuracy
from prunevit.trainers.common.run import RunFolder, TrainingError

VIT = "vit_tiny_patch16_224"
# dropout, stochastic depth and mixup draw from generators that a resumed run has to find again
DRAWING = {"proj_drop_rate": 0.1, "drop_path_rate": 0.1}
MODEL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2} | DRAWING


@pytest.fixture(scope="module")
def photographs(make_photographs):
    return make_photographs(train=50, test=20, shape=(20, 20, 3), suffix=".jpg")


@pytest.fixture
def config(photographs, tmp_path, monkeypatch):
    """A run of a second, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return BackboneConfig(
        backbone=VIT,
        model_kwargs=MODEL,
        dataset=photographs,
        augmentation={"auto_augment": "rand-m5-mstd0.5", "scale": [0.5, 1]},
        epochs=3,
        batch_size=16,
        lr=5e-3,
        ema_decay=0.9,
        device="cpu",
        run_name="r",
    )


def read_metrics(run):
    lines = (Path("runs") / run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def same_run(a, b):
    files = [Path("runs") / run / "backbone.safetensors" for run in (a, b)]
    reports = [json.loads((file.parent / "report.json").read_text()) for file in files]
    return (
        files[0].read_bytes() == files[1].read_bytes()
        and read_metrics(a) == read_metrics(b)
        and reports[0]["test_accuracy"] == reports[1]["test_accuracy"]
    )


# --- what is computed ---


def test_the_recipe_of_the_shipped_weights(tmp_path, monkeypatch):
    """The default run, cut short, against the same recipe written out once more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluttered_digits, "DEFAULT_SIZES", {"validation": 20, "test": 20})
    config = BackboneConfig(epochs=3, epoch_size=18, batch_size=16, device="cpu")
    train(config)

    torch.manual_seed(0)
    model = create_backbone(untrained=True).train().to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=0.999, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    for step, (draw, rate) in enumerate([(1, 2e-3), (2, 2e-3), (3, 1e-3)]):
        # none of the patches are left out of the first step, then a third and two thirds of 75%
        model.patch_drop = PatchDropout(0.75 * step / 3)
        torch.manual_seed(draw)
        images = open_images("digits", "train", {}, size=18, seed=draw, augment=True)
        order = torch.randperm(18, generator=torch.Generator().manual_seed(draw))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, labels = images.load(order[:16])
        logits = model(inputs.to(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step=step)
    trained = load_file("runs/backbone/backbone.safetensors")
    expected = ema.module.state_dict()
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[key], expected[key]) for key in trained)


@pytest.mark.parametrize(
    "mixing", [{}, {"mixup": 0.2, "cutmix": 1.0}, {"optimizer": "nmuon", "lr": 5e-3}]
)
def test_it_learns(config, mixing):
    report = train(replace(config, epochs=8, augmentation={}, **mixing))
    losses = [record["loss"] for record in read_metrics("r")]
    assert losses[-1] < losses[0] - 0.1
    assert report["test_accuracy"] > 0.9


# --- what is written ---


def test_a_run_tells_all_about_itself(config):
    report = train(config)
    folder = Path("runs/r")
    assert json.loads((folder / "report.json").read_text()) == report
    described = json.loads((folder / "backbone.json").read_text())
    weights = folder / "backbone.safetensors"
    assert described["sha256"] == sha256(weights)
    assert described["class_names"] == ["bright", "dark"]
    for facts in (report, described):
        assert facts["seed"] == 0
        assert facts["config"]["model_kwargs"] == MODEL
        assert facts["config"]["dataset"] == config.dataset
        assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["seconds"] > 0
    assert read_metrics("r")[-1]["validation_accuracy"] == report["validation_accuracy"]
    model = create_backbone(VIT, checkpoint=weights)
    test = open_images(config.dataset, "test", resolve_model_data_config(model))
    assert accuracy(model, test, torch.device("cpu")) == report["test_accuracy"]
    assert not list(folder.glob(".*"))


def test_the_test_split_is_read_once_at_the_end(config, monkeypatch):
    reads = []

    class Watched:
        def __init__(self, split, images):
            self.split, self.images = split, images
            self.num_classes, self.class_names = images.num_classes, images.class_names

        def __len__(self):
            return len(self.images)

        def load(self, indices):
            reads.append(self.split)
            return self.images.load(indices)

    def watch(dataset, split, *args, **kwargs):
        return Watched(split, open_images(dataset, split, *args, **kwargs))

    for module in (backbone, classification):
        monkeypatch.setattr(module, "open_images", watch)
    train(config)
    assert reads == (["train"] * 5 + ["validation"]) * 3 + ["test"]


def test_another_seed_is_another_run(config, run_once):
    whole = run_once(train, config)
    train(config)
    train(replace(config, seed=1, run_name="other"))
    assert same_run(whole, "r")
    assert not same_run("r", "other")


def test_a_checkpoint_is_where_training_begins(config, run_once):
    start = run_once(train, config) / "backbone.safetensors"
    train(replace(config, checkpoint=start, lr=1e-12, epochs=1, run_name="tuned"))
    before, after = load_file(start), load_file("runs/tuned/backbone.safetensors")
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


@pytest.mark.parametrize(
    ("what", "learns"),
    [
        ("all", ("head.",)),
        ("blocks:1", ("blocks.1.", "norm.", "head.")),
        ("blocks:2", ("norm.", "head.")),
    ],
)
def test_what_is_frozen_keeps_its_weights(config, run_once, what, learns):
    start = run_once(train, config) / "backbone.safetensors"
    train(replace(config, checkpoint=start, freeze=what, epochs=1, run_name="tuned"))
    before, after = load_file(start), load_file("runs/tuned/backbone.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.startswith(learns)
    }


def test_a_frozen_run_goes_on_as_it_began(config, run_once, monkeypatch):
    start = run_once(train, config) / "backbone.safetensors"
    frozen = replace(
        config, checkpoint=start, freeze="blocks:1", layer_decay=0.5, epochs=2, run_name="whole"
    )
    train(frozen)
    with monkeypatch.context() as context:
        context.setattr(RunFolder, "save", stop_after_an_epoch(RunFolder.save))
        with pytest.raises(KeyboardInterrupt):
            train(replace(frozen, run_name="cut"))
    train(BackboneConfig(resume=Path("runs/cut")))
    assert same_run("whole", "cut")


def test_early_layers_learn_more_slowly(config, run_once):
    start = run_once(train, config) / "backbone.safetensors"
    train(replace(config, checkpoint=start, layer_decay=1e-3, epochs=1, run_name="tuned"))
    before, after = load_file(start), load_file("runs/tuned/backbone.safetensors")
    moved = {name: float((before[name] - after[name]).abs().max()) for name in before}
    layers = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight")
    assert 0 < moved[layers[0]] < 0.01 * moved[layers[1]] < 1e-4 * moved[layers[2]]
    assert moved[layers[2]] < 0.01 * moved["head.weight"]


def test_the_arguments_of_a_checkpoints_model_need_not_be_given_again(
    config, run_once, monkeypatch
):
    """Neither to begin with it, nor to go on, nor to load what comes of it."""
    start = run_once(train, config) / "backbone.safetensors"
    tuned = replace(config, checkpoint=start, model_kwargs={}, epochs=2, run_name="tuned")
    with monkeypatch.context() as context:
        context.setattr(RunFolder, "save", stop_after_an_epoch(RunFolder.save))
        with pytest.raises(KeyboardInterrupt):
            train(tuned)
    train(BackboneConfig(resume=Path("runs/tuned")))
    described = json.loads(Path("runs/tuned/backbone.json").read_text())
    assert described["model_kwargs"] == config.model_kwargs
    model = create_backbone(config.backbone, checkpoint=Path("runs/tuned/backbone.safetensors"))
    weights = load_file("runs/tuned/backbone.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def stop_after_an_epoch(save):
    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    return save_and_stop


# --- to be resumed ---


def kill_at_step(config, step, tmp_path):
    """Runs ``config`` in another process, which SIGKILLs itself in the midst of an epoch."""
    code = (
        "import os, signal, sys\n"
        "from prunevit.trainers import backbone\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "learn = backbone.Learner.learn\n"
        "def learn_or_die(self, inputs, targets, step):\n"
        f"    if step == {step}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return learn(self, inputs, targets, step)\n"
        "backbone.Learner.learn = learn_or_die\n"
        "backbone.main()\n"
    )
    arguments = []
    for name, value in config.to_json().items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            arguments += [f"--{flag}", text]
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, check=False)


@pytest.mark.stress
def test_a_killed_run_goes_on_as_if_nothing_had_been(config, tmp_path):
    config = replace(
        config, mixup=0.2, cutmix=1.0, model_kwargs=MODEL | {"embed_layer": "conv_stem"}
    )
    train(replace(config, run_name="whole"))
    steps_an_epoch = 5
    killed = kill_at_step(config, 2 * steps_an_epoch + 3, tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert len(read_metrics("r")) == 2
    assert not Path("runs/r/report.json").exists()
    train(BackboneConfig(resume=Path("runs/r")))
    assert same_run("whole", "r")


@pytest.mark.parametrize("ending", ["stopped", "killed"])
def test_an_epoch_that_was_cut_off_is_not_lost(config, run_once, monkeypatch, ending):
    config = replace(
        config, mixup=0.2, cutmix=1.0, model_kwargs=MODEL | {"embed_layer": "conv_stem"}
    )
    whole = run_once(train, config)
    last, learn, taken = 8, classification.Learner.learn, []

    def learn_to_the_end(self, inputs, targets, step):
        taken.append(step)
        if len(taken) == last + 1 and ending == "killed":
            raise RuntimeError("killed")
        if len(taken) == last + 1:
            os.kill(os.getpid(), signal.SIGINT)  # in the midst of a step
        return learn(self, inputs, targets, step)

    monkeypatch.setattr(classification.Learner, "learn", learn_to_the_end)
    monkeypatch.setattr(epochs, "SAVE_SECONDS", 0.0 if ending == "killed" else 1e9)
    # a shell has what it starts in the background ignore Ctrl-C
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(RuntimeError if ending == "killed" else KeyboardInterrupt) as ended:
            train(replace(config, workers=1))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not multiprocessing.active_children()
    if ending == "stopped":
        assert ended.value.__notes__[0] == "4 steps of epoch 2 are saved"
    assert len(read_metrics("r")) == 1
    train(BackboneConfig(resume=Path("runs/r")))
    assert taken[last + 1] == (last if ending == "killed" else last + 1)
    assert same_run(whole, "r")


def test_many_ranks_can_not_go_on_from_within_an_epoch_of_one(tmp_path):
    class Two(Ranks):
        count = 2

    RunFolder(tmp_path).save({"epoch": 0, "place": {"losses": torch.ones(3)}})
    assert RunFolder(tmp_path).load()["epoch"] == 0
    with pytest.raises(CheckpointError, match="only a single process can continue it"):
        RunFolder(tmp_path, Two()).load()


@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoint.safetensors", "backbone.json"])
def test_a_run_whose_disk_is_full_can_be_resumed(config, run_once, monkeypatch, file):
    whole = run_once(train, config)
    replace_file = Path.replace

    def fail(path, target):
        written.append(target.name)
        if target.name == file and written.count(file) == (1 if file == "backbone.json" else 2):
            raise OSError(28, "No space left on device")
        return replace_file(path, target)

    written = []
    with monkeypatch.context() as context:
        context.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space left on device"):
            train(config)
    train(BackboneConfig(resume=Path("runs/r")))
    assert same_run(whole, "r")


def test_a_run_that_never_ended_an_epoch_begins_anew(config, run_once, monkeypatch):
    whole = run_once(train, config)
    with monkeypatch.context() as context:
        context.setattr(epochs, "train_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    train(BackboneConfig(resume=Path("runs/r")))
    assert same_run(whole, "r")


def test_a_finished_run_can_be_finished_again(config):
    train(config)
    before = Path("runs/r/backbone.json").read_text()
    seconds = json.loads(Path("runs/r/report.json").read_text())["seconds"]
    report = train(BackboneConfig(resume=Path("runs/r")))
    assert Path("runs/r/backbone.json").read_text() == before
    assert len(read_metrics("r")) == 3
    assert report["seconds"] > 0.5 * seconds


def test_a_run_is_not_overwritten(config):
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/mine.txt").write_text("mine")
    with pytest.raises(TrainingError, match=r"runs/r exists.*--resume runs/r"):
        train(config)
    assert [path.name for path in Path("runs/r").iterdir()] == ["mine.txt"]


def test_other_options_do_not_go_with_resume(config):
    RunFolder(Path("runs/r")).create(config)
    with pytest.raises(TrainingError, match="leave out epochs, lr"):
        train(BackboneConfig(resume=Path("runs/r"), lr=0.1, epochs=2))


def test_what_can_not_be_resumed_is_named(config):
    resume = BackboneConfig(resume=Path("runs/r"))
    with pytest.raises(CheckpointError, match=r"runs/r is no run"):
        train(resume)
    train(replace(config, epochs=1))
    folder = Path("runs/r")
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    described = json.loads(contents["config.json"])

    def edited(**changes):
        return json.dumps(described | changes).encode()

    for file in Path("runs/r").glob("checkpoint-*"):
        file.unlink()
    for name, content, message in (
        ("config.json", b'{"epochs": ', "config.json is damaged"),
        ("config.json", edited(epoques=3), "unknown settings: epoques"),
        ("config.json", edited(epochs=-3), "epochs=-3 must be at least 1"),
        ("config.json", edited(model_kwargs=MODEL | {"depth": 1}), r"fit the run.*blocks\.1"),
        ("checkpoint.safetensors", contents["checkpoint.safetensors"][:-9], "damaged"),
        ("metrics.jsonl", b"", "lacks records"),
        ("metrics.jsonl", b"{", "can't be resumed"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            train(resume)
        (folder / name).write_bytes(contents[name])
    train(resume)


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backbone": "vit_tiny_patch61_224"}, BackboneError, "vit_tiny_patch16_224"),
        ({"model_kwargs": {"depht": 3}}, BackboneError, "depht"),
        ({"checkpoint": Path("w.safetensors")}, BackboneError, r"no checkpoint w\.safetensors"),
        ({"dataset": "digit"}, DatasetError, "unknown dataset 'digit'"),
        ({"dataset": "digits", "augmentation": {}}, DatasetError, "1x64x64.*3x16x16"),
        ({"augmentation": {"flip": 1}}, DatasetError, "flip"),
        ({"batch_size": 91}, TrainingError, "90 training images.*91"),
        ({"epoch_size": 9}, TrainingError, "9 training images.*16"),
        ({"device": "abacus"}, ValueError, "abacus"),
        ({"backbone": "resnet18", "model_kwargs": {}}, TrainingError, "resnet18 has no patch drop"),
        ({"freeze": "blocks:3"}, TrainingError, "--freeze blocks:3: the backbone has 2 blocks"),
        ({"lr": 1e12, "epochs": 1}, TrainingError, "not finite"),
    ],
)
def test_bad_input_is_named_at_once(config, change, error, message, run_once):
    if "freeze" in change:
        change = change | {"checkpoint": run_once(train, config) / "backbone.safetensors"}
    with pytest.raises(error, match=message):
        train(replace(config, **change))
    if "lr" not in change:
        assert not Path("runs").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"label_smoothing": 1.0},
        {"mixup": -1.0},
        {"cutmix": -1.0},
        {"cutmix": 1.0, "batch_size": 15},
        {"patch_dropout": 1.0},
        {"model_kwargs": {"num_classes": 3}},
        {"freeze": "block:3"},
        {"freeze": "all"},  # of random weights
        {"layer_decay": 0.0},
    ],
)
def test_values_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        BackboneConfig(**change)


def test_a_training_without_a_finite_loss_keeps_the_last_epoch(config, monkeypatch):
    learn = backbone.Learner.learn
    monkeypatch.setattr(
        backbone.Learner,
        "learn",
        lambda self, inputs, targets, step: (
            learn(self, inputs, targets, step) * (math.nan if step == 7 else 1)
        ),
    )
    with pytest.raises(TrainingError, match="not finite"):
        train(config)
    assert len(read_metrics("r")) == 1


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["backbone", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nope"], "error: unknown dataset 'nope'"),
        (["--backbone", "nope"], "error: unknown backbone 'nope'"),
        (["--resume", "runs/nope"], "error: runs/nope is no run"),
        (["--resume", "runs/nope", "--epochs", "3"], "error: runs/nope is no run"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_a_line(config, monkeypatch, arguments, message):
    code = run_main(monkeypatch, *arguments)
    assert code.startswith(message)
    assert "\n" not in code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-kwargs", "{"], "--model-kwargs"),
        (["--augmentation", "3"], "expected a JSON object"),
        (["--epochs", "0"], "epochs=0 must be at least 1"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_the_command_line_refuses_what_it_can_not_read(monkeypatch, capsys, arguments, message):
    assert run_main(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert message in output.err + output.out


def test_the_command_line_trains(config, monkeypatch, capsys):
    options = {
        "--backbone": VIT,
        "--model-kwargs": json.dumps(MODEL),
        "--dataset": config.dataset,
        "--epochs": "1",
        "--batch-size": "32",
        "--run-name": "by-hand",
    }
    arguments = [part for option in options.items() for part in option]
    monkeypatch.setattr(sys, "argv", ["backbone", *arguments])
    main()
    assert "test accuracy" in capsys.readouterr().out
    assert Path("runs/by-hand/report.json").exists()
