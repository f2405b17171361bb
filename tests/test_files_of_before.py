"""Files that version 0.1.0 wrote, when the project was called tokenprune, are still read.

Written by 0.1.0 with a random ViT of 16 patches and 2 blocks. ``logits.safetensors`` has the images
and the logits that 0.1.0 gave for them.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from prunevit import PrunedViT
from prunevit.envs.vit.create import create_backbone

BEFORE = Path(__file__).parent / "fixtures" / "before-0.2"


@pytest.fixture(scope="module")
def logits():
    return load_file(BEFORE / "logits.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("policy", ["topk", "learned"])
def test_a_saved_model_is_read(logits, policy):
    config = json.loads((BEFORE / policy / "config.json").read_text(encoding="utf-8"))
    assert config["versions"]["tokenprune"] == "0.1.0"
    model = PrunedViT.from_pretrained(BEFORE / policy)
    torch.testing.assert_close(model(logits["images"]), logits[policy], rtol=0, atol=1e-5)
    # images lose patches, so the dense model answers otherwise
    assert (logits[policy] - logits["backbone"]).abs().max() > 1e-3


def test_the_policy_of_a_budget_observes_alpha(logits):
    config = json.loads((BEFORE / "learned" / "config.json").read_text(encoding="utf-8"))
    assert config["policy"]["budget"] == 0.1
    model = PrunedViT.from_pretrained(BEFORE / "learned")
    assert model.policy.alpha == pytest.approx(0.1)
    kept = model.trace(logits["images"]).alive.sum()
    model.policy.alpha = 100.0
    assert model.trace(logits["images"]).alive.sum() != kept


@torch.no_grad()
def test_a_backbones_checkpoint_is_read(logits):
    file = BEFORE / "backbone.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert "tokenprune-backbone" in opened.metadata()
    # its number of classes, image size and depth stand in the file
    model = create_backbone("vit_tiny_patch16_224", checkpoint=file)
    torch.testing.assert_close(model(logits["images"]), logits["backbone"], rtol=0, atol=1e-5)
