"""Policies that come with the package are found by name, and their cards say what they are."""

from pathlib import Path

import pytest
import torch

from prunevit.agents import PrunedViT, find_policy, policy_card, policy_names
from prunevit.agents.embed import EmbedConfig, load_model
from prunevit.agents.policies.serialization import SavedModelError
from prunevit.agents.policy_file import describe_policy_file
from prunevit.envs.data.digits import draw_digits, normalise
from prunevit.envs.vit.create import create_backbone

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "results" / "digits" / "runs" / "mappo-0"
each_policy = pytest.mark.parametrize("name", policy_names())


def test_there_is_one_for_the_digits():
    assert "digits" in policy_names()


@each_policy
def test_each_has_a_card_with_the_same_facts(name):
    card = policy_card(name)
    described = describe_policy_file(find_policy(name))
    assert f"`{described['backbone']}`" in card
    for part in ("license: ", "library_name: prunevit", "| Data |", "## Compute", "## Accuracy"):
        assert part in card
    assert card.count(f"<!-- table: policy-{name}") == 2
    assert described["policy"]["calibration"]


@pytest.mark.skipif(not RUN.is_dir(), reason="needs the checkout")
def test_the_digits_policy_is_that_of_the_run_that_its_card_names():
    assert f"`{RUN.relative_to(ROOT)}`" in policy_card("digits")
    mine = PrunedViT.from_policy(create_backbone(), "digits")
    theirs = PrunedViT.from_run(RUN)
    assert mine.backbone.prune_before == theirs.backbone.prune_before
    assert mine.backbone.prune_at == theirs.backbone.prune_at
    torch.testing.assert_close(mine.policy.state_dict(), theirs.policy.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_a_name_prunes_at_the_compute_that_is_asked_for():
    model = PrunedViT.from_policy(create_backbone(), "digits")
    model.compute = 0.4
    images, labels = draw_digits("validation", 200)
    found = model.trace(normalise(images))
    assert float(found.macs.float().mean()) / model.backbone.dense_macs == pytest.approx(
        0.4, abs=0.03
    )
    assert (found.logits.argmax(1) == labels).float().mean() > 0.85


def test_embed_takes_a_name(tmp_path):
    config = EmbedConfig(tmp_path, policy=Path("digits"), device="cpu", compute=0.5)
    model = load_model(config)
    assert model.compute == pytest.approx(0.5)
    assert model.num_classes == 0


def test_what_there_is_not_is_named(tmp_path):
    with pytest.raises(SavedModelError, match=r"^no file nope, and no policy .* there are: digits"):
        PrunedViT.from_policy(create_backbone(), "nope")
    with pytest.raises(SavedModelError, match="there are: digits"):
        policy_card("nope")
    with pytest.raises(SavedModelError, match="holds a policy for digits_vit of width 128"):
        PrunedViT.from_policy(create_backbone("vit_tiny_patch16_224", untrained=True), "digits")


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("no policy")
    with pytest.raises(SavedModelError, match="digits holds no policy"):
        PrunedViT.from_policy(create_backbone(), "digits")
