"""DynamicViT's training, and its runs, which can be killed."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunevit.agents import PrunedViT
from prunevit.agents.policies.serialization import SavedModelError, dynamic_vit_policy
from prunevit.envs.data import cluttered_digits
from prunevit.envs.data.image_sources import DatasetError
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers import dynamic_vit
from prunevit.trainers.common.run import RunFolder, TrainingError
from prunevit.trainers.dynamic_vit import (
    BACKBONE_LR,
    BACKBONE_START,
    WEIGHT_DECAY,
    DynamicViTConfig,
    Trainer,
)

STAGES = (1, 3)
TINY = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}


# --- learning ---


def trainer_on(vit, images, **changes):
    settings = {"iterations": 6, "batch_size": 4, "hidden": 8, "keep": 0.5} | changes
    config = DynamicViTConfig(**settings)
    backbone = StagedViT(vit.requires_grad_(False), STAGES)
    policy = dynamic_vit_policy(backbone, config.keep, config.hidden)
    return Trainer(backbone, policy, images, config)


def test_it_learns_to_keep_what_is_asked_for(make_vit, some_images):
    settings = {"iterations": 60, "batch_size": 12, "lr": 0.02, "keep": 0.3, "ratio_weight": 20.0}
    trainer = trainer_on(make_vit(), some_images, **settings)
    records = [trainer.iterate() for _ in range(60)]
    before, after = (sum(r["ratio"] for r in part) for part in (records[:10], records[-10:]))
    assert after < 0.3 * before
    assert records[-1]["keep_ratio"] == pytest.approx((0.3 + 0.09) / 2, abs=0.1)


def test_a_frozen_backbone_stays_as_it_is(make_vit, some_images):
    vit = make_vit()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    trainer = trainer_on(vit, some_images)
    predictors = [p.clone() for p in trainer.policy.parameters()]
    trainer.iterate()
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    moved = [
        not torch.equal(*both) for both in zip(predictors, trainer.policy.parameters(), strict=True)
    ]
    assert all(moved)


def test_fine_tuning_starts_late_and_is_told_by_the_unpruned_model(make_vit, some_images):
    vit = make_vit()
    start = {key: value.clone() for key, value in vit.state_dict().items()}
    trainer = trainer_on(vit, some_images, fine_tune=True, iterations=12)
    waits = math.ceil(BACKBONE_START * 12)
    for _ in range(waits):
        trainer.iterate()
    assert all(torch.equal(value, start[key]) for key, value in vit.state_dict().items())
    trainer.iterate()
    assert not torch.equal(vit.head.weight, start["head.weight"])
    assert not torch.equal(vit.blocks[0].attn.qkv.weight, start["blocks.0.attn.qkv.weight"])
    teacher = trainer._teacher.model.state_dict()
    assert all(torch.equal(value, start[key]) for key, value in teacher.items())


def test_neither_biases_nor_norms_decay(make_vit, some_images):
    trainer = trainer_on(make_vit(), some_images, fine_tune=True)
    model, groups = trainer.backbone.model, trainer.optimizer.param_groups
    modules = {BACKBONE_LR: model, 1.0: trainer.policy}
    frozen = {"cls_token", "pos_embed"}
    for scale, module in modules.items():
        decays = {
            id(parameter): group["weight_decay"]
            for group in groups
            if group["scale"] == scale
            for parameter in group["params"]
        }
        found = {name: decays.pop(id(p), None) for name, p in module.named_parameters()}
        assert not decays
        assert {name for name in found if found[name] is None} <= frozen
        for name in found.keys() - frozen:
            is_matrix = dict(module.named_parameters())[name].dim() > 1
            assert found[name] == (WEIGHT_DECAY if is_matrix else 0), name
    assert not model.cls_token.requires_grad
    assert not model.pos_embed.requires_grad


def test_the_rate_warms_up(make_vit, some_images):
    trainer = trainer_on(make_vit(), some_images, iterations=12, warmup=0.5, lr=0.6)
    rates = []
    for _ in range(12):
        trainer.iterate()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[-1] < 0.1


def test_images_and_labels_are_mixed(make_vit, some_images, monkeypatch):
    seen = []
    real = dynamic_vit.losses
    monkeypatch.setattr(
        dynamic_vit, "losses", lambda *args: seen.append(args[2].clone()) or real(*args)
    )
    for mixes in ({}, {}, {"mixup": 0.0, "cutmix": 0.0}):
        trainer_on(make_vit(), some_images, **mixes).iterate()
    mixed, again, plain = seen
    assert torch.equal(mixed, again)
    assert mixed.shape == (4, 5)
    torch.testing.assert_close(mixed.sum(1), torch.ones(4))
    assert plain.dtype == torch.int64
    with pytest.raises(ValueError, match="mixup and cutmix need an even batch_size, got 3"):
        DynamicViTConfig(batch_size=3)


def test_what_it_can_not_learn_from_is_refused(make_vit, make_images):
    with pytest.raises(TrainingError, match="takes batch_size=40 images, the dataset has 12"):
        trainer_on(make_vit(), make_images(), batch_size=40)
    with pytest.raises(DatasetError, match=r"5 classes .* the backbone distinguishes 3"):
        trainer_on(make_vit(num_classes=3), make_images())
    hooked = make_vit()
    hooked.blocks[2].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(TrainingError, match="these have hooks"):
        trainer_on(hooked, make_images())


# --- runs ---


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        cluttered_digits, "DEFAULT_SIZES", {"train": 64, "validation": 40, "test": 1_000_000}
    )


@pytest.fixture
def weights(tmp_path):
    """A random ViT of 16 patches, for the digits."""
    path = tmp_path / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_backbone(num_classes=10, untrained=True, **TINY)
    write_weights(path, model.state_dict(), "digits_vit", 10, TINY)
    return path


@pytest.fixture
def arguments(weights):
    def given(name, *more):
        text = (
            f"--checkpoint {weights} --prune-before 1 2 --iterations 5 --batch-size 8 "
            f"--eval-every 2 --eval-size 20 --checkpoint-every 2 --device cpu --run-name {name}"
        )
        return [*text.split(), *more]

    return given


def run(arguments):
    return dynamic_vit.main(arguments)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_run_leaves_what_it_found(arguments, monkeypatch, capsys):
    opened = []
    real = dynamic_vit.open_images

    def noted(dataset, split, *rest, **options):
        opened.append(split)
        return real(dataset, split, *rest, **options)

    monkeypatch.setattr(dynamic_vit, "open_images", noted)
    run(arguments("one"))
    assert "test" not in opened
    report = json.loads(Path("runs/one/report.json").read_text())
    assert report["split"] == "validation"
    pruned = report["policies"]["dynamic-vit"]
    assert pruned["kept"] == [8 / 16, 4 / 16]
    assert 0 < pruned["policy_gmacs"] < pruned["gmacs"]
    row = capsys.readouterr().out.splitlines()[-2].split()
    assert row[:2] == ["dynamic-vit", f"{100 * pruned['accuracy']:.2f}%"]
    lines = read_lines("runs/one/metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]
    assert ["validation_accuracy" in line for line in lines] == [False, True, False, True, True]
    model = PrunedViT.from_run("runs/one")
    trained = load_file("runs/one/policy.safetensors")
    assert {key: value.tolist() for key, value in model.policy.state_dict().items()} == {
        key: value.tolist() for key, value in trained.items()
    }
    assert (model.policy.keep, model.backbone.prune_before) == (0.5, (1, 2))
    assert model.policy.hidden == model.backbone.width


@pytest.mark.parametrize("fine_tune", [False, True])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(arguments, monkeypatch, fine_tune):
    more = ["--fine-tune"] if fine_tune else []
    run(arguments("whole", *more))
    iterate = Trainer.iterate

    def killed(trainer):
        if trainer.iteration == 3:
            raise KeyboardInterrupt
        return iterate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iterate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(arguments("killed", *more))
    with pytest.raises(SavedModelError, match="holds no finished run"):
        PrunedViT.from_run("runs/killed")
    run(["--resume", "runs/killed"])
    for name in ("policy", "backbone") if fine_tune else ("policy",):
        whole, again = (
            load_file(f"runs/{which}/{name}.safetensors") for which in ("whole", "killed")
        )
        assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert len(read_lines("runs/killed/metrics.jsonl")) == 5
    images = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    models = [PrunedViT.from_run(f"runs/{which}") for which in ("whole", "killed")]
    assert torch.equal(models[0](images), models[1](images))
    models[0].save_pretrained("mine")
    assert torch.equal(PrunedViT.from_pretrained("mine")(images), models[0](images))
    dense = load_file("tiny.safetensors")
    moved = not torch.equal(models[0].backbone.model.head.weight, dense["head.weight"])
    assert moved == fine_tune


def test_a_run_of_before_is_read_but_can_not_go_on(arguments, monkeypatch):
    """Then all parameters decayed, in one group, and these settings weren't there."""
    run(arguments("old", "--hidden", "8"))
    config = Path("runs/old/config.json")
    settings = json.loads(config.read_text())
    for name in ("mixup", "cutmix", "label_smoothing", "warmup"):
        del settings[name]
    config.write_text(json.dumps(settings))
    read = RunFolder(Path("runs/old")).read_settings(DynamicViTConfig)
    assert (read.mixup, read.cutmix, read.label_smoothing, read.warmup) == (0, 0, 0, 0)
    assert PrunedViT.from_run("runs/old").policy.hidden == 8
    real = Trainer.state_dict

    def of_before(trainer):
        state = real(trainer)
        state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
        return state

    monkeypatch.setattr(Trainer, "state_dict", of_before)
    run(arguments("older"))
    with pytest.raises(SystemExit, match="biases and norms decayed too: begin a new run"):
        run(["--resume", "runs/older"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prune-before 9", "prune_before=(9,) is out of range"),
        ("--dataset nothing", "unknown dataset 'nothing'"),
        (
            "--lr 1e12",
            "loss of iteration 2 is not finite, training on 8 images",
        ),
    ],
)
def test_bad_input_ends_with_a_reason(arguments, options, message):
    with pytest.raises(SystemExit) as ended:
        run([*arguments("bad"), *options.split()])
    assert str(ended.value.code).startswith("error: ")
    assert message in str(ended.value.code)


@pytest.mark.parametrize(
    "setting", ["keep 0.0", "hidden 6", "lr inf", "iterations 0", "ratio-weight -1.0"]
)
def test_settings_that_make_no_sense_are_refused(arguments, capsys, setting):
    name, value = setting.split()
    with pytest.raises(SystemExit):
        run([*arguments("bad"), f"--{name}={value}"])
    assert f"{name.replace('-', '_')}={value} must be" in capsys.readouterr().err


def test_a_folder_in_use_and_settings_beside_resume_are_refused(arguments):
    run(arguments("mine"))
    for options, message in [
        (arguments("mine"), "runs/mine exists: resume it with --resume"),
        (["--resume", "runs/mine", "--keep", "0.3"], "leave out keep"),
        (["--resume", "runs/none"], "no config.json"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(options)
