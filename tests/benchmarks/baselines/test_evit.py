"""EViT against the paper's counts, against timm, and against pruning by class attention."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock

from prunevit.agents import PrunedViT, TopK
from prunevit.benchmarks.baselines.evit import (
    EViT,
    even_tokens,
    macs_counter,
    reorganise,
    token_counts,
)
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

STAGES = (1, 3)
PAPERS_STAGES = (4, 7, 10)


# --- the paper's numbers ---


def test_token_counts_of_the_papers_schedule():
    """DeiT's 196 patches at keep rate 0.7: a fused token counts as a patch at the next stage."""
    tokens = even_tokens(196, 0.7, 3)
    assert tokens == (138, 98, 70)
    assert token_counts(196, tokens) == [139, 99, 71]
    assert even_tokens(196, 0.5, 3, with_fused=False) == (98, 49, 25)
    assert token_counts(196, (98, 49, 25), with_fused=False) == [98, 49, 25]
    assert token_counts(16, (16, 20, 4, 4)) == [16, 16, 5, 5]  # nothing goes, so nothing is fused


@pytest.mark.parametrize(
    ("keep_rate", "gmacs"), [(1.0, 4.6), (0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)]
)
def test_cost_of_deit_small_is_what_the_paper_says(keep_rate, gmacs):
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224").eval()
    count = macs_counter(model, (3, 224, 224), PAPERS_STAGES)
    assert count(even_tokens(196, keep_rate, 3)) / 1e9 == pytest.approx(gmacs, abs=0.06)


def test_a_pass_has_as_many_tokens_as_the_schedule_says(vit, images):
    seen = []
    hooks = [
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        for block in vit.blocks
    ]
    EViT(vit, STAGES, (9, 4))(images)
    for hook in hooks:
        hook.remove()
    first, second = (1 + count for count in token_counts(16, (9, 4)))
    assert seen == [first, first, second, second] == [11, 11, 6, 6]


# --- who stays ---


def test_the_attentive_stay_and_the_others_are_fused():
    patches = torch.arange(8.0).view(1, 4, 2)
    attention = torch.tensor([[0.1, 0.4, 0.05, 0.2]])
    out = reorganise(patches, attention, 2, with_fused=True)
    assert out[0, :2].tolist() == [[2, 3], [6, 7]]
    fused = 0.1 * patches[0, 0] + 0.05 * patches[0, 2]
    torch.testing.assert_close(out[0, 2], fused)
    assert torch.equal(reorganise(patches, attention, 2, with_fused=False), out[:, :2])
    assert torch.equal(reorganise(patches, attention, 4, with_fused=True), patches)


@torch.no_grad()
def test_where_nothing_goes_it_is_timms_model(make_vit, images, kwargs):
    model = make_vit(**kwargs)
    torch.testing.assert_close(
        EViT(model, STAGES, (16, 16))(images), model(images), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_without_fusing_it_is_pruning_by_class_attention(make_vit, images, kwargs):
    """The same patches survive, so the answers are the same; the MLPs before them are spared."""
    model, tokens = make_vit(**kwargs), (9, 4)
    backbone = StagedViT(model, STAGES)
    pruned = PrunedViT(backbone, TopK(tokens, "attention"))
    dropped = EViT(model, STAGES, tokens, with_fused=False)(images)
    torch.testing.assert_close(dropped, pruned(images), rtol=0, atol=1e-5)
    fused = EViT(model, STAGES, tokens)(images)
    assert not torch.allclose(fused, dropped, atol=1e-3)
    count = macs_counter(model, backbone.image_shape, STAGES, with_fused=False)
    mlp = sum(
        parameter.numel() for parameter in model.blocks[0].mlp.parameters() if parameter.dim() > 1
    )
    spared = ((16 - 9) + (9 - 4)) * mlp
    assert count(tokens) == backbone.uniform_macs(tokens) - spared


def test_the_model_is_not_changed(make_vit, images):
    model = make_vit()
    before = model(images)
    EViT(model, STAGES, (9, 4))(images)
    assert torch.equal(model(images), before)


# --- bad input ---


def test_what_it_can_not_do_is_refused(make_vit, vit):
    for kwargs in ({"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}):
        with pytest.raises(UnsupportedBackboneError, match="needs a class token"):
            EViT(make_vit(**kwargs), STAGES, (9, 4))
    with pytest.raises(UnsupportedBackboneError, match="ResPostBlock with Attention"):
        EViT(make_vit(block_fn=ResPostBlock), STAGES, (9, 4))
    for stages in ((0, 1), (1, 4), (3, 1), (1, 1)):
        with pytest.raises(ValueError, match=r"must ascend within 1\.\.3"):
            EViT(vit, stages, (9, 4))
    for tokens in ((9,), (9, -1)):
        with pytest.raises(ValueError, match="2 stages need a number each"):
            EViT(vit, STAGES, tokens)
