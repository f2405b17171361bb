"""Pruned patches merge into survivors: against loops over patches, and where nothing is lost."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from prunevit.envs.vit.merging import merge_tokens
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

EXECUTIONS = ("packed", "masked")
STAGES = (0, 1, 3)
BATCH = 6
FAMILIES = {
    "class-token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "rotary": ("eva02_tiny_patch14_224", {}),
    "avg-without-prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "avg": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "avgmax-with-prefix": (
        "vit_tiny_patch16_224",
        {"global_pool": "avgmax", "pool_include_prefix": True},
    ),
    "map": ("vit_base_patch16_siglip_224", {}),
    "prr": ("vit_tiny_patch16_224", {"global_pool": "prr"}),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_execution = pytest.mark.parametrize("execution", EXECUTIONS)


def merging(model, execution="packed", stages=STAGES, prune_at="block"):
    return StagedViT(model, stages, execution, on_prune="merge", prune_at=prune_at)


def draw_images(staged, count=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *staged.image_shape, generator=generator)


def play(staged, images, keep, with_attention=True):
    """The tokens of every stage, [-1] those at the end."""
    passed = [staged.begin(images, with_attention)]
    for stage, decision in enumerate(keep):
        passed.append(staged.advance(passed[-1], decision, stage, with_attention))
    return passed


def by_slot(tokens, values):
    """Values of rows by slot [B, L, ...], zeros where not alive."""
    dense = values.new_zeros(tokens.alive.numel(), *values.shape[1:])
    living = tokens.alive.flatten()
    dense[living] = values[tokens.row[living]]
    return dense.unflatten(0, tokens.alive.shape)


def merged_by_hand(x, size, before, after, prefix):
    """One image's slots [L, D] and sizes [L] after its patches merged, one at a time."""
    gone = [i for i in range(prefix, len(x)) if before[i] and not after[i]]
    stay = [i for i in range(prefix, len(x)) if after[i]]
    total, weight = x * size[:, None], size.clone()
    for i in gone if stay else []:
        into = max(stay, key=lambda j: float(F.cosine_similarity(x[i], x[j], dim=0)))
        total[into] += x[i] * size[i]
        weight[into] += size[i]
    return total / weight[:, None], weight


@each_execution
@torch.no_grad()
def test_patches_are_averaged_into_the_most_similar_survivor(build, keeps, execution):
    staged = merging(build("class-token"), execution)
    prefix = staged.num_prefix
    tokens = staged.begin(draw_images(staged))
    size = torch.ones(tokens.alive.shape)
    for keep in keeps(BATCH, 3, staged.num_patches):
        x, before = by_slot(tokens, tokens.x), tokens.alive
        tokens = staged.prune(tokens, keep)
        seen, sizes = by_slot(tokens, tokens.x), by_slot(tokens, tokens.size)
        for i, after in enumerate(tokens.alive):
            expected, size[i] = merged_by_hand(x[i], size[i], before[i], after, prefix)
            torch.testing.assert_close(seen[i][after], expected[after], rtol=0, atol=1e-6)
            assert torch.equal(sizes[i][after], size[i][after])
    survives = tokens.alive[:, prefix:].any(1)
    assert survives.any()
    assert not survives.all()
    assert torch.equal(sizes[:, prefix:].sum(1), survives * staged.num_patches)


@each_family
@pytest.mark.parametrize("prune_at", ["block", "mlp"])
@torch.no_grad()
def test_packed_equals_masked(build, keeps, family, prune_at):
    packed, masked = (
        merging(build(family), execution, prune_at=prune_at) for execution in EXECUTIONS
    )
    images = draw_images(packed, 2 * BATCH)
    for seed in range(3):
        keep = keeps(len(images), 3, packed.num_patches, seed)
        runs = [play(staged, images, keep) for staged in (packed, masked)]
        for ours, reference in zip(*runs, strict=True):
            assert torch.equal(ours.alive, reference.alive)
            assert torch.equal(packed.spent_macs(ours), masked.spent_macs(reference))
            for name in ("attention", "size"):
                values = getattr(ours, name), getattr(reference, name)
                if values[0] is None:
                    assert values[1] is None
                    continue
                seen = map(by_slot, (ours, reference), values)
                torch.testing.assert_close(*seen, rtol=0, atol=1e-5)
        logits = [
            staged.finish(run[-1]) for staged, run in zip((packed, masked), runs, strict=True)
        ]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@each_family
def test_gradients_are_the_same_packed_and_masked(build, keeps, family):
    model = build(family)
    keep = keeps(BATCH, 3, 16)
    found = []
    for execution in EXECUTIONS:
        staged = merging(model, execution)
        images = draw_images(staged).requires_grad_()
        logits = staged.finish(play(staged, images, keep)[-1])
        loss = logits.log_softmax(1)[:, 0].mean()
        found.append(torch.autograd.grad(loss, [images, *model.parameters()]))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    # also to patches that were gone before the first block, where their image had any left
    of_patches = F.unfold(found[0][0][2:], kernel_size=8, stride=8)
    assert of_patches.norm(dim=1).min() > 0


@each_family
@each_execution
@torch.no_grad()
def test_where_nothing_is_pruned_nothing_changes(build, family, execution):
    model = build(family)
    images = draw_images(merging(model))
    keep_all = torch.ones(3, BATCH, 16, dtype=torch.bool)
    merged, dropped = (
        staged.finish(play(staged, images, keep_all)[-1])
        for staged in (merging(model, execution), StagedViT(model, STAGES, execution))
    )
    assert torch.equal(merged, dropped)
    torch.testing.assert_close(merged, model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "avg"}, {"global_pool": "map"}])
@each_execution
@torch.no_grad()
def test_merging_equal_tokens_loses_nothing(make_vit, kwargs, execution):
    """Without positions, patches that look alike are alike, and one can stand for all of them."""
    model = make_vit(pos_embed="none", **kwargs)
    dropping, staged = StagedViT(model, (1, 2), execution), merging(model, execution, (1, 2))
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(BATCH, 4, 3, 8, 8, generator=generator)  # four kinds of patches
    kinds = torch.randint(4, (BATCH, 16), generator=generator)
    patches = few.take_along_dim(kinds[..., None, None, None], 1)
    images = patches.view(BATCH, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(BATCH, 3, 32, 32)
    alike = kinds[:, :, None] == kinds[:, None]
    is_first = ~alike.tril(-1).any(2)
    keep = torch.stack([is_first | (torch.arange(16) % 3 > 0), is_first])
    dense = model(images)
    torch.testing.assert_close(
        staged.finish(play(staged, images, keep)[-1]), dense, rtol=0, atol=1e-5
    )
    assert (dropping.finish(play(dropping, images, keep)[-1]) - dense).abs().max() > 0.01


@torch.no_grad()
def test_images_do_not_see_each_other(build, keeps):
    staged = merging(build("class-token"))
    images = draw_images(staged)
    keep = keeps(BATCH, 3, staged.num_patches)
    end = play(staged, images, keep)[-1]
    together = staged.finish(end)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    reordered = play(staged, images[order], keep[:, order])[-1]
    torch.testing.assert_close(staged.finish(reordered), together[order], rtol=0, atol=1e-5)
    assert torch.equal(staged.total_macs(reordered), staged.total_macs(end)[order])
    for i in range(BATCH):
        alone = play(staged, images[i : i + 1], keep[:, i : i + 1])[-1]
        torch.testing.assert_close(staged.finish(alone)[0], together[i], rtol=0, atol=1e-5)


@each_execution
@torch.no_grad()
def test_episodes_of_one_image_merge_on_their_own(build, keeps, execution):
    staged = merging(build("avg"), execution, (1, 3))
    images = draw_images(staged, 2)
    keep = keeps(6, 2, staged.num_patches)
    ends = []
    for tokens in (staged.begin(images).repeat(3), staged.begin(images.repeat_interleave(3, 0))):
        later = staged.advance(tokens, keep[0], 0)
        again = later.repeat(2)
        ends += [staged.advance(later, keep[1], 1)]
        ends += [staged.advance(again, keep[1].repeat_interleave(2, 0), 1)]
    first, repeated, expected, _ = map(staged.finish, ends)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(repeated, expected.repeat_interleave(2, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["class-token", "avg-without-prefix"])
@each_execution
@torch.no_grad()
def test_the_last_patch_of_a_head_that_reads_no_other_takes_them_all(build, family, execution):
    staged = merging(build(family), execution, (1,))
    tokens = staged.begin(draw_images(staged, 2))
    left = staged.prune(tokens, torch.zeros(2, staged.num_patches, dtype=torch.bool))
    if family == "class-token":
        assert left.size is None
        return
    patches = tokens.x.unflatten(0, (2, -1))
    torch.testing.assert_close(by_slot(left, left.x)[:, 0], patches.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_many_patches_merge_in_half_precision(build, dtype):
    staged = merging(build("class-token"), stages=(1,))
    tokens = staged.begin(draw_images(staged, 2))
    alive = tokens.alive.clone()
    alive[:, 2:] = False
    exact = merge_tokens(tokens, alive, 1)
    half = merge_tokens(replace(tokens, x=tokens.x.to(dtype)), alive, 1)
    assert half.x.dtype == dtype
    torch.testing.assert_close(half.x.float(), exact.x, rtol=0, atol=0.02)


@each_execution
@torch.no_grad()
def test_blocks_with_hooks_see_the_same(make_vit, keeps, execution):
    model = make_vit()
    plain = merging(model, execution)
    images, keep = draw_images(plain), keeps(BATCH, 3, 16)
    seen = play(plain, images, keep)
    calls = []
    model.blocks[2].mlp.register_forward_hook(lambda *_: calls.append(1))
    hooked = play(plain, images, keep)
    assert calls
    torch.testing.assert_close(plain.finish(hooked[-1]), plain.finish(seen[-1]), rtol=0, atol=1e-5)
    for ours, expected in zip(hooked[:-1], seen[:-1], strict=True):
        if expected.attention is not None:
            paid = (by_slot(tokens, tokens.attention) for tokens in (ours, expected))
            torch.testing.assert_close(*paid, rtol=0, atol=1e-5)


# --- what it costs ---


@pytest.mark.parametrize("family", ["class-token", "avg-without-prefix"])
@pytest.mark.parametrize("prune_at", ["block", "mlp"])
def test_macs_are_those_of_the_flop_counter_and_of_the_averages(build, keeps, family, prune_at):
    staged = merging(build(family), prune_at=prune_at)
    keep = keeps(3, len(STAGES), staged.num_patches)
    for i, image in enumerate(draw_images(staged, 3)):
        with FlopCounterMode(display=False) as counter:
            passed = play(staged, image[None], keep[:, i : i + 1], with_attention=False)
            staged.finish(passed[-1])
        left = [int(tokens.alive[:, staged.num_prefix :].sum()) for tokens in passed]
        moved = sum(a - b for a, b in pairwise(left) if b)
        spent = counter.get_total_flops() // 2 + 2 * moved * staged.width
        assert staged.total_macs(passed[-1]).tolist() == [spent]


@torch.no_grad()
def test_uniform_macs_are_those_of_images_that_keep_so_many(build):
    staged = merging(build("class-token"))
    for kept in ((12, 7, 7), (16, 16, 16), (3, 2, 0)):
        keep = torch.arange(16) < torch.tensor(kept)[:, None, None]
        end = play(staged, draw_images(staged, 1), keep)[-1]
        assert staged.total_macs(end).tolist() == [staged.uniform_macs(kept)]
    dropping = StagedViT(staged.model, STAGES)
    similarities = 4 * 12 + 5 * 7
    more = staged.uniform_macs((12, 7, 7)) - dropping.uniform_macs((12, 7, 7))
    assert more == (similarities + 2 * 9) * staged.width


# --- what is refused ---


def test_heads_that_can_not_weigh_patches_are_refused(make_vit):
    pooling, reading = merging(make_vit(global_pool="avg")), merging(make_vit())
    images = draw_images(pooling, 2)
    with pytest.raises(UnsupportedBackboneError, match="how many patches"):
        pooling.classify(pooling.features(pooling.begin(images)))
    for staged in (pooling, reading):
        staged.model.norm.register_forward_hook(lambda *_: None)
    reading.begin(images)
    with pytest.raises(UnsupportedBackboneError, match="pooling head with hooks"):
        pooling.begin(images)


def test_there_are_two_ways(vit):
    with pytest.raises(ValueError, match="unknown on_prune 'fuse': choose from drop, merge"):
        StagedViT(vit, on_prune="fuse")
