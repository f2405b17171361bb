"""ATS against timm, against the runtime's masked execution, and against a slow, plain sampler."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunevit.agents import PrunedViT
from prunevit.agents.policies.dither import dither_levels
from prunevit.benchmarks.baselines import ats as ats_module
from prunevit.benchmarks.baselines.ats import ATS, sample
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

STAGES = (1, 3)
SAMPLES = (12, 9)
BACKBONES = {
    "class token": {},
    "layer scale": {"init_values": 0.1},
    "query and key norms": {"qk_norm": True},
    "registers": {"reg_tokens": 2},
    "mean with class token": {"global_pool": "avg"},
}
each_backbone = pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)


@pytest.fixture
def images(some_images):
    return some_images.load(range(6))[0]


# --- who is sampled ---


def plainly_sampled(significance, count):
    """Indices of the patches nearest to each point of the grid, of one image."""
    order = sorted(range(len(significance)), key=lambda i: float(significance[i]))
    levels, total = [], 0.0
    for i in order:
        total += float(significance[i])
        levels.append(total)
    levels = [(level - levels[0]) / (levels[-1] - levels[0]) for level in levels]
    first = next(level for level in levels if level > 0)
    candidates = range(max(len(order) - count, 0), len(order))
    kept = set()
    for step in range(count):
        point = first + (1 - first) * step / (count - 1)
        kept.add(order[min(candidates, key=lambda i: abs(levels[i] - point))])
    return kept


@pytest.mark.parametrize("count", [2, 5, 16, 80])
def test_the_patches_nearest_to_the_grid_are_sampled(count):
    generator = torch.Generator().manual_seed(0)
    significance = torch.rand(8, 16, generator=generator, dtype=torch.float64) ** 4
    alive = torch.rand(8, 16, generator=generator) < torch.linspace(0.3, 1, 8)[:, None]
    assert alive.sum(1).min() > 2
    kept = sample(significance, alive, count)
    for image in range(8):
        living = alive[image].nonzero()[:, 0]
        expected = plainly_sampled(significance[image, living], count)
        assert set(kept[image].nonzero()[:, 0].tolist()) == {int(living[i]) for i in expected}


def test_the_last_patch_stays_and_the_dead_are_not_sampled():
    alive = torch.zeros(3, 4, dtype=torch.bool)
    alive[1, 2] = alive[2, 0] = alive[2, 3] = True
    kept = sample(torch.ones(3, 4), alive, 4)
    assert kept.sum(1).tolist() == [0, 1, 1]
    assert not (kept & ~alive).any()


# --- the model ---


@each_backbone
@torch.no_grad()
def test_it_is_a_pass_with_the_sampled_patches_alone(sharp_vit, images, kwargs):
    """Survivors are what they would be if the others went behind the block instead of in it."""
    model = sharp_vit(**kwargs)
    backbone = StagedViT(model, STAGES)
    sampled = ATS(backbone, SAMPLES).trace(images)
    counts = sampled.alive.sum(2)
    assert len(counts[:, 0].unique()) > 1
    assert counts[:, 1].min() > 0
    assert (counts[:, 1] < counts[:, 0]).all()
    assert not (sampled.alive[:, 1] & ~sampled.alive[:, 0]).any()
    stages = iter(sampled.alive.unbind(1))
    pruned = PrunedViT(backbone, lambda view: next(stages))
    torch.testing.assert_close(sampled.logits, pruned(images), rtol=0, atol=1e-5)
    alone = torch.cat([ATS(backbone, SAMPLES)(image[None]) for image in images])
    torch.testing.assert_close(sampled.logits, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_stages_inside_of_blocks_are_where_it_samples_anyway(sharp_vit, images):
    model = sharp_vit()
    inside = StagedViT(model, [block - 1 for block in STAGES], prune_at="mlp")
    traces = [ATS(staged, SAMPLES).trace(images) for staged in (inside, StagedViT(model, STAGES))]
    for name in ("logits", "alive", "macs"):
        assert torch.equal(*(getattr(trace, name) for trace in traces)), name


@each_backbone
@torch.no_grad()
def test_its_cost_is_what_is_computed(sharp_vit, images, kwargs):
    model = sharp_vit(**kwargs)
    ats = ATS(StagedViT(model, STAGES), SAMPLES)
    for image in images:
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            trace = ats.trace(image[None])
        # the counter sees no products that aren't matrix products
        observed = sum(
            (model.num_prefix_tokens + patches) * model.embed_dim
            for patches in (16, int(trace.alive[0, 0].sum()))
        )
        assert int(trace.macs[0]) == counter.get_total_flops() // 2 + observed


@torch.no_grad()
def test_dither_spreads_alike_patches_and_is_the_same_for_all_images(
    sharp_vit, images, monkeypatch
):
    backbone = StagedViT(sharp_vit(), STAGES)
    seen = []

    def note(significance, alive, count):
        seen.append(significance)
        return sample(significance, alive, count)

    monkeypatch.setattr(ats_module, "sample", note)
    ATS(backbone, SAMPLES)(images)
    dithered = ATS(backbone, SAMPLES, dither=0.5)
    logits = dithered(images)
    assert torch.equal(logits, dithered(images))
    alone = torch.cat([dithered(image[None]) for image in images])
    torch.testing.assert_close(alone, logits, rtol=0, atol=1e-5)
    plain, changed = seen[0], seen[2]  # of the first stage, where all patches are alive
    levels = dither_levels(*backbone.grid_size, 0, logits.device)
    torch.testing.assert_close(changed / plain, (-levels.logit() / 2).exp().expand_as(plain))
    kept = dithered.trace(images).alive
    assert not torch.equal(kept, ATS(backbone, SAMPLES).trace(images).alive)


def test_what_it_can_not_do_is_refused(make_vit, vit):
    backbone = StagedViT(vit, STAGES)
    for samples in ((4,), (4, 1), (4, 4.5)):
        with pytest.raises(ValueError, match="2 stages need a number each, at least 2"):
            ATS(backbone, samples)
    with pytest.raises(ValueError, match="no block comes before"):
        ATS(StagedViT(vit, (0, 2)), SAMPLES)
    without = make_vit(class_token=False, global_pool="avg")
    with pytest.raises(UnsupportedBackboneError, match="needs a class token"):
        ATS(StagedViT(without, STAGES), SAMPLES)
    with pytest.raises(UnsupportedBackboneError, match="drops what it doesn't sample"):
        ATS(StagedViT(vit, STAGES, on_prune="merge"), SAMPLES)
