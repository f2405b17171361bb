"""Every timm model that claims support, shrunk, against timm's own forward pass; and rotary models
in detail.
"""

import re
import sys
from copy import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import AttentionRope
from timm.models import model_entrypoint
from timm.models.eva import EvaAttention
from torch.utils.flop_counter import FlopCounterMode

from prunevit.envs.vit.attention import MANY_IMAGES
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import SUPPORTED, UnsupportedBackboneError

EXECUTIONS = ("packed", "masked")
STAGES = (1, 3)
BATCH = 6
MANY = 2 * MANY_IMAGES  # of one length often enough to attend by batched products
FAMILIES = {
    "eva": ("eva_giant_patch14_224", {}),
    "eva-clip": ("eva_giant_patch14_clip_224", {}),
    "eva-post-norm": ("eva02_enormous_patch14_clip_224", {}),
    "eva02": ("eva02_base_patch14_224", {}),
    "eva02-fused": ("eva02_tiny_patch14_224", {}),
    "eva02-clip": ("eva02_base_patch16_clip_224", {}),
    "dinov3": ("vit_base_patch16_dinov3", {}),
    "dinov3-bias": ("vit_base_patch16_dinov3_qkvb", {}),
    "pe-core": ("vit_pe_core_base_patch16_224", {}),
    "pe-spatial": ("vit_pe_spatial_base_patch16_512", {}),
    "rope": ("vit_small_patch16_rope_224", {}),
    "rope-ape": ("vit_small_patch16_rope_ape_224", {}),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "rope-mixed-ape": ("vit_small_patch16_rope_mixed_ape_224", {}),
    "rope-mixed-dynamic": ("vit_small_patch16_rope_mixed_224", {"dynamic_img_size": True}),
    "rope-registers": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "mrope": ("eva02_tiny_patch14_224", {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)}),
    "grouped-queries": ("vit_base_patch16_sapiens2", {"num_kv_heads": (1, 2, 1, 2)}),
    "qk-norm": ("vit_small_patch16_rope_224", {"qk_norm": True, "qkv_fused": False}),
    "inner-norms": ("eva02_tiny_patch14_224", {"scale_attn_inner": True, "scale_mlp": True}),
    "scale": ("eva02_tiny_patch14_224", {"init_values": 0.5, "attn_only_layer_scale": True}),
    "gated": ("vit_small_patch16_rope_224", {"attention": {"cls": AttentionRope, "gated": True}}),
    "bias-apart": (
        "eva_giant_patch14_224",
        {"attention": {"cls": EvaAttention, "qkv_bias_separate": True, "scale_norm": False}},
    ),
    "no-positions": ("eva_giant_patch14_224", {"use_abs_pos_emb": False}),
    "no-class": ("eva02_tiny_patch14_224", {"class_token": False}),
    "max": ("eva02_tiny_patch14_224", {"global_pool": "max"}),
    "avgmax": ("eva02_tiny_patch14_224", {"global_pool": "avgmax"}),
    "map-no-class": ("eva02_tiny_patch14_224", {"global_pool": "map", "class_token": False}),
    "oblong": ("vit_base_patch16_dinov3", {"img_size": (16, 48)}),
    "oblong-mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": (48, 16)}),
    "post-norm": ("vit_base_patch16_rpn_224", {}),
}
# what older versions of timm don't have
SINCE = {
    "1.0.28": ("gated",),
    "1.0.30": ("grouped-queries", "qk-norm", "scale"),
    "1.0.31": ("mrope",),
}
each_model = pytest.mark.parametrize("family", FAMILIES)
each_execution = pytest.mark.parametrize("execution", EXECUTIONS)


def draw_images(staged, count=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *staged.image_shape, generator=generator)


def play(staged, images, keep):
    """Runs the whole model; returns the tokens of every stage, [-1] those at the end."""
    passed = [staged.begin(images)]
    for stage, decision in enumerate(keep):
        passed.append(staged.advance(passed[-1], decision, stage))
    return passed


def even_keep(batch, stages, agents, seed=5):
    """Of every image as many survive, in other places: bool [T, B, N]."""
    order = torch.rand(batch, agents, generator=torch.Generator().manual_seed(seed)).argsort(1)
    left = [agents * 3 // 4 - 4 * stage for stage in range(stages)]
    return torch.stack([order < count for count in left])


def attention_by_slot(tokens):
    """[B, L], zeros where not alive."""
    paid = tokens.x.new_zeros(tokens.alive.numel())
    living = tokens.alive.flatten()
    paid[living] = tokens.attention[tokens.row[living]]
    return paid.view(tokens.alive.shape)


def run_block(block, x, turn):
    """timm's block, and its matrix of attention [heads, L, L] as timm computes it unfused."""
    seen = []
    handle = block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    fused, block.attn.fused_attn = block.attn.fused_attn, False
    try:
        x = block(x) if turn is None else block(x, rope=turn)
    finally:
        block.attn.fused_attn = fused
        handle.remove()
    return x, seen[0][0]


@torch.no_grad()
def by_hand(model, image, keep, keeps_last):
    """One image through timm's own modules, on the tokens that survive; keep [T, N].

    Returns:
        logits [classes]; of each stage the attention observed there, by slot, [T, L]; and who
        survived, [T, N].
    """
    x = model._pos_embed(model.patch_embed(image[None]))
    x, turns = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)
    prefix, slots = model.num_prefix_tokens, x.shape[1]
    alive = torch.ones(slots, dtype=torch.bool)
    observed, survivors = [], []
    for i, block in enumerate(model.blocks):
        if i in STAGES:
            wanted = alive.clone()
            wanted[prefix:] &= keep[len(survivors)]
            if keeps_last and not wanted[prefix:].any():
                wanted[prefix + int(alive[prefix:].nonzero()[0])] = True
            x, alive = x[:, wanted[alive]], wanted
            survivors.append(alive[prefix:])
        turn = turns
        if turns is not None:
            turn = (turns[i] if turns.dim() == 4 else turns)[..., alive[prefix:], :]
        x, matrix = run_block(block, x, turn)
        if i + 1 in STAGES:
            row = torch.zeros(slots)
            row[alive] = matrix.mean(0)[0]
            observed.append(row)
    return model.forward_head(model.norm(x))[0], torch.stack(observed), torch.stack(survivors)


# --- rotary models and others with a form of their own ---


@each_model
@each_execution
@torch.no_grad()
def test_nothing_pruned_equals_timm(build, family, execution):
    model = build(family)
    staged = StagedViT(model, STAGES, execution)
    images = draw_images(staged)
    keep_all = torch.ones(len(STAGES), BATCH, staged.num_patches, dtype=torch.bool)
    end = play(staged, images, keep_all)[-1]
    torch.testing.assert_close(staged.finish(end), model(images), rtol=0, atol=1e-5)


@each_model
@pytest.mark.parametrize("pattern", ["random", "even"])
@torch.no_grad()
def test_pruned_equals_tokens_taken_out_by_hand(build, keeps, family, pattern):
    model = build(family)
    executions = [StagedViT(model, STAGES, execution) for execution in EXECUTIONS]
    images = draw_images(executions[0])
    draw = keeps if pattern == "random" else even_keep
    keep = draw(BATCH, len(STAGES), executions[0].num_patches)
    keeps_last = executions[0].keeps_last_patch
    by_image = [by_hand(model, image, keep[:, i], keeps_last) for i, image in enumerate(images)]
    for staged in executions:
        passed = play(staged, images, keep)
        logits = staged.finish(passed[-1])
        for i, (expected, attention, survivors) in enumerate(by_image):
            torch.testing.assert_close(logits[i], expected, rtol=0, atol=1e-4)
            for stage, tokens in enumerate(passed[:-1]):
                if staged.has_class_token:
                    torch.testing.assert_close(
                        attention_by_slot(tokens)[i], attention[stage], rtol=0, atol=1e-5
                    )
                alive = passed[stage + 1].alive[i, staged.num_prefix :]
                assert torch.equal(alive, survivors[stage])


@pytest.mark.parametrize(
    ("family", "pattern", "batch"),
    [
        *((family, pattern, BATCH) for family in FAMILIES for pattern in ("random", "even")),
        *(
            (family, pattern, batch)
            for family in ("eva02", "no-class", "rope-mixed", "grouped-queries")
            for pattern, batch in (("none", BATCH), ("all", BATCH), ("random", 1), ("random", 0))
        ),
    ],
)
@torch.no_grad()
def test_packed_equals_masked(build, keeps, family, pattern, batch):
    model = build(family)
    staged = [StagedViT(model, STAGES, execution) for execution in EXECUTIONS]
    draw = even_keep if pattern == "even" else keeps
    keep = draw(batch, len(STAGES), staged[0].num_patches)
    if pattern in ("none", "all"):
        keep[:] = pattern == "none"
    images = draw_images(staged[0], batch)
    runs = [play(one, images, keep) for one in staged]
    for ours, reference in zip(*runs, strict=True):
        assert torch.equal(ours.alive, reference.alive)
        assert torch.equal(staged[0].spent_macs(ours), staged[1].spent_macs(reference))
        if reference.attention is not None:
            torch.testing.assert_close(
                attention_by_slot(ours), attention_by_slot(reference), rtol=0, atol=1e-5
            )
    logits = [one.finish(run[-1]) for one, run in zip(staged, runs, strict=True)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@each_model
@each_execution
@torch.no_grad()
def test_repeated_tokens_are_those_of_repeated_images(build, keeps, family, execution):
    staged = StagedViT(build(family), STAGES, execution)
    images = draw_images(staged, 2)
    repeated = staged.begin(images).repeat(3)
    expected = staged.begin(images.repeat_interleave(3, dim=0))
    keep = keeps(6, 2, staged.num_patches)
    for stage in range(2):
        repeated, expected = (
            staged.advance(tokens, keep[stage], stage) for tokens in (repeated, expected)
        )
    torch.testing.assert_close(staged.finish(repeated), staged.finish(expected), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["eva02", "dinov3", "rope-mixed"])
def test_positions_that_stay_behind_would_be_seen(build, family):
    """Or the comparisons above would not see that rotations follow nobody."""
    model = build(family)
    staged = StagedViT(model, STAGES)
    keep = even_keep(BATCH, len(STAGES), staged.num_patches)
    images = draw_images(staged)
    right = play(staged, images, keep)[-1]
    wrong = staged.begin(images)
    for stage, decision in enumerate(keep):
        wrong = staged.prune(wrong, decision)
        slot = wrong.rotary.slot
        shifted = slot.where(slot < staged.num_prefix, slot.roll(1).clamp(min=staged.num_prefix))
        object.__setattr__(wrong, "rotary", wrong.rotary.take(shifted))
        start, stop = staged.edges[stage : stage + 2]
        wrong = staged._run(partial(copy, wrong), start, stop, False, None)
    assert (staged.finish(wrong) - staged.finish(right)).abs().max() > 1e-3


def counted(run):
    # without a graph the counter fails in attention pooling
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@each_model
def test_macs_are_those_of_the_flop_counter(build, keeps, family):
    """The counter sees products of matrices; the observed row is made of products of elements."""
    model = build(family)
    staged = StagedViT(model, STAGES)
    images = draw_images(staged, 2)
    assert staged.dense_macs == counted(lambda: model(images[:1]))
    keep = keeps(2, len(STAGES), staged.num_patches)
    attn = model.blocks[0].attn
    for i, image in enumerate(images):
        passed = []

        def run(image=image, keep=keep[:, i : i + 1], passed=passed):
            passed.extend(play(staged, image[None], keep))
            staged.finish(passed[-1])

        spent = counted(run)
        seen = sum(int(tokens.alive.sum()) for tokens in passed if tokens.attention is not None)
        expected = spent + seen * attn.num_heads * attn.head_dim
        assert staged.total_macs(passed[-1]).tolist() == [expected]


@pytest.mark.parametrize("family", ["eva02", "rope-mixed", "pe-core"])
def test_gradients_reach_every_parameter_in_masked_execution(make_vit, keeps, family):
    name, kwargs = FAMILIES[family]
    model = make_vit(name, **kwargs)
    staged = StagedViT(model, STAGES, "masked")
    end = play(staged, draw_images(staged), keeps(BATCH, 2, staged.num_patches))[-1]
    staged.finish(end).square().sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in model.parameters())


@each_model
def test_gradients_are_the_same_packed_and_masked(build, keeps, family):
    model = build(family)
    found = []
    for execution in EXECUTIONS:
        staged = StagedViT(model, STAGES, execution)
        images = draw_images(staged, MANY).requires_grad_()
        keep = keeps(MANY, len(STAGES), staged.num_patches)
        logits = staged.finish(play(staged, images, keep)[-1])
        loss = (logits.log_softmax(1)[:, 0] + logits.square().mean(1)).mean()
        found.append(torch.autograd.grad(loss, [images, *model.parameters()], allow_unused=True))
    names = ["images", *dict(model.named_parameters())]
    for name, ours, reference in zip(names, *found, strict=True):
        if reference is None:
            assert ours is None, name
        else:
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4, msg=name)


# --- images of another size ---


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_dinov3"])
@pytest.mark.parametrize("dynamic", [True, False])
@torch.no_grad()
def test_images_of_another_size_are_refused_until_the_model_is_told(make_vit, keeps, name, dynamic):
    model = make_vit(name, dynamic_img_size=dynamic)
    images = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"\[3, 48, 64\].*\[3, 32, 32\].*set_input_size"):
        StagedViT(model, STAGES).begin(images)
    model.set_input_size((48, 64))
    staged = StagedViT(model, STAGES)
    assert staged.grid_size == (6, 8)
    keep_all = torch.ones(len(STAGES), 2, staged.num_patches, dtype=torch.bool)
    logits = staged.finish(play(staged, images, keep_all)[-1])
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_patch_dropout_is_refused_in_training(make_vit, name):
    model = make_vit(name, patch_drop_rate=0.5).train()
    staged = StagedViT(model, STAGES, "masked")
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        staged.begin(draw_images(staged, 2))
    model.eval()
    assert staged.begin(draw_images(staged, 2)).alive.all()


# --- all of timm's names ---


def claimed_names():
    """timm's names whose entrypoints stand beside a class that we support."""
    classes = {cls for ops in SUPPORTED for cls in ops.models}
    return [
        name
        for name in timm.list_models()
        if any(value in classes for value in _namespace(name) if isinstance(value, type))
    ]


def _namespace(name):
    return vars(sys.modules[model_entrypoint(name).__module__]).values()


# what shrinks whom: most, grouped queries, stems that are convolutional networks, and ViTamin,
# whose stem sets the width
SMALLER = (
    {},
    {"num_kv_heads": 1},
    {"patch_size": 1, "img_size": 128},
    {"patch_size": 1, "img_size": 64, "embed_dim": None},
)
NAMES_STAGES = (1, 2)
FOREIGN_BLOCKS = (
    "block 0 is a (ParallelThings|ParallelScaling|DiffParallelScaling)Block"
    "|attention of block 0 is a DiffAttention"
)


def shrink(name, make_vit):
    for kwargs in SMALLER:
        if "embed_dim" in kwargs:
            with torch.device("meta"):
                kwargs = kwargs | {"embed_dim": timm.create_model(name, depth=1).embed_dim}
        try:
            return make_vit(name, **({"depth": 3} | kwargs))
        except (AssertionError, TypeError):
            continue  # timm's words for arguments that don't go together
    raise AssertionError(f"{name} could not be shrunk")


def architecture(model):
    """What two models that run alike have in common: modules, settings and shapes."""
    settings = [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | tuple)
    ]
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return repr((model, settings, shapes))


@pytest.fixture(scope="module")
def seen():
    """Name of the model that was checked, by its architecture."""
    return {}


@pytest.mark.stress
@pytest.mark.parametrize("name", claimed_names())
@torch.no_grad()
def test_every_name_of_timm_equals_timm_or_is_refused(make_vit, keeps, seen, name):
    model = shrink(name, make_vit)
    same = architecture(model)
    if same in seen:
        return
    seen[same] = name
    try:
        staged = [StagedViT(model, NAMES_STAGES, execution) for execution in EXECUTIONS]
    except UnsupportedBackboneError as error:
        if re.search(FOREIGN_BLOCKS, str(error)):
            return
        raise
    images = draw_images(staged[0], 3)
    dense = model(images)
    assert dense.std() > 1e-2
    agents = staged[0].num_patches
    for keep in (
        torch.ones(2, 3, agents, dtype=torch.bool),
        keeps(3, 2, agents),
        even_keep(3, 2, agents),
    ):
        packed, masked = (one.finish(play(one, images, keep)[-1]) for one in staged)
        torch.testing.assert_close(packed, masked, rtol=0, atol=1e-4)
        if keep.all():
            torch.testing.assert_close(packed, dense, rtol=0, atol=1e-5)
            torch.testing.assert_close(masked, dense, rtol=0, atol=1e-5)
        else:
            assert (packed - dense).abs().max() > 1e-3
    assert staged[0].dense_macs == counted(lambda: model(images[:1]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("beitv2_base_patch16_224", "a bias for each pair of places"),
        ("vit_relpos_small_patch16_224", "a bias for each pair of places"),
        ("swinv2_tiny_window8_256", "not that of timm's VisionTransformer or Eva"),
        ("naflexvit_base_patch16_gap", "not that of timm's VisionTransformer or Eva"),
        ("samvit_base_patch16", "a bias for each pair of places"),
        ("hiera_tiny_224", "not that of timm's VisionTransformer or Eva"),
        ("cait_xxs24_224", "not that of timm's VisionTransformer or Eva"),
    ],
)
def test_names_of_other_classes_are_refused(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    with pytest.raises(UnsupportedBackboneError, match=reason):
        StagedViT(model)
