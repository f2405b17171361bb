"""Whatever somebody puts into a backbone has the effect that it has in timm's own forward pass, or
the model is refused.
"""

import importlib
from copy import deepcopy
from types import MethodType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from prunevit.envs.game import TokenGame
from prunevit.envs.vit import onednn_linear
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError
from prunevit.envs.vit.untouched import is_untouched

STAGES = (1, 3)
BATCH, PATCHES = 4, 16
EXECUTIONS = ("packed", "masked")
# with a class token, pooled, post-normed, and rotary
MODELS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "init_values": 0.5}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "post-norm": ("vit_base_patch16_rpn_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "grouped": ("vit_base_patch16_sapiens2", {"num_kv_heads": (1, 2, 1, 2)}),
}


@pytest.fixture(autouse=True)
def _onednn_is_worth_it(monkeypatch):
    monkeypatch.setattr(onednn_linear, "MIN_MACS", 0)


def draw_images(batch=BATCH, seed=1):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def play(staged, images, keep, with_attention=True):
    """All tokens on the way, and the logits."""
    passed = [staged.begin(images, with_attention)]
    for stage in range(staged.num_stages):
        passed.append(staged.advance(passed[-1], keep[stage], stage, with_attention))
    return passed, staged.finish(passed[-1])


def by_timm(model, image, keep):
    """Logits of one image through timm's own blocks, in the eager way, on what ``keep`` leaves."""
    x = model._pos_embed(model.patch_embed(image[None]))
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)
    prefix = model.num_prefix_tokens
    alive = torch.ones(PATCHES, dtype=torch.bool)
    for i, block in enumerate(model.blocks):
        if i in STAGES:
            wanted = alive & keep[STAGES.index(i)]
            if not prefix and not wanted.any():
                wanted[alive.nonzero()[0]] = True
            whole = torch.ones(prefix, dtype=torch.bool)
            x = x[:, torch.cat([whole, wanted[alive]])]
            alive = wanted
        x = block(x) if rope is None else block(x, rope=rope[..., alive, :])
    return model.forward_head(model.norm(x))[0]


# --- what people put into models; each takes a model and changes it ---


def low_rank(layer, up):
    """LoRA by hand: the layer's own forward, and something on top."""
    old = layer.forward
    layer.forward = lambda x: old(x) + (x @ up) @ up.T[:, : layer.out_features]


def replace_forward(name):
    def change(model):
        layer = model.blocks[1].get_submodule(name)
        old = layer.forward
        layer.forward = lambda *args, **kwargs: 1.5 * old(*args, **kwargs)

    return change


def hook(name):
    """A forward hook that adds an image's first token to its others."""

    def add(module, given, out):
        assert out.dim() == 3, "a hook sees images, not rows"
        return torch.cat([out[:, :1], out[:, 1:] + out[:, :1]], dim=1)

    def change(model):
        model.blocks[2].get_submodule(name).register_forward_hook(add)

    return change


def pre_hook(model):
    model.blocks[2].register_forward_pre_hook(lambda module, given: (1.1 * given[0], *given[1:]))


def class_replaced(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for block in model.blocks:
        block.mlp.fc2.__class__ = Doubled


class Mixer(nn.Module):
    """An adapter that looks at all tokens of an image, after the attention's projection."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x = self.layer(x)
        return x + x.mean(1, keepdim=True)


def wrapped(model):
    model.blocks[1].attn.proj = Mixer(model.blocks[1].attn.proj)


def weight_norm(model):
    for block in model.blocks:
        nn.utils.parametrizations.weight_norm(block.attn.proj)


def spectral_norm(model):
    for block in model.blocks:
        nn.utils.parametrizations.spectral_norm(block.mlp.fc2)


def in_a_sequence(model):
    for block in model.blocks:
        block.mlp = nn.Sequential(block.mlp, nn.Hardtanh(-0.1, 0.1))


def backward_hook(model):
    model.blocks[2].register_full_backward_hook(lambda *_: None)
    model.blocks[1].mlp.register_full_backward_pre_hook(lambda *_: None)


def old_weight_norm(model):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.blocks[1].mlp.fc1)


def bound_method(model):
    def forward(self, x, *args, **kwargs):
        return -Attention.forward(self, x, *args, **kwargs)

    for block in model.blocks:
        if isinstance(block.attn, Attention):
            block.attn.forward = MethodType(forward, block.attn)


def norm_hook(model):
    model.norm.register_forward_hook(lambda module, given, out: out - out.mean(1, keepdim=True))


def pool_replaced(model):
    old = model.pool
    model.pool = lambda x: 2 * old(x)


def unfused(model):
    for block in model.blocks:
        block.attn.fused_attn = False


def scaled(model):
    unfused(model)
    for block in model.blocks:
        block.attn.scale *= 3


class Swapped:
    """What FSDP's classes have of their own."""

    def unshard(self):
        return None


def class_swapped(model):
    for block in model.blocks:
        block.__class__ = type(f"FSDP{type(block).__name__}", (Swapped, type(block)), {})


CHANGES = {
    "block hook": hook(""),
    "attention hook": hook("attn"),
    "projection hook": hook("attn.proj"),
    "dropout hook": hook("attn.proj_drop"),
    "norm hook": hook("norm1"),
    "mlp hook": hook("mlp"),
    "drop path hook": hook("drop_path1"),
    "query hook": lambda model: model.blocks[0].attn.q_norm.register_forward_hook(
        lambda module, given, out: 3 * out
    ),
    "pre-hook": pre_hook,
    "block forward": replace_forward(""),
    "attention forward": replace_forward("attn"),
    "linear forward": replace_forward("mlp.fc2"),
    "mlp forward": replace_forward("mlp"),
    "class of a linear": class_replaced,
    "adapter": wrapped,
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "sequence": in_a_sequence,
    "backward hook": backward_hook,
    "old weight norm": old_weight_norm,
    "bound method": bound_method,
    "norm of the head": norm_hook,
    "pooling": pool_replaced,
    "unfused": unfused,
    "attention scale": scaled,
    "swapped class": class_swapped,
    "double": lambda model: model.double(),
}


SAME_LOGITS = {
    "unfused", "swapped class", "double", "weight norm", "old weight norm", "backward hook",
}  # fmt: skip


def make(make_vit, name, changes):
    model_name, kwargs = MODELS[name]
    model = make_vit(model_name, **kwargs)
    plain = deepcopy(model)
    # what hides a layer comes last: others look for it
    for change in sorted(changes, key=lambda name: name in ("adapter", "sequence")):
        CHANGES[change](model)
    return model, plain


TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 0.05}


def check(
    make_vit, name, changes, seed=0, batch=BATCH, with_attention=True, dtype=None, mode="eval"
):
    """That pruned logits are those of timm's blocks, one image at a time."""
    model, plain = make(make_vit, name, changes)
    model.to(dtype).train(mode != "eval")
    model.set_grad_checkpointing(mode == "checkpointing")
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, batch, PATCHES, generator=generator) < 0.7
    keep[:, :1] = True  # images of one length beside others
    images = draw_images(batch).to(next(model.parameters()).dtype)
    expected = torch.stack([by_timm(model, image, keep[:, i]) for i, image in enumerate(images)])
    for execution in EXECUTIONS:
        staged = StagedViT(model, STAGES, execution)
        passed, logits = play(staged, images, keep, with_attention)
        near = TOLERANCES[images.dtype] * max(1, float(expected.abs().max()))
        torch.testing.assert_close(logits, expected, rtol=0, atol=near)
        if with_attention and "query hook" in changes:
            unhooked, _ = play(StagedViT(plain.to(images), STAGES, execution), images, keep)
            assert not torch.allclose(passed[0].attention, unhooked[0].attention, atol=1e-3)
        features = staged.features(passed[-1])
        assert torch.equal(features.ne(0).any(2), passed[-1].alive)
        torch.testing.assert_close(staged.classify(features), logits, rtol=0, atol=near)
    return expected, torch.stack(
        [by_timm(plain.to(images), i, keep[:, k]) for k, i in enumerate(images)]
    )


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_into_a_model_acts_as_in_timm(make_vit, change, batch):
    changed, plain = check(make_vit, "vit", [change], batch=batch)
    if change not in SAME_LOGITS:
        assert (changed - plain).abs().max() > 1e-3


COMBINABLE = [name for name in CHANGES if name not in ("double", "pooling", "spectral norm")]


@settings(max_examples=25)
@given(
    name=st.sampled_from(list(MODELS)),
    changes=st.lists(st.sampled_from(COMBINABLE), unique=True, max_size=3),
    seed=st.integers(0, 2**16),
    batch=st.integers(1, BATCH),
    with_attention=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
    mode=st.sampled_from(["eval", "train", "checkpointing"]),
)
@torch.no_grad()
def test_any_of_it_together(make_vit, name, changes, seed, batch, with_attention, dtype, mode):
    if name == "grouped":
        mode = "eval"  # in training timm rescales its positions at random
    if dtype == torch.bfloat16:  # a mean that was taken away leaves pooling only its rounding
        changes = [change for change in changes if change != "norm of the head"]
    check(make_vit, name, changes, seed, batch, with_attention, dtype, mode)


@torch.no_grad()
def test_attention_maps_are_those_of_the_survivors(make_vit):
    """Hooks on ``attn_drop`` are how attention maps are taken; each fires once for each length."""
    model, maps = make_vit(), []
    scaled(model)
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda _, __, out: maps.append(out))
    staged = StagedViT(model, STAGES)
    assert not maps  # counting MACs is none of the hooks' business
    keep = torch.ones(2, BATCH, PATCHES, dtype=torch.bool)
    keep[1, 0, 5:] = False
    passed, _ = play(staged, draw_images(), keep)
    shapes = [(4, 2, 17, 17)] * 3 + [(1, 2, 6, 6), (3, 2, 17, 17)]
    assert [tuple(map.shape) for map in maps] == shapes
    torch.testing.assert_close(passed[0].attention.view(4, 17), maps[0].mean(1)[:, 0])


@torch.no_grad()
def test_hooks_on_all_modules_fire_in_every_block(make_vit):
    vit, calls = make_vit(), []
    unfused(vit)
    handle = register_module_forward_hook(lambda module, given, out: calls.append(module))
    try:
        keep = torch.ones(2, BATCH, PATCHES, dtype=torch.bool)
        play(StagedViT(vit, STAGES), draw_images(), keep)
    finally:
        handle.remove()
    for block in vit.blocks:
        for module in block.modules():
            assert calls.count(module) == 1


def test_hooks_of_the_backward_pass_fire(make_vit):
    model, calls = make_vit(), []
    model.blocks[2].register_full_backward_hook(lambda *_: calls.append(None))
    keep = torch.ones(2, BATCH, PATCHES, dtype=torch.bool)
    _, logits = play(StagedViT(model, STAGES), draw_images(), keep)
    logits.sum().backward()
    assert len(calls) == 1


REFUSED = {
    "hook": lambda model: model.register_forward_hook(lambda *_: None),
    "pre-hook": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "hook on all blocks": lambda model: model.blocks.register_forward_hook(lambda *_: None),
    "forward": lambda model: setattr(model, "forward", lambda x: x),
    "features": lambda model: setattr(model, "forward_features", lambda x: x),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_would_never_run_is_refused(make_vit, change):
    """Whether it was there from the beginning or came later."""
    model = make_vit()
    staged = StagedViT(model, STAGES)
    change(model)
    with pytest.raises(UnsupportedBackboneError, match="would never run"):
        staged.begin(draw_images())
    with pytest.raises(UnsupportedBackboneError, match="would never run"):
        StagedViT(model, STAGES)


@torch.no_grad()
def test_attention_that_nobody_can_observe_is_refused(make_vit):
    model = make_vit()
    model.blocks[2].attn.forward = lambda x, **_: x
    keep = torch.ones(2, BATCH, PATCHES, dtype=torch.bool)
    staged = StagedViT(model, STAGES)
    with pytest.raises(RuntimeError, match=r"attention of a block was replaced.*needs_attention"):
        play(staged, draw_images(), keep)
    play(staged, draw_images(), keep, with_attention=False)


@torch.no_grad()
def test_classes_patched_as_a_whole_are_honoured(vit, monkeypatch):
    keep = torch.ones(2, 1, PATCHES, dtype=torch.bool)
    staged, images = StagedViT(vit, STAGES), draw_images(1)
    for cls in (Attention, nn.Linear):
        old = cls.forward
        with monkeypatch.context() as patch:
            patch.setattr(
                cls, "forward", lambda self, x, *a, old=old, **k: 2 * old(self, x, *a, **k)
            )
            torch.testing.assert_close(play(staged, images, keep)[1], vit(images))


@torch.no_grad()
def test_untouched_models_take_the_fast_path(vit):
    assert all(is_untouched(block) for block in vit.blocks)


# --- training mode ---


@pytest.mark.parametrize(
    "kwargs", [{"drop_path_rate": 0.9}, {"proj_drop_rate": 0.9}, {"attn_drop_rate": 0.9}, {}]
)
@torch.no_grad()
def test_training_mode_drops_what_timm_drops_and_is_no_game(make_vit, some_images, kwargs):
    model = make_vit(**kwargs).train()
    staged = StagedViT(model, STAGES)
    keep = torch.ones(2, BATCH, PATCHES, dtype=torch.bool)
    images, labels = some_images.load(range(BATCH))
    torch.manual_seed(0)
    expected = model(images)
    torch.manual_seed(0)
    torch.testing.assert_close(play(staged, images, keep, False)[1], expected)
    game = TokenGame(staged)
    with pytest.raises(ValueError, match=r"training mode.*call \.eval\(\)"):
        game.reset(images, labels)
    model.eval()
    game.reset(images, labels)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradient_checkpointing_runs_blocks_twice(make_vit, execution):
    """As timm does; and the gradients stay what they were."""
    model, calls, found = make_vit(), [], []
    staged, images = StagedViT(model, STAGES, execution), draw_images()
    keep = torch.rand(2, BATCH, PATCHES, generator=torch.Generator().manual_seed(0)) < 0.7
    for enable in (False, True):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        handle = model.blocks[1].mlp.fc1.register_forward_pre_hook(lambda *_: calls.append(None))
        play(staged, images[:1], keep[:, :1])[1].sum().backward()
        handle.remove()
        assert len(calls) == 1 + enable
        model.zero_grad()
        play(staged, images, keep)[1].sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*found)


# --- heads ---


@torch.no_grad()
def test_models_without_a_head_give_features(make_vit):
    keep = torch.rand(2, BATCH, PATCHES, generator=torch.Generator().manual_seed(0)) < 0.7
    images = draw_images()
    for kwargs in ({}, {"global_pool": "avg"}):
        model = make_vit(num_classes=0, **kwargs)
        staged = StagedViT(model, STAGES)
        assert staged.num_classes == 0
        passed, embedding = play(staged, images, torch.ones_like(keep))
        torch.testing.assert_close(embedding, model(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            staged.features(passed[-1]), model.forward_features(images), rtol=0, atol=1e-5
        )
        with pytest.raises(ValueError, match="gives embeddings, but TeamReward pays by logits"):
            TokenGame(staged)
    staged = StagedViT(make_vit(global_pool="", num_classes=0), STAGES)
    tokens = staged.begin(images)
    for stage in range(2):
        tokens = staged.advance(tokens, keep[stage], stage)
    assert torch.equal(staged.features(tokens).ne(0).any(2), tokens.alive)
    with pytest.raises(ValueError, match=r"no pooling.*forward_features"):
        staged.finish(tokens)


def test_a_head_of_another_size_counts(make_vit):
    model = make_vit()
    model.head = nn.Linear(model.embed_dim, 9)
    staged = StagedViT(model, STAGES)
    assert staged.num_classes == 9
    dense = StagedViT(make_vit(), STAGES).dense_macs
    assert staged.dense_macs - dense == 4 * model.embed_dim


@torch.no_grad()
def test_a_head_that_is_replaced_later_counts(make_vit):
    """Not only through ``reset_classifier`` of ours."""
    changes = (
        lambda model: setattr(model, "head", nn.Linear(model.embed_dim, 9)),
        lambda model: model.reset_classifier(9),
        lambda model: model.reset_classifier(9, "max"),
    )
    nobody = torch.zeros(2, BATCH, PATCHES, dtype=torch.bool)
    for change in changes:
        model = make_vit(class_token=False, global_pool="avg")
        staged = StagedViT(model, STAGES)
        change(model)
        anew = StagedViT(model, STAGES)
        assert staged.num_classes == 9
        passed, logits = play(staged, draw_images(), nobody)
        assert logits.shape == (BATCH, 9)
        assert torch.equal(staged.total_macs(passed[-1]), anew.total_macs(passed[-1]))
        assert staged.dense_macs == anew.dense_macs
    model = make_vit()
    staged = StagedViT(model, STAGES)
    model.reset_classifier(9, "avg")  # reads patches, where the class token was enough
    assert play(staged, draw_images(), nobody)[1].isfinite().all()


class ConvMlp(nn.Module):
    """An MLP that mixes neighbours, and one whose weights belong to no linear layer."""

    def __init__(self, mlp):
        super().__init__()
        self.weight = next(part for part in mlp.modules() if isinstance(part, nn.Linear)).weight
        width = self.weight.shape[1]
        self.conv = nn.Conv1d(len(self.weight), width, 3, padding=1)

    def forward(self, x):
        hidden = nn.functional.linear(x, self.weight)
        return self.conv(hidden.transpose(1, 2)).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_layers_that_are_not_linear_count(make_vit, name):
    model, plain = make(make_vit, name, [])
    plain = StagedViT(plain, STAGES)
    model.blocks[2].mlp = ConvMlp(model.blocks[2].mlp)
    wide, width = model.blocks[2].mlp.weight.shape
    staged = StagedViT(model, STAGES)
    keep = torch.zeros(2, BATCH, PATCHES, dtype=torch.bool)
    keep[..., :5] = True
    counts = []
    for each in (staged, plain):
        passed, _ = play(each, draw_images(), keep)
        counts.append(each.total_macs(passed[-1]))
    tokens = 5 + staged.num_prefix
    linear = sum(p.numel() for n, p in plain.model.blocks[2].mlp.named_parameters() if p.dim() > 1)
    assert (counts[0] - counts[1]).tolist() == [tokens * (4 * width * wide - linear)] * BATCH


# --- quantised ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_quantised_layers_run_and_count(make_vit):
    model = make_vit()
    macs = StagedViT(model, STAGES).dense_macs
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    staged = StagedViT(quantised, STAGES)
    assert staged.dense_macs == macs
    keep = torch.ones(2, BATCH, PATCHES, dtype=torch.bool)
    for batch in (1, BATCH):
        images = draw_images(batch)
        logits = play(staged, images, keep[:, :batch])[1]
        torch.testing.assert_close(logits, quantised(images), rtol=0, atol=1e-5)


class Wrapped(torch.Tensor):
    """A tensor subclass as quantisation libraries make them: only ``linear`` knows it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, bias = (a.as_subclass(torch.Tensor) for a in args)
            return torch.nn.functional.linear(x, 2 * weight, bias)
        return super().__torch_function__(function, types, args, kwargs or {})


@torch.no_grad()
def test_weights_of_another_kind_are_left_to_their_layer(make_vit):
    model = make_vit()
    for block in model.blocks:
        weight = block.mlp.fc1.weight.data.as_subclass(Wrapped)
        block.mlp.fc1.weight = nn.Parameter(weight, requires_grad=False)
    assert type(model.blocks[0].mlp.fc1.weight) is Wrapped
    keep = torch.ones(2, BATCH, PATCHES, dtype=torch.bool)
    for batch in (1, BATCH):
        images = draw_images(batch)
        logits = play(StagedViT(model, STAGES), images, keep[:, :batch])[1]
        torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-5)


# --- replicas, and a module that is imported again ---


@torch.no_grad()
def test_a_replica_without_parameters_runs(vit):
    """``nn.DataParallel`` makes them: their parameters are plain attributes."""
    staged = StagedViT(vit, STAGES)
    keep = torch.ones(2, BATCH, PATCHES, dtype=torch.bool)
    expected = play(staged, draw_images(), keep)[1]
    replicas = {part: part._replicate_for_data_parallel() for part in staged.modules()}
    for part, replica in replicas.items():
        for name, child in part._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, parameter in part._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
    replica = replicas[staged]
    assert not list(replica.parameters())
    assert (replica.device, replica.dtype) == (staged.device, staged.dtype)
    assert torch.equal(play(replica, draw_images(), keep)[1], expected)


def test_the_module_can_be_imported_again():
    names = {name: vars(onednn_linear)[name] for name in dir(onednn_linear)}
    importlib.reload(onednn_linear)
    vars(onednn_linear).update(names)
