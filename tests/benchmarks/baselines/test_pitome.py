"""PiToMe against timm, and against a slow, plain version."""

import math

import pytest
import torch

from prunevit.benchmarks.baselines.pitome import PiToMeViT, energies, share_merges
from prunevit.benchmarks.baselines.timm_parts import pass_counter
from prunevit.benchmarks.baselines.tome import token_counts
from prunevit.envs.vit.macs import count_linear_macs
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

MERGES = (3, 2, 4, 3)
BACKBONES = {
    "class token": {},
    "layer scale": {"init_values": 0.1},
    "query and key norms": {"qk_norm": True},
    "registers": {"reg_tokens": 2},
    "mean": {"class_token": False, "global_pool": "avg"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
}
each_backbone = pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)


@pytest.fixture
def images(some_images):
    return some_images.load(range(3))[0]


def test_the_same_share_stays_in_each_block():
    assert share_merges(196, 0.9, 3) == (19, 17, 16)  # 177, 160 and 144 of 196 stay
    assert share_merges(196, 1.0, 2) == (0, 0)
    assert share_merges(9, 0.1, 2) == (4, 2)  # no more than half can merge


def test_who_is_like_many_others_has_much_energy():
    similarity = torch.tensor([[[1, 0.9, 0.1], [0.9, 1, -1], [0.1, -1, 1.0]]])
    below = [math.exp(cosine - 0.5) - 1 for cosine in (0.1, -1)]
    expected = [0.5 + 0.4 + below[0], 0.5 + 0.4 + below[1], 0.5 + below[0] + below[1]]
    torch.testing.assert_close(energies(similarity, 0.5)[0], torch.tensor(expected) / 3)


def plainly_merged(keys, sizes, patches, count, margin, protects):
    """The patches of one image behind a block, and their sizes, as sets of rows."""
    unit = [key / key.norm() for key in keys]
    cosine = [[float(a @ b) for b in unit] for a in unit]

    def energy(i):
        above = (c - margin for c in cosine[i])
        return sum(c if c > 0 else math.exp(c) - 1 for c in above) / len(keys)

    order = sorted(range(len(keys)), key=energy, reverse=True)
    taking_part = order[: 2 * count] if protects else order
    sources, targets = taking_part[::2], taking_part[1::2]
    into = {i: max(targets, key=lambda j: cosine[i][j]) for i in sources}
    merging = sorted(sources, key=lambda i: cosine[i][into[i]], reverse=True)[:count]
    groups = {i: [i] for i in range(len(keys)) if i not in merging}
    for i in merging:
        groups[into[i]].append(i)
    rows = []
    for group in groups.values():
        size = sum(float(sizes[i]) for i in group)
        mean = sum(patches[i] * sizes[i] for i in group) / size
        rows.append((*mean.tolist(), size))
    return sorted(rows)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_block_merges_as_a_plain_version_does(vit, index):
    """The first two blocks of four protect nobody."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(4, 11, 3, generator=generator)
    patches = torch.randn(4, 11, 2, generator=generator)
    sizes = torch.randint(1, 4, (4, 11, 1), generator=generator).float()
    merged, size = PiToMeViT(vit, MERGES)._merge(index, keys, patches, sizes, 3)
    for image in range(4):
        margin = (0.75, 0.5625, 0.375, 0.1875)[index]
        expected = plainly_merged(
            keys[image], sizes[image], patches[image], 3, margin, protects=index >= 2
        )
        found = sorted(torch.cat([merged[image], size[image]], dim=1).tolist())
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


@each_backbone
@torch.no_grad()
def test_without_merges_it_is_timms_model(make_vit, images, kwargs):
    model = make_vit(**kwargs)
    torch.testing.assert_close(PiToMeViT(model, (0,) * 4)(images), model(images), rtol=0, atol=1e-5)


@each_backbone
@torch.no_grad()
def test_prefix_tokens_are_protected_and_merged_patches_count_as_many(make_vit, images, kwargs):
    model = make_vit(**kwargs)
    seen = []
    hooks = [
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        for block in model.blocks
    ]
    proportional = PiToMeViT(model, MERGES)(images)
    for hook in hooks:
        hook.remove()
    assert seen == token_counts(16, model.num_prefix_tokens, MERGES)[1:]
    assert not torch.allclose(proportional, PiToMeViT(model, MERGES, False)(images), atol=1e-3)


@each_backbone
def test_its_cost_is_what_is_computed(make_vit, kwargs):
    model = make_vit(**kwargs)
    prefix = model.num_prefix_tokens
    cost = pass_counter(model, (3, 32, 32), PiToMeViT)(MERGES)
    counts = token_counts(16, prefix, MERGES)
    spared = 0
    for block, before, after in zip(model.blocks, counts, counts[1:], strict=False):
        attn, width = block.attn, model.embed_dim
        spared += (16 + prefix - before) * (
            count_linear_macs(attn.qkv) + count_linear_macs(attn.proj)
        )
        spared += 2 * width * ((16 + prefix) ** 2 - before**2)
        spared += (16 + prefix - after) * count_linear_macs(block.mlp)
        spared -= (before - prefix) ** 2 * attn.head_dim  # similarities
    pooling = 0
    if model.global_pool == "map":
        pool = model.attn_pool
        pooling = (16 - counts[-1]) * (count_linear_macs(pool.kv) + 2 * model.embed_dim)
    dense = pass_counter(model, (3, 32, 32), lambda model, _: model)(())
    assert cost == dense - spared - pooling


def test_the_model_is_not_changed(make_vit, images):
    model = make_vit()
    before = model(images)
    PiToMeViT(model, MERGES)(images)
    assert torch.equal(model(images), before)


def test_what_it_can_not_do_is_refused(make_vit):
    with pytest.raises(UnsupportedBackboneError, match="global_pool='max'"):
        PiToMeViT(make_vit(global_pool="max"), MERGES)
    with pytest.raises(ValueError, match="3 numbers of merges for 4 blocks"):
        PiToMeViT(make_vit(), MERGES[:3])
