"""What the viewer says of an image is what the models do to it."""

import numpy as np
import pytest
import torch
from PIL import Image

from prunevit.agents import PrunedViT, TopK
from prunevit.agents.viewer import comparison
from prunevit.agents.viewer.comparison import compare, median_seconds
from prunevit.agents.viewer.photographs import prepare, samples
from prunevit.agents.viewer.picture import FONT, GAP, LINE, draw
from prunevit.agents.viewer.viewed_model import (
    OWN,
    UNTRAINED,
    ViewedModel,
    read_model,
    stages_for,
    tokens_for,
)
from prunevit.envs.rendering import stage_strip
from prunevit.envs.vit.staged_vit import StagedViT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(comparison, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(comparison, "MOST_AT_ONCE", 2)


@pytest.fixture(scope="module")
def digits():
    return read_model("digits")


@pytest.fixture
def photograph():
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("compute", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("method", UNTRAINED)
def test_policies_without_training_take_the_compute_that_was_set(
    staged, photograph, method, compute
):
    (look,) = compare(ViewedModel(staged), photograph, [method], compute).looks
    step = staged.uniform_macs((16, 16, 16)) - staged.uniform_macs((15, 15, 15))
    assert compute * staged.dense_macs - step < look.macs <= compute * staged.dense_macs


def test_nothing_is_pruned_at_full_compute_and_one_patch_stays_at_none(staged):
    assert tokens_for(staged, 1.0, with_attention=False) == (16, 16, 16)
    assert tokens_for(staged, 0.0, with_attention=True) == (1, 1, 1)


def test_a_look_is_a_trace(staged, photograph):
    found = compare(ViewedModel(staged), photograph, ["class attention"], 0.5)
    (look,) = found.looks
    pixels, _ = prepare(photograph, staged)
    model = PrunedViT(staged, TopK(look.patches[1:], "attention"))
    trace = model.trace(pixels[None])
    assert look.macs == trace.macs
    assert look.alive[0].all()
    assert torch.equal(look.alive[1:], trace.alive[0])
    assert found.stages == ("all patches", "before block 1", "before block 2", "before block 3")
    given = trace.logits[0].softmax(0)
    assert look.answer == f"{given.argmax()} ({given.max():.0%})"
    assert found.dense.macs == staged.dense_macs
    assert found.dense.patches == [16]
    dense = staged.model(pixels[None])[0].softmax(0)
    assert found.dense.answer == f"{dense.argmax()} ({dense.max():.0%})"


def test_a_model_without_a_classifier_is_compared_by_its_embedding(make_vit, photograph):
    model = ViewedModel(StagedViT(make_vit(num_classes=0), (1, 2)))
    found = compare(model, photograph, ["class attention", "random"], 0.4)
    assert found.dense.answer == "cosine 1.000"
    pixels = prepare(photograph, model.backbone)[0][None]
    pruned, _ = model.pruned("class attention", 0.4)
    cosine = torch.cosine_similarity(pruned(pixels), model.backbone.model(pixels)).item()
    assert found.looks[0].answer == f"cosine {cosine:.3f}"
    assert cosine < 0.999


def test_the_digits_own_policy_takes_what_was_set_or_says_what_it_can(digits):
    image = samples()["digits-0"]
    costs = {}
    for compute in (0.25, 0.75):
        found = compare(digits, image, [OWN], compute)
        costs[compute] = found.looks[0].macs
        assert found.remarks == [
            f"The own policy takes {compute:.0%} of the dense compute on average: less of images "
            "that are easy for it, more of others."
        ]
        assert found.looks[0].answer.startswith("4 (")
    assert costs[0.25] < costs[0.75]
    (remark,) = compare(digits, image, [OWN, "random"], 0.1).remarks
    assert remark.startswith("The own policy takes 20% to 95%")
    assert remark.endswith("it is shown at 20%.")


def test_a_policy_that_was_not_calibrated_says_so(staged, photograph):
    own = PrunedViT(staged, TopK((8, 8, 8)))
    found = compare(ViewedModel(staged, own), photograph, [OWN], 0.9)
    assert found.looks[0].patches == [16, 8, 8, 8]
    assert "was not calibrated" in found.remarks[0]


def test_saved_models_and_names_of_timm_are_read(staged, tmp_path):
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    PrunedViT(staged, TopK((8, 8, 8)), sizes).save_pretrained(tmp_path)
    read = read_model(str(tmp_path))
    assert read.methods[0] == OWN
    assert read.backbone.prune_before == (1, 2, 3)
    with pytest.raises(ValueError, match="leave out --checkpoint"):
        read_model(str(tmp_path), img_size=32)
    with pytest.raises(ValueError, match="unknown backbone 'deit_smal'"):
        read_model("deit_smal")
    with pytest.raises(ValueError, match="holds no finished run"):
        read_model(str(tmp_path.parent))


@pytest.mark.parametrize(("depth", "stages"), [(12, (3, 6, 9)), (4, (1, 2, 3)), (2, (1,))])
def test_stages_are_those_of_rl4evit(depth, stages):
    assert stages_for(depth) == stages


def test_calls_are_timed_in_turns_by_the_median(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(comparison, "now", lambda _: clock["now"])
    turns = []

    def call(name, taken):
        turns.append(name)
        clock["now"] += next(taken)

    takes = {"a": iter([9.0, 1.0, 1.0, 7.0]), "b": iter([2.0, 2.0, 5.0, 9.0])}
    calls = {name: (lambda n=name, taken=taken: call(n, taken)) for name, taken in takes.items()}
    assert median_seconds(calls, CPU, 0.0) == {"a": 1.0, "b": 2.0}
    assert turns == ["a", "b"] * 3


def test_a_picture_shows_each_stage_with_its_number_of_patches(staged, photograph):
    found = compare(ViewedModel(staged), photograph, ["class attention", "random"], 0.5)
    picture = np.asarray(draw({"noise": found}))
    height, width = found.shown.shape[1:]
    assert FONT < LINE
    for row, look in enumerate(found.looks):
        top = row * (height + 2 * LINE + GAP)
        assert (picture[top : top + LINE] < 100).any()  # text
        for stage, alive in enumerate(look.alive):
            left = stage * (width + GAP)
            drawn = picture[top + LINE : top + LINE + height, left : left + width]
            assert np.array_equal(drawn, stage_strip(found.shown, alive[None], found.grid))
