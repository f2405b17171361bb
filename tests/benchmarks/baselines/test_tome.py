"""Token merging against the paper's counts, against timm, and against a slow, plain version."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock

from prunevit.benchmarks.baselines.tome import (
    ToMeViT,
    even_merges,
    macs_counter,
    match,
    merge,
    merges_at,
    split,
    token_counts,
)
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

BACKBONES = {
    "class token": {},
    "layer scale": {"init_values": 0.1},
    "query and key norms": {"qk_norm": True},
    "registers": {"reg_tokens": 2},
    "mean": {"class_token": False, "global_pool": "avg"},
    "mean with class token": {"global_pool": "avg"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
}
IMAGE = (3, 224, 224)


@pytest.fixture
def images(some_images):
    return some_images.load(range(3))[0]


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name).eval()


# --- the paper's numbers ---


@pytest.mark.parametrize(
    ("r", "depth", "last"),
    # 12 blocks of 197 tokens; where half of the patches are fewer than r, so many merge
    [(8, 12, 101), (13, 12, 41), (16, 12, 11), (8, 24, 7)],
)
def test_token_counts_of_the_constant_schedule(r, depth, last):
    counts = token_counts(196, 1, (r,) * depth)
    assert counts[:3] == [197, 197 - r, 197 - 2 * r]
    assert counts[-1] == last


@pytest.mark.parametrize(
    ("name", "r", "gmacs"),
    [
        ("deit_small_patch16_224", 0, 4.6),
        ("deit_small_patch16_224", 13, 2.7),
        ("vit_large_patch16_224", 8, 31.0),
    ],
)
def test_cost_is_what_the_paper_says(name, r, gmacs):
    model = on_meta(name)
    cost = macs_counter(model, IMAGE)((r,) * len(model.blocks)) / 1e9
    assert cost == pytest.approx(gmacs, abs=0.05)


def test_a_pass_has_as_many_tokens_as_the_schedule_says(vit, images):
    seen = []
    hooks = [
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        for block in vit.blocks
    ]
    ToMeViT(vit, (3, 0, 5, 9))(images)
    for hook in hooks:
        hook.remove()
    assert seen == token_counts(16, 1, (3, 0, 5, 9))[1:] == [14, 14, 9, 5]


# --- matching and merging ---


def test_the_most_similar_pairs_merge():
    sources = torch.tensor([[[1, 0], [0, 1], [3, 0.1]]])
    targets = torch.tensor([[[1, 0.2], [0, -1], [-1, -1.0]]])
    matching = match(sources, targets, 2)
    assert matching.merges.tolist() == [[2, 0]]  # cosine, not length
    assert matching.into.tolist() == [[0, 0]]
    assert matching.stays.tolist() == [[1]]


def test_sources_are_the_tokens_at_even_places():
    patches = torch.arange(5)[None]
    for prefix, places in {0: [0, 2, 4], 1: [1, 3], 2: [0, 2, 4], 5: [1, 3]}.items():
        sources, targets = split(patches, prefix)
        assert sources[0].tolist() == places
        assert sorted([*places, *targets[0].tolist()]) == list(range(5))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("patches", [8, 9])
def test_merging_is_the_mean_of_all_patches_behind_a_token(patches, prefix):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, patches, 4, generator=generator)
    x, size = first, torch.ones(2, patches, 1)
    behind = [[{i} for i in range(patches)] for _ in range(2)]
    for count in (3, 2, 1):
        matching = match(*split(x, prefix), count)
        x, size = merge(x, size, prefix, matching)
        for image, groups in enumerate(behind):
            sources, targets = groups[prefix::2], groups[1 - prefix :: 2]
            merges, into = matching.merges[image].tolist(), matching.into[image].tolist()
            for source, target in zip(merges, into, strict=True):
                targets[target] = targets[target] | sources[source]
            groups[:] = [sources[i] for i in matching.stays[image].tolist()] + targets
    for image, groups in enumerate(behind):
        assert sorted(i for group in groups for i in group) == list(range(patches))
        assert size[image, :, 0].tolist() == [len(group) for group in groups]
        means = torch.stack([first[image, sorted(group)].mean(0) for group in groups])
        torch.testing.assert_close(x[image], means)


# --- the model ---


@pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)
@torch.no_grad()
def test_without_merges_it_is_timms_model(make_vit, images, kwargs):
    model = make_vit(**kwargs)
    torch.testing.assert_close(ToMeViT(model, (0,) * 4)(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)
@torch.no_grad()
def test_merging_equal_patches_changes_nothing(make_vit, kwargs):
    """Proportional attention and weighted pooling: a token counts for all that went into it."""
    model = make_vit(**kwargs)
    model.pos_embed.zero_()
    # 8 pairs of equal patches, side by side
    images = torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    images = images.unflatten(3, (2, 8)).repeat_interleave(2, dim=3).flatten(3)
    merged = ToMeViT(model, (8, 0, 0, 0))(images)
    torch.testing.assert_close(merged, model(images), rtol=0, atol=1e-4)
    assert not torch.allclose(ToMeViT(model, (8, 2, 0, 0))(images), merged, atol=1e-3)


@torch.no_grad()
def test_a_distilled_model_keeps_both_its_tokens(images):
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.head_dist.weight)
    torch.testing.assert_close(ToMeViT(model, (0, 0))(images), model(images), rtol=0, atol=1e-5)
    assert ToMeViT(model, (8, 4))(images).shape == (3, 5)


def test_the_model_is_not_changed(make_vit, images):
    model = make_vit()
    before = model(images)
    ToMeViT(model, (4,) * 4)(images)
    assert torch.equal(model(images), before)


def test_what_it_can_not_do_is_refused(make_vit):
    with pytest.raises(UnsupportedBackboneError, match="global_pool='max'"):
        ToMeViT(make_vit(global_pool="max"), (0,) * 4)
    with pytest.raises(ValueError, match="3 numbers of merges for 4 blocks"):
        ToMeViT(make_vit(), (0,) * 3)


# --- equal cost ---


def test_merges_are_spread_evenly():
    assert even_merges(24, 4) == (6, 6, 6, 6)
    assert even_merges(26, 4) == (6, 6, 7, 7)


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_merges_are_the_fewest_that_are_not_above_the_cost(make_vit, share):
    model, shape = make_vit(img_size=128), (3, 128, 128)
    count = macs_counter(model, shape)
    target = share * count((0,) * 4)
    merges = merges_at(model, shape, target)
    assert 0.99 * target < count(merges) <= target
    assert count(even_merges(sum(merges) - 1, 4)) > target


def test_a_cost_out_of_reach_is_refused(vit):
    with pytest.raises(ValueError, match="can't get down to"):
        merges_at(vit, (3, 32, 32), 1)


def test_other_blocks_are_refused(make_vit):
    model = make_vit(block_fn=ResPostBlock)
    with pytest.raises(UnsupportedBackboneError, match="ResPostBlock with Attention"):
        ToMeViT(model, (0,) * 4)
    with pytest.raises(UnsupportedBackboneError, match="not for ResNet"):
        ToMeViT(timm.create_model("resnet10t"), (0,) * 4)
