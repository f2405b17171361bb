"""Our actor, taught by gradients through keep masks; and trainings that start from a policy."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunevit.agents import PrunedViT
from prunevit.envs.data import cluttered_digits
from prunevit.envs.fields import FIELDS
from prunevit.envs.game import TokenGame
from prunevit.envs.observations import View
from prunevit.envs.rewards import TeamReward
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers import dynamic_vit, mappo, straight_through
from prunevit.trainers.common.actors import make_actor
from prunevit.trainers.common.masked_vit import gumbel_keep, run_dense, run_judged
from prunevit.trainers.straight_through import (
    StraightThroughConfig,
    Trainer,
    compute_of,
    lost_by_pruning,
)

BATCH, STAGES = 5, (1, 3)
TINY = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
BACKBONES = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "mean": {"class_token": False, "global_pool": "avg"},
    "rotary": {"name": "eva02_tiny_patch14_224", "num_heads": 2},
}


def trainer_on(vit, images, **changes):
    settings = {"iterations": 60, "batch_size": 4, "hidden": (8,), "keep_bias": 1.0} | changes
    config = StraightThroughConfig(**settings)
    backbone = StagedViT(vit.requires_grad_(False), STAGES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Trainer(backbone, make_actor(config, backbone), images, config)


# --- what it learns from ---


@pytest.mark.parametrize(
    ("name", "prune_at"), [*((name, "block") for name in BACKBONES), ("registers", "mlp")]
)
@torch.no_grad()
def test_agents_see_and_lose_what_they_do_in_the_game(make_vit, some_images, name, prune_at):
    """All fields; and the loss is the team reward's, negated."""
    backbone = StagedViT(make_vit(**BACKBONES[name]), STAGES, "masked", prune_at=prune_at)
    images, labels = some_images.load(range(BATCH))
    alpha = torch.linspace(0.1, 2.0, BATCH)
    shown = []

    def judge(stage, tokens, kept):
        shown.append(View(backbone, tokens, stage, alpha).living(FIELDS))
        return torch.zeros(kept.numel(), 2)

    begun = backbone.begin(images, execution="masked")
    noise = torch.Generator().manual_seed(0)
    student = run_judged(backbone, judge, begun, noise, with_attention=True)
    assert 0 < student.kept[1].sum() < student.kept[0].sum() < BATCH * 16
    game = TokenGame(backbone, TeamReward(accuracy="kl"))
    stage = game.reset(images, labels, alpha)
    received = torch.zeros(BATCH)
    for kept, seen in zip(student.kept, shown, strict=True):
        torch.testing.assert_close(seen, stage.view.living(FIELDS), rtol=1e-3, atol=1e-3)
        stage = game.step(kept > 0)
        received += stage.reward[:, 0]
    dense = run_dense(backbone, begun).logits
    lost = lost_by_pruning("kl", student.logits, dense, labels)
    found = lost + alpha * compute_of(backbone, student)
    torch.testing.assert_close(found, -received, rtol=1e-3, atol=1e-3)
    right = lost_by_pruning("labels", student.logits, dense, labels)
    picked = student.logits.softmax(1)[torch.arange(BATCH), labels]
    torch.testing.assert_close(right, -picked.log())


def test_the_first_decisions_are_told_of_all_later_blocks(vit, some_images):
    """A patch that is gone would have been kept: its gradient is there, and is that of compute."""
    trainer = trainer_on(vit, some_images)
    backbone = trainer.backbone
    images = some_images.load(range(BATCH))[0]
    with torch.no_grad():
        begun = backbone.begin(images, execution="masked")
    masks = []

    def judge(stage, tokens, kept):
        masks.append(kept)
        logits = trainer.judge(torch.ones(BATCH), stage, tokens, kept)
        return logits.detach() if stage else logits  # what agents see moves with the masks, too

    with torch.no_grad():
        trainer.actor.keep_bias.fill_(0.0)
    noise = torch.Generator().manual_seed(0)
    student = run_judged(backbone, judge, begun, noise, with_attention=True)
    compute = compute_of(backbone, student)
    (gradient,) = torch.autograd.grad(compute.sum(), masks[1])
    first, second = student.kept.detach()
    gone = (first == 0) & (second == 0)
    assert gone.any()
    # costs are quadratic in the number of tokens, so this is their derivative
    expected = torch.zeros(BATCH)
    for stage, count in enumerate((first.sum(1), second.sum(1))):
        more, less = (backbone.segment_macs(count + step, stage) for step in (1, -1))
        expected += (more - less) / 2 / backbone.dense_macs
    expected = expected[:, None].expand_as(gradient)
    torch.testing.assert_close(gradient[gone], expected[gone])


def test_what_is_gone_is_not_drawn_again(vit, some_images):
    trainer = trainer_on(vit, some_images)
    backbone = trainer.backbone
    kept = (torch.rand(BATCH, 16, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    with torch.no_grad():
        begun = backbone.begin(some_images.load(range(BATCH))[0], execution="masked")
        tokens = replace(backbone.prune(begun, kept > 0), attention=begun.attention)
        logits = trainer.judge(torch.ones(BATCH), 1, tokens, kept)
    draws = torch.stack(
        [gumbel_keep(logits, torch.Generator().manual_seed(seed)) for seed in range(200)]
    ).view(200, BATCH, 16)
    assert (draws[:, kept == 0] == 1).all()
    assert not (draws[:, kept > 0] == 1).all()


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("loss", ["kl", "labels"])
def test_it_learns_what_compute_weighs(make_vit, some_images, loss, heads):
    kept = {}
    for alpha in (1e-4, 30.0):
        changes = {"batch_size": 12, "alpha_range": (alpha, alpha), "actor_attention": heads}
        trainer = trainer_on(make_vit(), some_images, loss=loss, lr=0.03, **changes)
        before = {k: value.clone() for k, value in trainer.backbone.model.state_dict().items()}
        records = [trainer.iterate() for _ in range(40)]
        first, last = (sum(r["loss"] for r in part) for part in (records[:10], records[-10:]))
        assert last < first
        kept[alpha] = records[-1]["keep_ratio"]
        after = trainer.backbone.model.state_dict()
        assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert kept[30.0] < 0.1
    # the labels are noise, for which no patch is worth keeping
    assert loss == "labels" or kept[1e-4] > 0.5


def test_ranges_that_make_no_sense_are_refused():
    for alpha_range in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="two positive numbers"):
            StraightThroughConfig(alpha_range=alpha_range)
    with pytest.raises(ValueError, match="needs both --alpha-range and alpha in --observation"):
        StraightThroughConfig(observation=("token", "cls_attention"))
    with pytest.raises(ValueError, match="give --alpha-range, and alpha"):
        StraightThroughConfig(observation=("token", "cls_attention"), alpha_range=None)


# --- runs, and what starts from them ---


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"train": 64, "validation": 40, "test": 40}
    monkeypatch.setattr(cluttered_digits, "DEFAULT_SIZES", sizes)


def write_vit(path, seed):
    """A random ViT of 16 patches, for the digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_backbone(num_classes=10, untrained=True, **TINY)
    write_weights(path, model.state_dict(), "digits_vit", 10, TINY)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with weights of two ViTs, and runs on the first: by us and by DynamicViT."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sizes = {"train": 64, "validation": 40, "test": 40}
        patch.setattr(cluttered_digits, "DEFAULT_SIZES", sizes)
        for seed in (0, 1):
            write_vit(folder / f"vit-{seed}.safetensors", seed)
        straight_through.main(taught(folder, "taught"))
        common = f"--checkpoint {folder}/vit-0.safetensors --prune-before 1 2 --device cpu"
        dynamic_vit.main([*common.split(), "--iterations", "1", "--run-name", "other"])
    return folder


def taught(folder, name, *more):
    text = (
        f"--checkpoint {folder}/vit-0.safetensors --prune-before 1 2 --iterations 5 --batch-size 8 "
        f"--eval-every 2 --eval-size 20 --checkpoint-every 2 --device cpu --run-name {name} "
        "--hidden 8 --actor-attention 1"
    )
    return [*text.split(), *more]


def warm(folder, name, *more, weights="vit-0"):
    text = (
        f"--checkpoint {folder}/{weights}.safetensors --prune-before 1 2 --iterations 4 "
        "--num-envs 16 --rollouts-per-image 4 --eval-every 2 --eval-size 20 --checkpoint-every 2 "
        f"--device cpu --run-name {name} --hidden 8 --actor-attention 1 --alpha-range 0.002 1 "
        "--observation token cls stage cls_attention alpha"
    )
    return [*text.split(), *more]


def test_a_run_is_read_as_ours(made):
    report = json.loads((made / "runs/taught/report.json").read_text())
    assert report["images"] == 40
    assert report["policies"]["learned"]["gmacs"] > 0
    model = PrunedViT.from_run(made / "runs/taught")
    assert model.policy.alpha == pytest.approx(0.002**0.5)
    assert model.policy.macs_per_pair > 0


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(made, monkeypatch):
    iterate = Trainer.iterate

    def killed(trainer):
        if trainer.iteration == 3:
            raise KeyboardInterrupt
        return iterate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iterate", killed)
        with pytest.raises(KeyboardInterrupt):
            straight_through.main(taught(made, "killed"))
    straight_through.main(["--resume", "runs/killed"])
    files = [
        folder / "policy.safetensors" for folder in (made / "runs/taught", Path("runs/killed"))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_training_starts_from_a_policy_and_goes_on_without_it(made, monkeypatch):
    given = load_file(made / "runs/taught/policy.safetensors")
    starts = []
    iterate = mappo.Trainer.iterate

    def noted(trainer, stop=None):
        if trainer.iteration == 0:
            starts.append({k: v.clone() for k, v in trainer.learner.actor.state_dict().items()})
        if trainer.iteration == stop:
            raise KeyboardInterrupt
        return iterate(trainer)

    monkeypatch.setattr(mappo.Trainer, "iterate", noted)
    init = shutil.copytree(made / "runs/taught", "init")
    mappo.main(warm(made, "whole", "--init", "init"))
    assert all(torch.equal(starts[0][key], value) for key, value in given.items())
    with monkeypatch.context() as patch:
        patch.setattr(mappo.Trainer, "iterate", lambda trainer: noted(trainer, stop=3))
        with pytest.raises(KeyboardInterrupt):
            mappo.main(warm(made, "stopped", "--init", "init"))
    shutil.rmtree(init)
    mappo.main(["--resume", "runs/stopped"])
    files = [Path("runs", name, "policy.safetensors") for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # a saved model is as good as a run
    PrunedViT.from_run(made / "runs/taught").save_pretrained("saved")
    mappo.main(warm(made, "from-saved", "--init", "saved"))
    assert files[0].read_bytes() == Path("runs/from-saved/policy.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "weights", "message"),
    [
        ("--hidden 9", "vit-0", "hidden [8] instead of [9]"),
        ("--actor-attention 0", "vit-0", "actor_attention 1 instead of 0"),
        ("--attention-prior 0", "vit-0", "attention_prior True instead of False"),
        (
            "--observation token stage cls_attention redundancy alpha --redundancy-prior 5",
            "vit-0",
            "redundancy_prior False instead of True",
        ),
        ("--prune-before 1", "vit-0", "prune_before [1, 2] instead of [1]"),
        ("--prune-at mlp", "vit-0", "prune_at block instead of mlp"),
        (
            "--observation token cls_attention alpha",
            "vit-0",
            "instead of ['token', 'cls_attention', 'alpha']",
        ),
        ("", "vit-1", "it was trained on a backbone with other weights"),
        ("--init runs/none", "vit-0", "--init runs/none: there is no such folder"),
        ("--init {made}", "vit-0", "holds no finished run"),
        ("--init {made}/runs/other", "vit-0", "a DynamicViTPolicy has no actor to start from"),
    ],
)
def test_what_is_no_start_is_refused_by_name(made, options, weights, message):
    options = options.format(made=made).split()
    init = [] if "--init" in options else ["--init", f"{made}/runs/taught"]
    with pytest.raises(SystemExit) as ended:
        mappo.main(warm(made, "r", *init, *options, weights=weights))
    assert message in str(ended.value.code)
    assert not Path("runs").exists()


def test_only_token_pruning_starts_from_a_policy():
    with pytest.raises(ValueError, match="only policies of the token game"):
        mappo.MappoConfig(env="pettingzoo:mpe2.simple_spread_v3", init=Path("runs/x"))
