"""StagedViT against timm's own modules, run on the surviving tokens of one image at a time."""

from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock
from torch.utils.flop_counter import FlopCounterMode

from prunevit.envs.vit.attention import MANY_IMAGES
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

EXECUTIONS = ("packed", "masked")
STAGES = (1, 3)
BATCH = 6
MANY = 2 * MANY_IMAGES  # of one length often enough to attend by batched products
FAMILIES = {
    "deit": ("deit_tiny_patch16_224", {}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2-swiglu": ("vit_giant_patch14_reg4_dinov2", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip-gap": ("vit_base_patch16_siglip_gap_224", {}),
    "registers-only": ("vit_medium_patch16_reg4_gap_256", {}),
    "token": ("vit_tiny_patch16_224", {}),
    "avg": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "max": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "avgmax": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "map": ("vit_tiny_patch16_224", {"global_pool": "map"}),
    "map-with-prefix": (
        "vit_tiny_patch16_224",
        {"global_pool": "map", "pool_include_prefix": True},
    ),
    "prr": ("vit_tiny_patch16_224", {"global_pool": "prr"}),
    "prr-no-class": ("vit_tiny_patch16_224", {"global_pool": "prr", "class_token": False}),
    "avg-with-prefix": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "pool_include_prefix": True},
    ),
    "max-with-prefix": (
        "vit_tiny_patch16_224",
        {"global_pool": "max", "pool_include_prefix": True},
    ),
    "no-class": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "avg-without-fc-norm": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "token-with-fc-norm": ("vit_tiny_patch16_224", {"fc_norm": True}),
    "no-final-norm": ("vit_tiny_patch16_224", {"final_norm": False}),
    "no-positions": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1}),
    "scale-norms": (
        "vit_tiny_patch16_224",
        {"scale_attn_norm": True, "scale_mlp_norm": True, "mlp_layer": SwiGLU},
    ),
    "gated-attention": ("vit_tiny_patch16_224", {"attention": {"gated": True}}),
    "wide-heads": ("vit_tiny_patch16_224", {"attention": {"attn_head_dim": 24}}),
    "oblong": ("vit_tiny_patch16_224", {"img_size": (16, 48)}),
    "dynamic-size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
}
SINCE = {"1.0.28": {"gated-attention"}}
# their heads read no prefix token
PATCHES_ONLY = {
    "siglip",
    "siglip-gap",
    "registers-only",
    "avg",
    "max",
    "avgmax",
    "map",
    "no-class",
    "prr-no-class",
    "avg-without-fc-norm",
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_execution = pytest.mark.parametrize("execution", EXECUTIONS)


def draw_images(staged, count=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *staged.image_shape, generator=generator)


def play(staged, images, keep, with_attention=True):
    """Runs the whole model; returns the tokens of every stage, [-1] those at the end."""
    passed = [staged.begin(images, with_attention)]
    for stage, decision in enumerate(keep):
        passed.append(staged.advance(passed[-1], decision, stage, with_attention))
    return passed


def attention_by_slot(tokens):
    """[B, L], zeros where not alive."""
    paid = tokens.x.new_zeros(tokens.alive.numel())
    living = tokens.alive.flatten()
    paid[living] = tokens.attention[tokens.row[living]]
    return paid.view(tokens.alive.shape)


def explicit_attention(model, block, x):
    """The observed row of softmax(q k^T) for the tokens x [1, L, D] of one image."""
    attn = block.attn
    q, k, _ = (
        attn.qkv(block.norm1(x))
        .reshape(x.shape[1], 3, attn.num_heads, attn.head_dim)
        .permute(1, 2, 0, 3)
    )
    q, k = attn.q_norm(q), attn.k_norm(k)
    # without a class token the mean query of the prefix, or of all, stands in
    count = 1 if model.cls_token is not None else model.num_prefix_tokens or None
    query = q[:, :count].mean(1, keepdim=True)
    return (query @ k.transpose(1, 2) * attn.scale).softmax(-1).mean(0)[0]


@torch.no_grad()
def by_hand(model, image, keep, stages, keeps_last):
    """One image through timm's own modules, on the tokens that survive; keep [T, N].

    Returns:
        logits [classes]; of each stage the attention observed there, by slot, [T, L]; and who
        survived, [T, N].
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    prefix, slots = model.num_prefix_tokens, x.shape[1]
    alive = torch.ones(slots, dtype=torch.bool)
    observed, survivors = [], []
    for i, block in enumerate(model.blocks):
        if i in stages:
            wanted = alive.clone()
            wanted[prefix:] &= keep[len(survivors)]
            if keeps_last and not wanted[prefix:].any():
                wanted[prefix + int(alive[prefix:].nonzero()[0])] = True
            x, alive = x[:, wanted[alive]], wanted
            survivors.append(alive[prefix:])
        if i + 1 in stages:
            row = torch.zeros(slots)
            row[alive] = explicit_attention(model, block, x)
            observed.append(row)
        x = block(x)
    return model.forward_head(model.norm(x))[0], torch.stack(observed), torch.stack(survivors)


def random_orders(count, seed=0):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# --- against timm ---


@each_family
def test_timm_alone_shows_every_parameter(build, family):
    """Or the comparisons below would not see that one was ignored."""
    model = deepcopy(build(family))
    model(draw_images(StagedViT(model))).square().sum().backward()
    for name, parameter in model.named_parameters():
        # softmax does not see what is added to every key alike
        if not name.endswith("k_norm.bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 1e-4, name


@each_family
@each_execution
@torch.no_grad()
def test_nothing_pruned_equals_timm(build, family, execution):
    model = build(family)
    staged = StagedViT(model, STAGES, execution)
    images = draw_images(staged)
    keep_all = torch.ones(len(STAGES), BATCH, staged.num_patches, dtype=torch.bool)
    end = play(staged, images, keep_all)[-1]
    torch.testing.assert_close(staged.finish(end), model(images), rtol=0, atol=1e-5)
    assert end.alive.all()
    assert (staged.total_macs(end) - staged.dense_macs).unique().numel() == 1


@each_family
@torch.no_grad()
def test_pruned_equals_tokens_taken_out_by_hand(build, keeps, family):
    model = build(family)
    executions = [StagedViT(model, STAGES, execution) for execution in EXECUTIONS]
    images = draw_images(executions[0])
    keep = keeps(BATCH, len(STAGES), executions[0].num_patches)
    keeps_last = executions[0].keeps_last_patch
    by_image = [
        by_hand(model, image, keep[:, i], STAGES, keeps_last) for i, image in enumerate(images)
    ]
    for staged in executions:
        passed = play(staged, images, keep)
        logits = staged.finish(passed[-1])
        for i, (expected, attention, survivors) in enumerate(by_image):
            torch.testing.assert_close(logits[i], expected, rtol=0, atol=1e-4)
            for stage, tokens in enumerate(passed[:-1]):
                torch.testing.assert_close(
                    attention_by_slot(tokens)[i], attention[stage], rtol=0, atol=1e-5
                )
                alive = passed[stage + 1].alive[i, staged.num_prefix :]
                assert torch.equal(alive, survivors[stage])


@pytest.mark.parametrize(
    "family", ["deit", "deit-distilled", "registers-only", "siglip", "no-class"]
)
@pytest.mark.parametrize("pattern", ["random", "none", "all", "empty-then-full", "full-then-empty"])
@pytest.mark.parametrize("batch", [BATCH, 1, 0])
@torch.no_grad()
def test_packed_equals_masked(build, family, pattern, batch):
    model = build(family)
    packed, masked = (StagedViT(model, (0, 1, 3), execution) for execution in EXECUTIONS)
    agents = packed.num_patches
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(3, batch, agents, generator=generator) < 0.6
    if pattern in ("none", "all"):
        keep[:] = pattern == "none"
    elif pattern != "random":
        keep[1] = (torch.arange(batch) % 2 == int(pattern == "empty-then-full"))[:, None]
        keep[0] |= keep[1]
    images = draw_images(packed, batch)
    runs = [play(staged, images, keep) for staged in (packed, masked)]
    for ours, reference in zip(*runs, strict=True):
        assert torch.equal(ours.alive, reference.alive)
        assert torch.equal(packed.spent_macs(ours), masked.spent_macs(reference))
        assert (ours.attention is None) == (reference.attention is None)
        if ours.attention is not None:
            torch.testing.assert_close(
                attention_by_slot(ours), attention_by_slot(reference), rtol=0, atol=1e-5
            )
    logits = [staged.finish(run[-1]) for staged, run in zip((packed, masked), runs, strict=True)]
    assert logits[0].shape == (batch, packed.num_classes)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    macs = [staged.total_macs(run[-1]) for staged, run in zip((packed, masked), runs, strict=True)]
    assert torch.equal(*macs)


@each_execution
@torch.no_grad()
def test_images_do_not_see_each_other(build, keeps, execution):
    """A batch equals its images one by one, in whatever order they come."""
    staged = StagedViT(build("deit"), STAGES, execution)
    images = draw_images(staged)
    keep = keeps(BATCH, len(STAGES), staged.num_patches)
    passed = play(staged, images, keep)
    together = staged.finish(passed[-1])
    order = random_orders(BATCH)
    reordered = play(staged, images[order], keep[:, order])
    torch.testing.assert_close(staged.finish(reordered[-1]), together[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        attention_by_slot(reordered[1]), attention_by_slot(passed[1])[order], rtol=0, atol=1e-6
    )
    assert torch.equal(staged.total_macs(reordered[-1]), staged.total_macs(passed[-1])[order])
    for i in range(BATCH):
        alone = play(staged, images[i : i + 1], keep[:, i : i + 1])[-1]
        torch.testing.assert_close(staged.finish(alone)[0], together[i], rtol=0, atol=1e-5)
        assert staged.total_macs(alone) == staged.total_macs(passed[-1])[i]


# --- who stays ---


@each_execution
@torch.no_grad()
def test_the_pruned_stay_pruned(build, execution):
    staged = StagedViT(build("deit"), STAGES, execution)
    images = draw_images(staged, 2)
    first = torch.rand(2, staged.num_patches, generator=torch.Generator().manual_seed(0)) < 0.5
    everyone = torch.ones_like(first)
    again, only = (play(staged, images, (first, keep))[-1] for keep in (everyone, first))
    assert torch.equal(again.alive[:, staged.num_prefix :], first)
    assert torch.equal(again.alive, only.alive)
    assert torch.equal(staged.finish(again), staged.finish(only))


@each_family
@torch.no_grad()
def test_who_is_left_when_all_patches_are_given_up(build, family):
    """The prefix goes on alone if the head reads it, else with the first of the living patches."""
    staged = StagedViT(build(family), STAGES)
    keep = torch.zeros(2, 3, staged.num_patches, dtype=torch.bool)
    keep[0, 0, [4, 9]] = True
    end = play(staged, draw_images(staged, 3), keep)[-1]
    assert end.alive[:, : staged.num_prefix].all()
    left = torch.zeros(3, staged.num_patches, dtype=torch.bool)
    if family in PATCHES_ONLY:
        left[0, 4] = left[1, 0] = left[2, 0] = True
    assert torch.equal(end.alive[:, staged.num_prefix :], left)
    assert staged.finish(end).isfinite().all()


# --- attention ---


@each_execution
@torch.no_grad()
def test_attention_is_observed_only_where_it_is_asked_for(build, keeps, execution):
    staged = StagedViT(build("deit"), (0, 2), execution)
    images = draw_images(staged)
    keep = keeps(BATCH, 2, staged.num_patches)
    seen, unseen = play(staged, images, keep), play(staged, images, keep, with_attention=False)
    # no block runs before the first stage, and nobody decides after the last
    assert [tokens.attention is not None for tokens in seen] == [False, True, False]
    assert all(tokens.attention is None for tokens in unseen)
    assert torch.equal(staged.finish(seen[-1]), staged.finish(unseen[-1]))
    paid = attention_by_slot(seen[1])
    torch.testing.assert_close(paid.sum(1), torch.ones(BATCH))
    assert not paid[~seen[1].alive].any()
    row = seen[1].alive.sum(1) * staged.width
    assert torch.equal(staged.total_macs(seen[-1]) - staged.total_macs(unseen[-1]), row)


# --- repeated images ---


@each_execution
@torch.no_grad()
def test_repeated_tokens_are_those_of_repeated_images(build, keeps, execution):
    staged = StagedViT(build("registers-only"), STAGES, execution)
    images = draw_images(staged, 2)
    repeated = staged.begin(images).repeat(3)
    expected = staged.begin(images.repeat_interleave(3, dim=0))
    keep = keeps(6, 2, staged.num_patches)
    for stage in range(2):
        torch.testing.assert_close(attention_by_slot(repeated), attention_by_slot(expected))
        assert torch.equal(repeated.alive, expected.alive)
        assert torch.equal(staged.spent_macs(repeated), staged.spent_macs(expected))
        repeated, expected = (
            staged.advance(tokens, keep[stage], stage) for tokens in (repeated, expected)
        )
    torch.testing.assert_close(staged.finish(repeated), staged.finish(expected), rtol=0, atol=1e-5)


# --- what it costs ---


def counted(run):
    # without a graph the counter fails in attention pooling
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@each_family
def test_dense_macs_are_those_of_the_flop_counter(build, family):
    model = build(family)
    staged = StagedViT(model, STAGES)
    image = draw_images(staged, 1)
    assert staged.dense_macs == counted(lambda: model(image))


@each_family
def test_macs_of_pruned_images_are_those_of_the_flop_counter(build, keeps, family):
    """The counter sees products of matrices; the observed row is made of products of elements."""
    staged = StagedViT(build(family), STAGES)
    attn = staged.model.blocks[0].attn
    keep = keeps(2, len(STAGES), staged.num_patches)
    for i, image in enumerate(draw_images(staged, 2)):
        passed = []

        def run(image=image, keep=keep[:, i : i + 1], passed=passed):
            passed.extend(play(staged, image[None], keep))
            staged.finish(passed[-1])

        spent = counted(run)
        seen = sum(int(tokens.alive.sum()) for tokens in passed if tokens.attention is not None)
        expected = spent + seen * attn.num_heads * attn.head_dim
        assert staged.total_macs(passed[-1]).tolist() == [expected]


@each_family
@pytest.mark.parametrize("with_attention", [True, False])
@torch.no_grad()
def test_uniform_macs_are_those_of_images_that_keep_so_many(build, family, with_attention):
    staged = StagedViT(build(family), (0, 1, 3))
    images = draw_images(staged, 2)
    for kept in ((12, 7, 7), (staged.num_patches,) * 3, (3, 2, 0)):
        keep = torch.zeros(3, 2, staged.num_patches, dtype=torch.bool)
        for stage, count in enumerate(kept):
            keep[stage, :, :count] = True
        end = play(staged, images, keep, with_attention)[-1]
        expected = staged.uniform_macs(kept, with_attention)
        assert staged.total_macs(end).tolist() == [expected, expected]


@torch.no_grad()
def test_segments_add_up_to_the_blocks_behind_the_first_stage(build):
    staged = StagedViT(build("deit"), STAGES)
    count = torch.tensor([[3, 16], [0, 8]])
    first, second = staged.segment_macs(count, 0), staged.segment_macs(count, 1)
    assert first.shape == count.shape
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        kept = int(count[place])
        before = staged.uniform_macs((kept, kept), with_attention=False)
        assert before - int(first[place]) - int(second[place]) == counted(
            lambda kept=kept: unblocked(staged, kept)
        )


def unblocked(staged, kept):
    """What no stage decides: the stem, the first block, and the head."""
    model = staged.model
    x = model.blocks[0](model._pos_embed(model.patch_embed(draw_images(staged, 1))))
    model.forward_head(model.norm(x[:, : 1 + kept]))


@pytest.mark.parametrize(
    ("name", "gmacs"), [("deit_small_patch16_224", "4.60"), ("deit_base_patch16_224", "17.6")]
)
def test_known_models_cost_what_is_known(name, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name)
    staged = StagedViT(model.eval())
    assert f"{staged.dense_macs / 1e9:#.3g}" == gmacs
    assert staged.uniform_macs([196] * 11, with_attention=False) == staged.dense_macs


# --- the model given ---


@each_execution
def test_the_model_is_used_as_it_is(execution):
    """Batch normalisation and dropout, in training mode, would show a forward pass that is none of
    the caller's.
    """
    model = create_backbone(untrained=True, drop_rate=0.1, depth=2).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    before = deepcopy(model.state_dict())
    staged = StagedViT(model, execution=execution)
    assert staged.model is model
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gradients_reach_every_parameter_in_masked_execution(make_vit, keeps):
    model = make_vit("deit_tiny_distilled_patch16_224")
    staged = StagedViT(model, STAGES, "masked")
    end = play(staged, draw_images(staged), keeps(BATCH, 2, staged.num_patches))[-1]
    staged.finish(end).square().sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in model.parameters())


def gradients(staged, images, keep):
    """Of a loss, in the images and in all parameters."""
    logits = staged.finish(play(staged, images, keep)[-1])
    loss = (logits.log_softmax(1)[:, 0] + logits.square().mean(1)).mean()
    return torch.autograd.grad(loss, [images, *staged.model.parameters()])


@each_family
@pytest.mark.parametrize("pattern", ["random", "even"])
def test_gradients_are_the_same_packed_and_masked(build, keeps, family, pattern):
    model = build(family)
    packed, masked = (StagedViT(model, STAGES, execution) for execution in EXECUTIONS)
    images = draw_images(packed, MANY).requires_grad_()
    keep = keeps(MANY, len(STAGES), packed.num_patches)
    if pattern == "even":  # of every image as many survive
        keep = keep[:, 3:4].repeat(1, MANY, 1)
    names = ["images", *dict(model.named_parameters())]
    pairs = zip(*(gradients(staged, images, keep) for staged in (packed, masked)), strict=True)
    for name, (ours, reference) in zip(names, pairs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4, msg=name)
        assert name.endswith("k_norm.bias") or ours.norm() > 0, name


# --- what is refused ---


def refused(model, reason):
    with pytest.raises(UnsupportedBackboneError, match=reason) as caught:
        StagedViT(model)
    assert type(model).__name__ in str(caught.value)
    assert "DINOv2" in str(caught.value)  # what would be supported


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": 64, "window_size": 2},
            "not that of timm's VisionTransformer",
        ),
        (
            "convnext_atto",
            {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
            "not that of timm's VisionTransformer",
        ),
        (
            "beit_base_patch16_224",
            {"depth": 1, "embed_dim": 48, "num_heads": 2, "img_size": 32},
            "a bias for each pair of places",
        ),
    ],
)
def test_models_of_another_kind_are_refused(name, kwargs, reason):
    refused(timm.create_model(name, **kwargs), reason)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"block_fn": ParallelScalingBlock}, "block 0 is a ParallelScalingBlock"),
        ({"attn_layer": "diff"}, "attention of block 0 is a DiffAttention"),
        ({"depth": 0}, "no blocks"),
        ({"img_size": 20, "dynamic_img_size": True, "dynamic_img_pad": True}, "pads images"),
    ],
)
def test_vits_that_are_not_plain_are_refused(make_vit, kwargs, reason):
    refused(make_vit(**kwargs), reason)


def test_models_with_another_forward_pass_and_what_is_no_model_are_refused(vit):
    class Other(type(vit)):
        def forward_features(self, x):
            return 2 * super().forward_features(x)

    other = deepcopy(vit)
    other.__class__ = Other
    refused(other, "forward pass")
    refused(torch.nn.Linear(2, 2), "forward pass")


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ((), "empty"),
        ((4,), r"out of range.*0\.\.3"),
        ((-1, 2), "out of range"),
        ((1, 1), "without repeats"),
        ((2, 1), "ascend"),
        ((1.0, 2), "whole numbers"),
        ("12", "whole numbers"),
        (3, "whole numbers"),
    ],
)
def test_wrong_stages_are_refused(vit, stages, reason):
    with pytest.raises(ValueError, match=reason):
        StagedViT(vit, stages)


def test_stages_default_to_every_block_but_the_first(vit, make_vit):
    assert StagedViT(vit).prune_before == (1, 2, 3)
    with pytest.raises(ValueError, match=r"prune_before=\(0,\)"):
        StagedViT(make_vit(depth=1))
    assert StagedViT(make_vit(depth=1), (0,)).num_stages == 1


def test_stages_may_be_any_whole_numbers(vit):
    for stages in ([1, 3], range(1, 4, 2), np.array([1, 3])):
        assert StagedViT(vit, stages).prune_before == (1, 3)


def test_an_unknown_execution_is_refused(vit):
    with pytest.raises(ValueError, match=r"'jagged'.*packed, masked"):
        StagedViT(vit, execution="jagged")
