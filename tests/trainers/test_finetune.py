import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, save_file
from timm.data import resolve_model_data_config
from torch import nn

from prunevit.agents import KeepAll, PrunedViT, TopK
from prunevit.agents.policies.serialization import SavedModelError, learned_policy
from prunevit.envs.data.cluttered_digits import ClutteredDigits
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_sources import DatasetError
from prunevit.envs.observations import View
from prunevit.envs.vit import execution
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers import finetune
from prunevit.trainers.common import classification
from prunevit.trainers.common.checkpoint import CheckpointError, load_checkpoint, write_json
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.evaluation import accuracy, evaluate
from prunevit.trainers.common.run import RunFolder, TrainingError
from prunevit.trainers.finetune import Distillation, FinetuneConfig, freeze, main, train

# with BatchNorm in its stem; dropout and stochastic depth would draw if they were on
TINY = {
    "patch_size": 16, "embed_dim": 16, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0,
    "proj_drop_rate": 0.1, "drop_path_rate": 0.1,
}  # fmt: skip
STAGES = (1, 3)
STEPS = 4  # an epoch


@pytest.fixture(scope="module")
def photographs(make_photographs):
    return make_photographs(train=40, test=2)


def spread_out(model, seed):
    """Random weights far from their initialisation, statistics of norms too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            spread = torch.randn(tensor.shape, generator=generator) * 0.3
            tensor += spread.abs() if name.endswith("running_var") else spread


@torch.no_grad()
def balance(policy, staged, images):
    """Random decisions, about as many to keep as to prune at the first stage."""
    actor = policy.actor
    nn.init.normal_(actor.net[-1].weight, generator=torch.Generator().manual_seed(1))
    tokens = staged.begin(images.load(range(20))[0])
    logits = policy.logits(View(staged, tokens, 0, torch.full((20,), 0.1)))
    actor.keep_bias -= (logits[:, 1] - logits[:, 0]).median() / actor.PRIOR_SPEED


@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory):
    """A finished run of ``trainers.mappo``, as far as it matters here: ``trained(**settings)``."""

    def write(**settings):
        folder = tmp_path_factory.mktemp("runs") / "some"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return write_to(folder, settings)

    def write_to(folder, settings):
        model = create_backbone(num_classes=2, untrained=True, **TINY)
        spread_out(model, seed=0)
        weights = folder.parent / "tiny.safetensors"
        write_weights(weights, model.state_dict(), "digits_vit", 2, TINY)
        config = MappoConfig(
            checkpoint=weights, dataset=photographs, prune_before=STAGES, hidden=(8,)
        ).to_json()
        config |= settings
        staged = StagedViT(model, STAGES)
        fields = list(config["observation"])
        alpha = 0.1 if "alpha" in fields else None
        policy = learned_policy(staged, fields, [8], True, alpha)
        balance(policy, staged, open_images(photographs, "train", resolve_model_data_config(model)))
        write_json(folder / "config.json", config)
        save_file(policy.actor.state_dict(), folder / "policy.safetensors")
        return folder

    return write


@pytest.fixture(scope="module")
def run(trained):
    return trained()


@pytest.fixture
def config(run, tmp_path, monkeypatch):
    """A fine-tuning of a second, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return FinetuneConfig(
        run=run,
        augmentation={"scale": [0.5, 1]},
        epochs=2,
        batch_size=16,
        lr=3e-3,
        ema_decay=0.5,
        device="cpu",
        run_name="r",
    )


def read_metrics(run):
    lines = (Path("runs") / run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def weights_of(run):
    return load((Path("runs") / run / "model" / "model.safetensors").read_bytes())


def same_run(a, b):
    first, second = weights_of(a), weights_of(b)
    same = all(torch.equal(first[key], second[key]) for key in first)
    return same and first.keys() == second.keys() and read_metrics(a) == read_metrics(b)


def frozen_names(first_block):
    """Prefixes of the names of what runs before a block."""
    before = [
        "patch_embed",
        "cls_token",
        "pos_embed",
        *(f"blocks.{i}." for i in range(first_block)),
    ]
    return tuple(f"backbone.model.{name}" for name in before)


# --- what is computed ---


class Fixed(nn.Module):
    """Answers the same whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits


@pytest.mark.parametrize(("distillation", "labels"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)])
def test_the_loss_is_divergence_from_the_teacher_and_cross_entropy(distillation, labels):
    student, teacher = Fixed([[1.0, -1.0], [0.5, 0.3]]), Fixed([[2.0, 0.0], [-1.0, 0.4]])
    config = FinetuneConfig(distillation=distillation, labels=labels)
    loss = Distillation(teacher, config)(student, torch.zeros(2, 1), torch.tensor([1, 0]), 0)
    p, q = teacher.logits.softmax(1), student.logits.softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    cross_entropy = -(q[0, 1].log() + q[1, 0].log()) / 2
    expected = distillation * divergence + labels * cross_entropy
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.logits.grad.norm() > 0
    assert teacher.logits.grad is None


MODELS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers, norms": ("vit_base_patch16_clip_224", {"reg_tokens": 2}),
    "attention pooling": ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
    "rotary": ("eva02_tiny_patch14_224", {"init_values": 0.5}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.5}),
    "stem": ("vit_tiny_patch16_224", {"embed_layer": "conv_stem"}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("frozen", "first"), [("before-first-stage", 1), ("before-last-stage", 3)])
@pytest.mark.parametrize("prune_at", ["block", "mlp"])
def test_frozen_is_whatever_the_tokens_of_a_stage_depend_on(
    make_vit, name, frozen, first, prune_at
):
    timm_name, kwargs = MODELS[name]
    if "embed_layer" in kwargs:
        vit = create_backbone(timm_name, img_size=32, patch_size=8, depth=4, **kwargs)
    else:
        vit = make_vit(timm_name, **kwargs)
    staged = StagedViT(vit, (first,), prune_at=prune_at)
    images = torch.randn(2, *staged.image_shape, generator=torch.Generator().manual_seed(0))
    vit.requires_grad_(True)
    seen = staged.begin(images).x.square().sum()
    gradients = torch.autograd.grad(seen, list(vit.parameters()), allow_unused=True)
    fields = ["token", "stage"]
    backbone = StagedViT(vit, STAGES, prune_at=prune_at)
    model = PrunedViT(backbone, learned_policy(backbone, fields, [], False))
    freeze(model, frozen)
    for (parameter, tensor), gradient in zip(vit.named_parameters(), gradients, strict=True):
        assert tensor.requires_grad == (gradient is None), parameter
    assert not any(tensor.requires_grad for tensor in model.policy.parameters())


@pytest.mark.parametrize(
    ("frozen", "first"), [("nothing", 0), ("before-first-stage", 1), ("before-last-stage", 3)]
)
def test_policy_statistics_and_what_is_frozen_stay(config, frozen, first):
    train(replace(config, frozen=frozen))
    before, after = PrunedViT.from_run(config.run).state_dict(), weights_of("r")
    assert before.keys() == after.keys()
    kept = ("policy.", *(frozen_names(first) if first else ()))
    for name, tensor in before.items():
        stays = name.startswith(kept) or "running_" in name or "num_batches" in name
        assert torch.equal(tensor, after[name]) == stays, name


def test_decisions_stay_as_they_were_where_all_before_the_last_stage_is_frozen(config, photographs):
    train(replace(config, frozen="before-last-stage"))
    before, after = PrunedViT.from_run(config.run), PrunedViT.from_pretrained("runs/r/model")
    data_config = resolve_model_data_config(before.backbone.model)
    images, _ = open_images(photographs, "train", data_config).load(range(20))
    trace, expected = after.trace(images), before.trace(images)
    assert torch.equal(trace.alive, expected.alive)
    assert 0 < trace.alive.float().mean() < 1
    assert len(trace.alive.sum((1, 2)).unique()) > 1
    assert not torch.allclose(trace.logits, expected.logits, atol=1e-3)
    gmacs = [record["validation_gmacs"] for record in read_metrics("r")]
    assert len(set(gmacs)) == 1


def test_packed_and_masked_execution_learn_the_same(config, monkeypatch):
    """Weights may differ where they don't matter: Adam steps as far on a gradient of mere noise."""
    config = replace(config, frozen="nothing")
    masked_block, calls = execution.masked_block, []
    monkeypatch.setattr(
        execution, "masked_block", lambda *args: calls.append(1) or masked_block(*args)
    )
    train(config)
    assert not calls
    train(replace(config, execution="masked", run_name="masked"))
    assert calls
    for packed, masked in zip(read_metrics("r")[1:], read_metrics("masked")[1:], strict=True):
        assert packed["loss"] == pytest.approx(masked["loss"], abs=1e-4)
    images, _ = ClutteredDigits("validation", 20).load(range(20))
    packed, masked = (
        PrunedViT.from_pretrained(f"runs/{name}/model")(images) for name in ("r", "masked")
    )
    torch.testing.assert_close(packed, masked, rtol=0, atol=1e-3)


@pytest.mark.parametrize("weights", [{"labels": 0.0}, {"distillation": 0.0, "labels": 1.0}])
def test_it_learns(config, weights):
    train(replace(config, epochs=6, augmentation={"scale": [1, 1]}, **weights))
    losses = [record["loss"] for record in read_metrics("r")[1:]]
    assert losses[-1] < 0.7 * losses[0]


# --- what is written ---


def test_a_run_tells_all_about_itself(config):
    report = train(config)
    folder = Path("runs/r")
    assert json.loads((folder / "report.json").read_text()) == report
    assert not list(folder.glob(".*"))
    records = read_metrics("r")
    assert [record["epoch"] for record in records] == [0, 1, 2]

    tuned, run = PrunedViT.from_pretrained(folder / "model"), PrunedViT.from_run(config.run)
    data_config = resolve_model_data_config(run.backbone.model)
    dataset = json.loads((config.run / "config.json").read_text())["dataset"]
    validation = open_images(dataset, "validation", data_config)
    assert report["validation_images"] == len(validation) == 8
    models = report["models"]
    for model, name, record in ((run, "pruned", records[0]), (tuned, "fine-tuned", records[-1])):
        expected = evaluate(model, validation)
        assert models[name]["accuracy"] == expected.accuracy == record["validation_accuracy"]
        assert models[name]["gmacs"] == expected.gmacs == record["validation_gmacs"]
        assert models[name]["kept"] == list(expected.kept) == record["validation_kept"]
    for vit, name in (
        (run.backbone.model, "dense"),
        (tuned.backbone.model, "fine-tuned, unpruned"),
    ):
        expected = accuracy(vit, validation, torch.device("cpu"))
        assert models[name]["accuracy"] == expected
        assert models[name]["gmacs"] == run.backbone.dense_macs / 1e9
    assert report["config"]["run"] == str(config.run)
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_averaged_weights_are_saved(config, run_once):
    whole = run_once(train, config)
    state = load_checkpoint(whole / "checkpoint.safetensors")
    written = weights_of(whole)
    assert all(torch.equal(tensor, written[name]) for name, tensor in state["ema"].items())
    assert not all(torch.equal(tensor, written[name]) for name, tensor in state["model"].items())


def test_the_test_split_is_not_opened(config, monkeypatch):
    opened = set()

    def watch(dataset, split, *args, **kwargs):
        opened.add(split)
        return open_images(dataset, split, *args, **kwargs)

    for module in (finetune, classification):
        monkeypatch.setattr(module, "open_images", watch)
    train(replace(config, epochs=1))
    assert opened == {"train", "validation"}


def test_the_run_is_named_after_the_one_it_tunes(config):
    train(replace(config, epochs=1, run_name=None))
    assert Path("runs/some-finetuned/report.json").is_file()


def test_a_policy_acts_under_the_given_alpha_and_dither(trained, config):
    fields = ["token", "cls", "stage", "cls_attention", "alpha"]
    run = trained(observation=fields, alpha_range=[0.02, 0.4])
    train(replace(config, run=run, alpha=0.3, dither=True, epochs=1))
    policy = PrunedViT.from_pretrained("runs/r/model").policy
    assert policy.alpha == 0.3
    assert policy.dither
    train(replace(config, run=run, alpha=0.3, epochs=1, run_name="even"))
    assert not PrunedViT.from_pretrained("runs/even/model").policy.dither
    evaluated = [
        json.loads(Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()[0])
        for name in ("r", "even")
    ]
    assert evaluated[0]["validation_gmacs"] != evaluated[1]["validation_gmacs"]


@pytest.mark.parametrize("change", [{"dither": True}, {"alpha": 0.1}])
def test_other_policies_have_no_alpha_and_can_not_dither(config, run, monkeypatch, change):
    backbone = PrunedViT.from_run(run).backbone
    other = PrunedViT(backbone, KeepAll())
    monkeypatch.setattr(PrunedViT, "from_run", lambda folder, hub_backbone: other)
    with pytest.raises(ValueError, match="leave out --alpha and --dither"):
        train(replace(config, **change))
    assert not Path("runs").exists()


def test_a_saved_model_is_tuned_under_any_policy(config, run, photographs):
    saved = PrunedViT.from_run(run)
    saved = PrunedViT(saved.backbone, TopK((6, 3)), saved.model_kwargs)
    saved.save_pretrained("saved")
    train(replace(config, run=Path("saved"), dataset=photographs, epochs=1))
    tuned = PrunedViT.from_pretrained("runs/r/model")
    assert tuned.policy.tokens == (6, 3)
    changed = {
        name
        for name, tensor in tuned.backbone.model.state_dict().items()
        if not torch.equal(tensor, saved.backbone.model.state_dict()[name])
    }
    assert "blocks.3.mlp.fc1.weight" in changed
    assert "blocks.0.mlp.fc1.weight" not in changed
    for given in ({}, {"dataset": photographs, "backbone": "hf-hub:a/b"}):
        with pytest.raises(ValueError, match="a saved model, which has its backbone and no data"):
            train(replace(config, run=Path("saved"), run_name="other", **given))


# --- to be resumed ---


@pytest.mark.parametrize("step", [2, STEPS + 2])
def test_a_killed_run_goes_on_as_if_nothing_had_been(config, run_once, monkeypatch, step):
    whole = run_once(train, config)
    learn, taken = classification.Learner.learn, []

    def learn_or_die(self, inputs, targets, now):
        taken.append(now)
        if len(taken) == step + 1:
            raise KeyboardInterrupt
        return learn(self, inputs, targets, now)

    monkeypatch.setattr(classification.Learner, "learn", learn_or_die)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert len(read_metrics("r")) == 1 + step // STEPS
    assert not Path("runs/r/report.json").exists()
    train(FinetuneConfig(resume=Path("runs/r")))
    assert taken[step : step + 2] == [step, step]  # those before are not taken again
    assert same_run(whole, "r")


def test_a_finished_run_can_be_finished_again(config, monkeypatch):
    train(config)
    before = weights_of("r")
    Path("runs/r/report.json").unlink()
    (Path("runs/r/model") / "model.safetensors").write_bytes(b"cut off")
    report = train(FinetuneConfig(resume=Path("runs/r")))
    after = weights_of("r")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads(Path("runs/r/report.json").read_text()) == report


def test_a_model_that_can_not_be_written_leaves_none(config, monkeypatch):
    def fail(self, folder):
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(PrunedViT, "_save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            train(replace(config, epochs=1))
    assert not list(Path("runs/r/model").iterdir())
    assert not Path("runs/r/report.json").exists()


def test_a_seed_is_a_run(config, run_once):
    train(config)
    assert same_run("r", run_once(train, config))


@pytest.mark.parametrize("change", [{"seed": 1}, {"optimizer": "sgd"}])
def test_another_seed_or_optimizer_is_another_run(config, run_once, change):
    train(replace(config, **change))
    assert not same_run("r", run_once(train, config))


def test_a_run_is_not_overwritten(config):
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/mine.txt").write_text("mine")
    with pytest.raises(TrainingError, match=r"runs/r exists.*--resume runs/r"):
        train(config)


def test_other_options_do_not_go_with_resume(config):
    RunFolder(Path("runs/r")).create(replace(config, run=Path("runs/another")))
    with pytest.raises(TrainingError, match="leave out epochs, lr, run"):
        train(FinetuneConfig(run=config.run, resume=Path("runs/r"), lr=0.1, epochs=7))


def test_what_can_not_be_resumed_is_named(config):
    resume = FinetuneConfig(resume=Path("runs/r"))
    with pytest.raises(CheckpointError, match=r"runs/r is no run"):
        train(resume)
    train(replace(config, epochs=1))
    folder = Path("runs/r")
    described = json.loads((folder / "config.json").read_text())
    for content, error, message in (
        ('{"epochs": ', CheckpointError, "config.json is damaged"),
        (json.dumps({"critic": "local"}), CheckpointError, "unknown settings: critic"),
        (json.dumps(described | {"run": "runs/gone"}), SavedModelError, "runs/gone holds no"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(error, match=message):
            train(resume)


# --- bad input ---


def other_folder(run, tmp_path, **settings):
    """A copy of ``run`` with other settings."""
    folder = tmp_path / "changed"
    folder.mkdir()
    values = json.loads((run / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "policy.safetensors").write_bytes((run / "policy.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": "pettingzoo:mpe2.simple_spread_v3"}, r"simple_spread_v3, which prunes no ViT"),
        (
            {"checkpoint": None, "backbone": "vit_tiny_patch16_224", "model_kwargs": {}},
            "had random weights, which were not kept",
        ),
        ({"checkpoint": "gone.safetensors"}, r"no checkpoint gone\.safetensors"),
        ({"dataset": "folder:gone"}, "gone"),
        ({"hidden": [9]}, "doesn't fit"),
    ],
)
def test_runs_that_can_not_be_tuned_are_named_at_once(config, run, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(replace(config, run=other_folder(run, tmp_path, **settings)))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"run": None}, TrainingError, "--run runs/NAME"),
        ({"run": Path("nowhere")}, SavedModelError, r"nowhere holds no finished run: config\.json"),
        ({"alpha": 0.3}, ValueError, "alpha=0.3.*trained for one alpha"),
        ({"augmentation": {"flip": 1}}, DatasetError, "flip"),
        ({"batch_size": 73}, TrainingError, "72 training images.*73"),
        ({"device": "abacus"}, ValueError, "abacus"),
        pytest.param(
            {"device": "cuda"},
            ValueError,
            "'cuda' can't be used here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here"),
        ),
        ({"lr": 1e12, "epochs": 1}, TrainingError, "not finite.*try a smaller --lr"),
    ],
)
def test_bad_input_is_named_at_once(config, change, error, message):
    with pytest.raises(error, match=message):
        train(replace(config, **change))
    if "lr" not in change:
        assert not Path("runs").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"frozen": "all"},
        {"execution": "padded"},
        {"distillation": -1.0},
        {"labels": float("inf")},
        {"distillation": 0.0, "labels": 0.0},
        {"validation_size": 0},
        {"threads": 0},
    ],
)
def test_values_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        FinetuneConfig(**change)


@pytest.mark.skipif(
    not hasattr(timm.models, "get_model_args"), reason="timm does not record arguments here"
)
def test_a_backbone_from_a_hub_is_tuned(trained, config, tmp_path):
    """A folder in the hub's format, of which timm reads the same as of the hub."""
    kwargs = {name: value for name, value in TINY.items() if not name.endswith("_rate")}
    kwargs |= {"img_size": 32, "patch_size": 8, "num_classes": 2}
    vit = timm.create_model("vit_tiny_patch16_224", **kwargs)
    spread_out(vit, seed=0)
    timm.models.save_for_hf(vit, tmp_path / "hub", model_args=kwargs)
    name = f"local-dir:{tmp_path / 'hub'}"
    run = trained(backbone=name, pretrained=True, checkpoint=None)
    report = train(replace(config, run=run, backbone=name, epochs=1))
    assert report["config"]["backbone"] == name
    tuned = PrunedViT.from_pretrained("runs/r/model").backbone.model
    assert not torch.equal(tuned.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
    assert torch.equal(tuned.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)


def test_what_can_not_be_saved_is_refused_before_it_is_trained(config, monkeypatch):
    def refuse(*_):
        raise SavedModelError("the backbone is not what its name and arguments build")

    monkeypatch.setattr(finetune.saving, "describe_backbone", refuse)
    monkeypatch.setattr(finetune, "train_epochs", None)  # not called
    with pytest.raises(SavedModelError, match="is not what its name"):
        train(config)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: nothing to fine-tune: give --run runs/NAME"),
        (["--run", "runs/nope"], "error: runs/nope holds no finished run"),
        (["--resume", "runs/nope"], "error: runs/nope is no run"),
        (["--resume", "runs/nope", "--epochs", "3"], "error: runs/nope is no run"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_a_line(config, monkeypatch, arguments, message):
    code = run_main(monkeypatch, *arguments)
    assert code.startswith(message)
    assert "\n" not in code


def test_the_command_line_tunes(config, monkeypatch, capsys):
    arguments = ["--run", str(config.run), "--epochs", "1", "--batch-size", "16", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-5:-1]] == [
        "dense", "pruned", "fine-tuned", "fine-tuned, unpruned",
    ]  # fmt: skip
