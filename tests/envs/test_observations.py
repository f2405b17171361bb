"""Each field against a computation from timm's own modules, one image at a time."""

import math

import pytest
import torch

from prunevit.envs.fields import (
    DEFAULT_FIELDS,
    FIELDS,
    field_size,
    field_slices,
    patch_positions,
    state_size,
)
from prunevit.envs.game import TokenGame
from prunevit.envs.observations import View
from prunevit.envs.vit.staged_vit import StagedViT

BATCH = 5
STAGES = (1, 3)
MODELS = {
    "class token": {},
    "qk-norm": {"qk_norm": True},
    "class and registers": {"reg_tokens": 3},
    "registers": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "patches alone": {"class_token": False, "global_pool": "avg"},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
}
ALPHA = torch.arange(BATCH) / 4


@pytest.fixture(scope="module")
def models(make_vit):
    return {name: make_vit(**kwargs) for name, kwargs in MODELS.items()}


@pytest.fixture(params=MODELS)
def model(models, request):
    return models[request.param]


@pytest.fixture(params=["packed", "masked"])
def views(model, request, keeps):
    """Before the first stage, and before the second, whose images have lost different patches."""
    with torch.no_grad():
        backbone = StagedViT(model, STAGES, request.param)
        before = backbone.begin(draw_images())
        keep = keeps(BATCH, 2, backbone.num_patches)[0]
        after = backbone.advance(before, keep, 0)
        return View(backbone, before, 0, ALPHA), View(backbone, after, 1, ALPHA)


def draw_images():
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def by_hand(model, view):
    """What timm's modules make of each image's living tokens: embeddings [L, D] before the stage,
    and the attention [L] that the first query paid in the block before, explicitly.
    """
    seen = []
    for image, alive in zip(draw_images(), view.alive, strict=True):
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
        prefix = model.num_prefix_tokens
        for i, block in enumerate(model.blocks[: STAGES[view.stage]]):
            if i == STAGES[0]:
                x = torch.cat([x[:, :prefix], x[:, prefix:][:, alive]], dim=1)
            attn = block.attn
            qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))
            q, k, _ = qkv[0].permute(1, 2, 0, 3)
            q, k = attn.q_norm(q), attn.k_norm(k)
            matrix = q @ k.mT / math.sqrt(attn.head_dim)  # [heads, L, L]
            x = block(x)
        # without a class token the mean query of the prefix, or of all, stands in
        row = matrix[:, : 1 if model.cls_token is not None else prefix or None].mean(1)
        seen.append((x[0], row.softmax(-1).mean(0)))
    return seen


def most_alike(patches):
    """The cosine of each patch's embedding and that of the other patch that is most like it."""
    return torch.tensor([
        [max((float(torch.cosine_similarity(one, other, dim=0))
              for j, other in enumerate(patches) if j != i), default=-1.0)]
        for i, one in enumerate(patches)
    ]).reshape(-1, 1)  # fmt: skip


def test_fields_hold_what_they_say(views, model):
    prefix, patches = model.num_prefix_tokens, model.patch_embed.num_patches
    for view in views:
        places = view.alive.nonzero()
        assert torch.equal(view.image, places[:, 0])
        assert torch.equal(view.patch, places[:, 1])
        assert torch.equal(view.count, view.alive.sum(1))
        for i, (x, attention) in enumerate(by_hand(model, view)):
            mine = view.image == i
            living = int(view.alive[i].sum())
            # the class token; without one the mean of the prefix, or of the patches
            stands_in = x[:1] if model.cls_token is not None else x[: prefix or None]
            expected = {
                "token": x[prefix:],
                "cls": stands_in.mean(0).expand(living, -1),
                "stage": torch.eye(2)[view.stage].expand(living, -1),
                "position": patch_positions(view.backbone)[view.alive[i]],
                "cls_attention": attention[prefix:, None] * patches,
                "redundancy": most_alike(x[prefix:]),
                "alive_fraction": torch.full((living, 1), living / patches),
                "alpha": ALPHA[i].clamp(min=1e-3).log().expand(living, 1),
            }
            for name, values in expected.items():
                seen = view.field(name)
                assert seen.dtype == torch.float32
                assert seen.shape[1] == field_size(view.backbone, name)
                torch.testing.assert_close(seen[mine], values, rtol=1e-4, atol=1e-5, msg=name)
            mean = x[prefix:].mean(0) if living else torch.zeros(x.shape[1])
            state = [stands_in.mean(0), mean, torch.eye(2)[view.stage], torch.tensor([living / 16])]
            torch.testing.assert_close(view.state()[i], torch.cat(state), rtol=1e-4, atol=1e-5)
        assert view.state().shape == (BATCH, state_size(view.backbone))


def test_attention_is_an_even_share_before_the_first_block(vit):
    backbone = StagedViT(vit, (0, 1))
    view = View(backbone, backbone.begin(draw_images()), 0, ALPHA)
    assert torch.equal(view.cls_attention, torch.ones(BATCH * 16))


def test_positions():
    """Row and column from -1 to 1, and their waves at one and two half turns."""

    class Grid:
        grid_size = (2, 3)

    positions = patch_positions(Grid)
    rows, columns = [-1, -1, -1, 1, 1, 1], [-1, 0, 1, -1, 0, 1]
    assert positions.shape == (6, 10)
    assert positions[:, 0].tolist() == rows
    assert positions[:, 1].tolist() == columns
    for column, values in ((0, rows), (1, columns)):
        waves = [f(math.pi * k * v) for v in values for k in (1, 2) for f in (math.sin, math.cos)]
        assert positions[:, 2 + column :: 2].flatten().tolist() == pytest.approx(waves, abs=1e-6)
    assert len(positions.unique(dim=0)) == 6


# --- together ---


@pytest.mark.parametrize("fields", [DEFAULT_FIELDS, FIELDS, FIELDS[::-1], ("alpha",)])
def test_fields_stand_where_the_slices_say(views, fields):
    slices = field_slices(views[0].backbone, fields)
    assert list(slices) == list(fields)
    for view in views:
        living = view.living(fields)
        assert living.dtype == torch.float32
        for name in fields:
            assert torch.equal(living[:, slices[name]], view.field(name))
        assert living.shape[1] == max(part.stop for part in slices.values())


def test_scatter_puts_the_living_at_their_places(views):
    for view in views:
        living = view.living(DEFAULT_FIELDS)
        dense = view.scatter(living)
        assert dense.shape == (*view.alive.shape, living.shape[1])
        assert torch.equal(dense[view.alive], living)
        assert not dense[~view.alive].any()
        flags = view.scatter(torch.ones(len(living), dtype=torch.bool))
        assert torch.equal(flags, view.alive)


def test_packed_and_masked_show_the_same(model, keeps):
    with torch.no_grad():
        seen = []
        for execution in ("packed", "masked"):
            backbone = StagedViT(model, (0, 2, 3), execution)
            tokens = backbone.begin(draw_images())
            seen.append([])
            for stage, keep in enumerate(keeps(BATCH, 3, backbone.num_patches)):
                view = View(backbone, tokens, stage, ALPHA)
                seen[-1] += [view.scatter(view.living(FIELDS)), view.state()]
                tokens = backbone.advance(tokens, keep, stage)
    for ours, reference in zip(*seen, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


# --- episodes that begin alike ---


@pytest.mark.parametrize("fields", [DEFAULT_FIELDS, FIELDS])
def test_distinct_holds_what_is_seen_once(vit, keeps, fields):
    """Before the first stage rollouts of one image see the same, under one price."""
    backbone = StagedViT(vit, STAGES)
    game = TokenGame(backbone, rollouts_per_image=3)
    alpha = torch.linspace(0, 1, BATCH)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    stage = game.reset(draw_images(), labels, alpha)
    for keep in keeps(3 * BATCH, 2, 16):
        observations, seen = stage.view.distinct(fields)
        living = stage.view.living(fields)
        torch.testing.assert_close(observations[seen], living, rtol=0, atol=1e-6)
        assert len(observations) == (len(living) if stage.index else BATCH * 16)
        states, state_of = stage.view.distinct_states()
        assert state_of.shape == observations.shape[:1]
        own_state = stage.view.state()[stage.view.image]
        torch.testing.assert_close(states[state_of][seen], own_state, rtol=0, atol=1e-6)
        assert len(states) == (3 * BATCH if stage.index else BATCH)
        stage = game.step(keep)


def test_the_same_patches_under_another_price(views):
    for view in views:
        dear = view.at_alpha(0.5)
        for name in FIELDS:
            same = torch.equal(dear.field(name), view.field(name))
            assert same == (name != "alpha")
        assert torch.equal(dear.field("alpha"), torch.full((len(view.image), 1), 0.5).log())


def test_distinct_is_living_where_every_episode_has_its_image(views):
    for view in views:
        observations, seen = view.distinct(DEFAULT_FIELDS)
        assert torch.equal(observations[seen], view.living(DEFAULT_FIELDS))


# --- what is refused ---


@pytest.mark.parametrize("fields", [("token", "colour"), ("token", "cls", "token"), ()])
def test_unknown_repeated_or_no_fields_are_refused(staged, fields):
    with pytest.raises(ValueError, match=r"one or more of token, cls, .*alpha, each once"):
        field_slices(staged, fields)


def test_an_unknown_field_is_refused(views):
    with pytest.raises(ValueError, match=r"'colour'.*token, cls"):
        views[0].field("colour")
