"""Stages between the attention of a block and its MLP.

An MLP looks at each token alone. So who is pruned before the MLP of a block leaves the others as if
it were pruned before the next block, which the runtime is held against here.
"""

import pytest
import torch
from timm.layers import AttentionRope
from timm.models.vision_transformer import ResPostBlock
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from prunevit.envs.vit import execution as runtime
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

EXECUTIONS = ("packed", "masked")
INSIDE, BETWEEN = (0, 2), (1, 3)
BATCH = 6
FAMILIES = {
    "deit": ("deit_tiny_patch16_224", {}),
    "layer-scale": ("deit3_small_patch16_224", {}),
    "swiglu": ("vit_giant_patch14_reg4_dinov2", {}),
    "post-norm": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock}),
    "map-no-class": ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
    "avg": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "eva02": ("eva02_base_patch14_224", {"init_values": 0.5}),
    "eva-post-norm": ("eva02_enormous_patch14_clip_224", {}),
    "dinov3": ("vit_base_patch16_dinov3", {}),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "rope-attention": ("vit_small_patch16_rope_224", {"attention": {"cls": AttentionRope}}),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_execution = pytest.mark.parametrize("execution", EXECUTIONS)


def inside(model, stages=INSIDE, execution="packed", **options):
    return StagedViT(model, stages, execution, prune_at="mlp", **options)


def draw_images(staged, count=BATCH):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *staged.image_shape, generator=generator)


def play(staged, images, keep, with_attention=True):
    """The tokens of every stage, [-1] those at the end."""
    passed = [staged.begin(images, with_attention)]
    for stage, decision in enumerate(keep):
        passed.append(staged.advance(passed[-1], decision, stage, with_attention))
    return passed


def by_slot(tokens, values):
    """Values of rows [S, ...] by slot, [B, L, ...], zeros where not alive."""
    living = tokens.alive.flatten()
    dense = values.new_zeros(len(living), *values.shape[1:])
    dense[living] = values[tokens.row[living]]
    return dense.unflatten(0, tokens.alive.shape)


def everyone(staged, count=BATCH):
    return torch.ones(staged.num_stages, count, staged.num_patches, dtype=torch.bool)


# --- what runs ---


@each_family
@each_execution
@torch.no_grad()
def test_nothing_pruned_equals_timm(build, family, execution):
    model = build(family)
    staged = inside(model, (0, 1, 3), execution)
    images = draw_images(staged)
    end = play(staged, images, everyone(staged))[-1]
    torch.testing.assert_close(staged.finish(end), model(images), rtol=0, atol=1e-5)


@each_family
@torch.no_grad()
def test_survivors_are_those_of_pruning_before_the_next_block(build, keeps, family):
    model = build(family)
    between = StagedViT(model, BETWEEN, "masked")
    images, keep = draw_images(between), keeps(BATCH, 2, between.num_patches)
    expected = play(between, images, keep)
    for execution in EXECUTIONS:
        staged = inside(model, INSIDE, execution)
        passed = play(staged, images, keep)
        for ours, theirs in zip(passed, expected, strict=True):
            assert torch.equal(ours.alive, theirs.alive)
            if theirs.attention is not None:
                paid = [by_slot(tokens, tokens.attention) for tokens in (ours, theirs)]
                torch.testing.assert_close(*paid, rtol=0, atol=1e-5)
        assert passed[-1].attention is None
        logits = [staged.finish(passed[-1]), between.finish(expected[-1])]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pattern", ["random", "none", "all", "empty-then-full", "full-then-empty"])
@pytest.mark.parametrize("batch", [BATCH, 1, 0])
@pytest.mark.parametrize("family", ["deit", "avg", "dinov3"])
@torch.no_grad()
def test_packed_equals_masked(build, family, pattern, batch):
    packed, masked = (inside(build(family), (0, 1, 3), execution) for execution in EXECUTIONS)
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(3, batch, packed.num_patches, generator=generator) < 0.6
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
        seen = [by_slot(tokens, tokens.x) for tokens in (ours, reference)]
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    logits = [staged.finish(run[-1]) for staged, run in zip((packed, masked), runs, strict=True)]
    assert logits[0].shape == (batch, packed.num_classes)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@each_family
@torch.no_grad()
def test_patches_can_merge_inside_of_blocks(build, keeps, family):
    packed, masked = (
        inside(build(family), INSIDE, execution, on_prune="merge") for execution in EXECUTIONS
    )
    images, keep = draw_images(packed), keeps(BATCH, 2, packed.num_patches)
    ours, reference = (play(staged, images, keep)[-1] for staged in (packed, masked))
    logits = packed.finish(ours), masked.finish(reference)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert torch.equal(packed.total_macs(ours), masked.total_macs(reference))
    dropped = inside(build(family))
    end = play(dropped, images, keep)[-1]
    assert (dropped.finish(end) - logits[0]).abs().max() > 1e-3
    assert (packed.total_macs(ours) > dropped.total_macs(end)).any()


@each_family
@each_execution
@torch.no_grad()
def test_decisions_see_the_block_after_its_attention(build, family, execution):
    """What comes in at the MLP, or at the norm before it, and what the class token paid there."""
    model = build(family)
    staged = inside(model, (2,), execution)
    images, block = draw_images(staged), model.blocks[2]
    is_post_norm = "post-norm" in family
    seen = []
    first = block.mlp if is_post_norm else block.norm2
    handle = first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(images)
    handle.remove()
    tokens = staged.begin(images)
    torch.testing.assert_close(by_slot(tokens, tokens.x), seen[0], rtol=0, atol=1e-5)
    paid = by_slot(tokens, tokens.attention)
    torch.testing.assert_close(paid.sum(1), torch.ones(BATCH))
    assert staged.begin(images, with_attention=False).attention is None


@torch.no_grad()
def test_the_last_block_can_be_pruned_inside(build, keeps):
    model = build("deit")
    staged = inside(model, (3,))
    images, keep = draw_images(staged), keeps(BATCH, 1, staged.num_patches)
    # the class token is on its own there
    end = play(staged, images, keep)[-1]
    torch.testing.assert_close(staged.finish(end), model(images), rtol=0, atol=1e-5)
    assert torch.equal(end.alive[:, 1:], keep[0])


@each_family
def test_gradients_are_the_same_packed_and_masked(build, keeps, family):
    model = build(family)
    runs = []
    for execution in EXECUTIONS:
        staged = inside(model, INSIDE, execution)
        images = draw_images(staged).requires_grad_()
        logits = staged.finish(play(staged, images, keeps(BATCH, 2, staged.num_patches))[-1])
        loss = (logits.log_softmax(1)[:, 0] + logits.square().mean(1)).mean()
        runs.append(torch.autograd.grad(loss, [images, *model.parameters()]))
    names = ["images", *dict(model.named_parameters())]
    for name, ours, reference in zip(names, *runs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4, msg=name)
        assert name.endswith("k_norm.bias") or ours.norm() > 0, name


def test_gradients_are_the_same_with_checkpointing(make_vit, keeps):
    model = make_vit()
    staged = inside(model)
    images, keep = draw_images(staged), keeps(BATCH, 2, staged.num_patches)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        loss = staged.finish(play(staged, images, keep)[-1]).square().sum()
        gradients.append(torch.autograd.grad(loss, [model.blocks[0].mlp.fc1.weight]))
    torch.testing.assert_close(*gradients)


def test_what_is_dropped_in_training_is_what_timm_drops(make_vit):
    """Stochastic depth acts on both sublayers; the same seed draws the same."""
    for name in ("vit_tiny_patch16_224", "eva02_base_patch14_224"):
        model = make_vit(name, drop_path_rate=0.5, proj_drop_rate=0.2).train()
        staged = inside(model, (1, 3), "masked")
        images = draw_images(staged)
        torch.manual_seed(0)
        expected = model(images)
        torch.manual_seed(0)
        logits = staged.finish(play(staged, images, everyone(staged), with_attention=False)[-1])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert (expected - model.eval()(images)).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("family", ["deit", "dinov3"])
def test_chunks_give_what_all_images_at_once_give(build, keeps, family, monkeypatch):
    staged = inside(build(family))
    images, keep = draw_images(staged), keeps(BATCH, 2, staged.num_patches)
    whole = play(staged, images, keep)
    calls = []
    block = runtime.eager_block
    monkeypatch.setattr(runtime, "eager_block", lambda *args: calls.append(1) or block(*args))
    monkeypatch.setattr(runtime, "CHUNK_BYTES", 2 * staged.num_slots * staged.width * 4)
    parts = play(staged, images, keep)
    assert len(calls) > 4  # sublayers that run alone
    for ours, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours.x, expected.x)
        if expected.attention is not None:
            torch.testing.assert_close(ours.attention, expected.attention)
        assert torch.equal(staged.spent_macs(ours), staged.spent_macs(expected))


@torch.no_grad()
def test_repeated_and_restored_tokens_are_those_of_their_images(build, keeps):
    staged = inside(build("dinov3"))
    images = draw_images(staged, 2)
    begun = staged.begin(images)
    received = begun.attention.unflatten(0, (2, -1))
    again = staged.restore(begun.x.unflatten(0, (2, -1)), received, begun.rotary)
    expected = staged.begin(images.repeat_interleave(3, dim=0))
    keep = keeps(6, 2, staged.num_patches)
    for tokens in (begun.repeat(3), again.repeat(3)):
        then = expected
        for stage in range(2):
            assert torch.equal(staged.spent_macs(tokens), staged.spent_macs(then))
            tokens, then = (staged.advance(each, keep[stage], stage) for each in (tokens, then))
        logits = staged.finish(tokens), staged.finish(then)
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


# --- what it costs ---


@each_family
def test_macs_are_those_of_the_flop_counter(build, keeps, family):
    """The counter sees products of matrices; the observed row is made of products of elements."""
    staged = inside(build(family))
    attn = staged.model.blocks[0].attn
    keep = keeps(2, 2, staged.num_patches)
    for i, image in enumerate(draw_images(staged, 2)):
        # without a graph the counter fails in attention pooling
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            passed = play(staged, image[None], keep[:, i : i + 1])
            staged.finish(passed[-1])
        seen = sum(int(tokens.alive.sum()) for tokens in passed if tokens.attention is not None)
        expected = counter.get_total_flops() // 2 + seen * attn.num_heads * attn.head_dim
        assert staged.total_macs(passed[-1]).tolist() == [expected]


@each_family
@pytest.mark.parametrize("with_attention", [True, False])
@torch.no_grad()
def test_uniform_macs_are_those_of_images_that_keep_so_many(build, family, with_attention):
    staged = inside(build(family), (0, 1, 3))
    for kept in ((12, 7, 7), (staged.num_patches,) * 3, (3, 2, 0)):
        keep = torch.zeros(3, 2, staged.num_patches, dtype=torch.bool)
        for stage, count in enumerate(kept):
            keep[stage, :, :count] = True
        end = play(staged, draw_images(staged, 2), keep, with_attention)[-1]
        expected = staged.uniform_macs(kept, with_attention)
        assert staged.total_macs(end).tolist() == [expected, expected]


def test_the_mlp_of_the_pruned_is_what_is_saved(build):
    model = build("deit")
    staged, between = inside(model), StagedViT(model, BETWEEN)
    kept = (11, 4)
    mlp = 2 * 4 * staged.width**2
    spared = (16 - 11) * mlp + (11 - 4) * mlp
    assert between.uniform_macs(kept) - staged.uniform_macs(kept) == spared
    count = torch.tensor([11, 4])
    segments = staged.segment_macs(count[0], 0) + staged.segment_macs(count[1], 1)
    head = staged.width * staged.num_classes
    stem = 3 * 8 * 8 * staged.width * 16
    first = 17 * 4 * staged.width**2 + 2 * 17**2 * staged.width
    total = staged.uniform_macs(kept, with_attention=False)
    assert total == stem + first + int(segments) + head


def test_sublayers_of_blocks_with_products_of_their_own_are_counted(make_vit):
    """Weights that are no linear layer's: in the MLP of one block, in the attention of another."""

    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.weight = nn.Parameter(torch.randn(inner.in_features, inner.in_features))

        def forward(self, x):
            return self.inner(F.linear(x, self.weight))

    model = make_vit()
    model.blocks[0].mlp.fc1 = Scaled(model.blocks[0].mlp.fc1)
    model.blocks[2].attn.proj = Scaled(model.blocks[2].attn.proj)
    staged = inside(model)
    keep = everyone(staged, 1)
    keep[0, :, 9:] = keep[1, :, 5:] = False
    with FlopCounterMode(display=False) as counter:
        end = play(staged, draw_images(staged, 1), keep, with_attention=False)[-1]
        staged.finish(end)
    assert staged.total_macs(end).tolist() == [counter.get_total_flops() // 2]


# --- what is honoured, and what is refused ---


class Adapted(nn.Module):
    """LoRA by hand."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@each_execution
@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@torch.no_grad()
def test_replaced_layers_and_hooks_within_the_sublayers_act(make_vit, keeps, execution, path):
    model = make_vit()
    module, name = path.split(".")
    for block in (model.blocks[0], model.blocks[2]):
        parent = getattr(block, module)
        setattr(parent, name, Adapted(getattr(parent, name)))
    model.blocks[2].norm2.register_forward_hook(lambda _, __, out: 2 * out)
    staged, between = inside(model, INSIDE, execution), StagedViT(model, BETWEEN)
    images, keep = draw_images(staged), keeps(BATCH, 2, staged.num_patches)
    torch.testing.assert_close(
        staged.finish(play(staged, images, everyone(staged))[-1]), model(images), rtol=0, atol=1e-5
    )
    ours, expected = (play(each, images, keep) for each in (staged, between))
    for tokens, others in zip(ours[:-1], expected[:-1], strict=True):
        paid = [by_slot(each, each.attention) for each in (tokens, others)]
        torch.testing.assert_close(*paid, rtol=0, atol=1e-5)
    logits = staged.finish(ours[-1]), between.finish(expected[-1])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def hooked(block):
    block.register_forward_hook(lambda _, __, out: 2 * out)


def replaced(block):
    block.forward = lambda x, **_: x


CHANGES = [(hooked, "block 2 .* since it has hooks"), (replaced, "block 2 .* was replaced")]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_blocks_that_are_called_as_a_whole_are_refused(make_vit, change, reason):
    model = make_vit()
    staged = inside(model)
    change(model.blocks[2])
    with pytest.raises(UnsupportedBackboneError, match=reason):
        staged.begin(draw_images(staged))
    with pytest.raises(UnsupportedBackboneError, match=reason):
        inside(model)
    with torch.no_grad():
        other = inside(model, (0, 1))  # no stage is inside of that block
        end = play(other, draw_images(other), everyone(other))[-1]
        expected = model(draw_images(other))
    torch.testing.assert_close(other.finish(end), expected, rtol=0, atol=1e-5)


def test_a_forward_pass_that_was_replaced_for_all_blocks_is_refused(make_vit, monkeypatch):
    model = make_vit()
    monkeypatch.setattr(type(model.blocks[0]), "forward", lambda self, x, **_: x)
    with pytest.raises(UnsupportedBackboneError, match=r"block 0 .* was replaced"):
        inside(model)


def test_an_unknown_place_is_refused(vit):
    with pytest.raises(ValueError, match=r"prune_at 'attention'.*block, mlp"):
        StagedViT(vit, prune_at="attention")


def test_stages_are_where_they_are_said_to_be(vit):
    assert StagedViT(vit, (0, 2)).edges == (0, 4, 8)
    assert inside(vit, (0, 2)).edges == (1, 5, 8)
    assert StagedViT(vit, (0, 2)).whole_from == (0, 2)
    assert inside(vit, (0, 2)).whole_from == (1, 3)
    assert not StagedViT(vit, (0, 2)).has_attended(0)
    assert StagedViT(vit, (0, 2)).has_attended(1)
    assert inside(vit, (0, 2)).has_attended(0)
