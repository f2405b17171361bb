"""A policy as a file of its own, without its backbone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from prunevit.agents import DynamicViTPolicy, LearnedPolicy, PrunedViT, TokenActor, TopK, prune
from prunevit.agents.embed import EmbedConfig, embed
from prunevit.agents.policies.calibration import Calibration
from prunevit.agents.policies.serialization import SavedModelError
from prunevit.agents.policy_file import DESCRIPTION
from prunevit.envs.fields import field_size
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import write_weights

KNOWN = Calibration("threshold", (0.1, 0.9), (0.9, 0.3), True)


def make_policy(vit, kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "top-k":
            return TopK((9, 4))
        if kind == "dynamic-vit":
            return DynamicViTPolicy(vit.embed_dim, 2, hidden=8)
        actor = TokenActor(field_size(StagedViT(vit, (1, 3)), "token"), (8,), None)
        policy = LearnedPolicy(actor, ("token",), num_prefix=1)
    policy.calibration = KNOWN
    policy.dither = True
    return policy


@pytest.fixture
def learned(vit, tmp_path):
    """A file with a learned policy."""
    prune(vit, make_policy(vit, "learned"), (1, 3)).save_policy(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


@pytest.mark.parametrize("kind", ["learned", "top-k", "dynamic-vit"])
@pytest.mark.parametrize("where", [{}, {"prune_at": "mlp"}, {"on_prune": "merge"}])
@torch.no_grad()
def test_the_same_policy_comes_back(vit, some_images, tmp_path, kind, where):
    model = prune(vit, make_policy(vit, kind), (1, 3), **where)
    model.save_policy(tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").stat().st_size < 30_000
    again = PrunedViT.from_policy(vit, tmp_path / "p.safetensors")
    assert again.backbone.model is not vit
    for ours, theirs in zip(
        again(some_images.images, return_keep=True),
        model(some_images.images, return_keep=True),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    trained = getattr(again.policy, "parameters", list)()
    assert not any(parameter.requires_grad for parameter in trained)


def test_its_calibration_comes_along_unless_images_have_another_size(vit, make_vit, learned):
    assert PrunedViT.from_policy(vit, learned).policy.calibration == KNOWN
    larger = PrunedViT.from_policy(make_vit(img_size=48), learned)
    assert larger.policy.calibration is None


def test_a_classifier_does_not_matter(make_vit, learned):
    assert PrunedViT.from_policy(make_vit(num_classes=0), learned).num_classes == 0


def test_embed_takes_such_a_file(vit, learned, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        pixels = np.random.RandomState(i).randint(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    # any weights of that architecture: these are of a smaller model than timm's
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    write_weights(tmp_path / "w.safetensors", vit.state_dict(), "vit_tiny_patch16_224", 5, small)
    config = EmbedConfig(
        photos,
        learned,
        checkpoint=tmp_path / "w.safetensors",
        compute=0.5,
        out=tmp_path / "e.npy",
        device="cpu",
    )
    embed(config)
    assert np.load(config.out).shape == (3, 32)


# --- bad input ---


def test_a_policy_of_another_backbone_is_refused(vit, learned, make_vit):
    message = (
        "a policy for vit_tiny_patch16_224 of width 32, the backbone is vit_small_patch16_224 of"
    )
    with pytest.raises(SavedModelError, match=message):
        PrunedViT.from_policy(make_vit("vit_small_patch16_224"), learned)
    with pytest.raises(SavedModelError, match=r"of width 32, the backbone is .* of width 64"):
        PrunedViT.from_policy(make_vit(embed_dim=64), learned)


def test_files_that_hold_none_are_refused(vit, tmp_path):
    file = tmp_path / "p.safetensors"
    with pytest.raises(SavedModelError, match=r"no file .*p\.safetensors"):
        PrunedViT.from_policy(vit, file)
    save_file({"w": torch.zeros(1)}, file)
    with pytest.raises(SavedModelError, match="holds no policy"):
        PrunedViT.from_policy(vit, file)
    file.write_bytes(b"{}")
    with pytest.raises(SavedModelError, match="holds no policy, or is damaged"):
        PrunedViT.from_policy(vit, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "was written in format 9, this version reads 1"),
        ({"policy": {"kind": "oracle"}}, "unknown kind of policy 'oracle'"),
        ({"policy": {"kind": "learned"}}, "is damaged: KeyError"),
        ({"prune_before": [9]}, "out of range"),
        ({"prune_at": "end"}, "prune_at"),
    ],
)
def test_damaged_descriptions_are_refused(vit, learned, change, message):
    from safetensors import safe_open

    with safe_open(learned, framework="pt") as file:
        described = json.loads(file.metadata()[DESCRIPTION])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(weights, learned, {DESCRIPTION: json.dumps(described | change)})
    with pytest.raises(ValueError, match=message):
        PrunedViT.from_policy(vit, learned)


def test_a_policy_with_additions_is_not_saved(vit, tmp_path):
    model = prune(vit, make_policy(vit, "learned"), (1, 3))
    model.policy.actor.register_forward_hook(lambda _, __, out: out + 1)
    with pytest.raises(SavedModelError, match="the policy would not come back as it is"):
        model.save_policy(tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()
