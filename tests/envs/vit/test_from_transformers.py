"""timm models with the weights of transformers' give what those give, block by block."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.from_transformers import KINDS, from_transformers, is_of_transformers
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

pytestmark = pytest.mark.integration("transformers")
transformers = pytest.importorskip("transformers")

SIZE, DEPTH = 32, 3
TINY = {
    "hidden_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "image_size": SIZE,
    "patch_size": 8, "num_labels": 5,
}  # fmt: skip
MLP = {"intermediate_size": 64}
# class, and settings of its configuration
MODELS = {
    "ViT": ("ViTModel", MLP),
    "ViT, no biases, ReLU": ("ViTModel", {**MLP, "qkv_bias": False, "hidden_act": "relu"}),
    "ViT, epsilon": ("ViTModel", {**MLP, "layer_norm_eps": 0.3}),
    "ViT, rectangular": ("ViTModel", {**MLP, "image_size": (24, 40), "patch_size": (8, 4)}),
    "ViT, one channel": ("ViTModel", {**MLP, "num_channels": 1}),
    "ViT, classifier": ("ViTForImageClassification", MLP),
    "DeiT": ("DeiTModel", MLP),
    "DeiT, classifier": ("DeiTForImageClassification", MLP),
    "DeiT, with teacher": ("DeiTForImageClassificationWithTeacher", MLP),
    "DINOv2": ("Dinov2Model", {"mlp_ratio": 3}),
    "DINOv2, SwiGLU": ("Dinov2Model", {"use_swiglu_ffn": True}),
    "DINOv2, registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}),
    "DINOv2, registers and SwiGLU": ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True}),
    "DINOv3": ("DINOv3ViTModel", {**MLP, "num_register_tokens": 2}),
    "DINOv3, no registers": ("DINOv3ViTModel", {**MLP, "query_bias": False, "mlp_bias": False}),
    "DINOv3, gated": (
        "DINOv3ViTModel",
        {"intermediate_size": 60, "use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 50.0},
    ),
    "CLIP": ("CLIPVisionModel", MLP),
    "CLIP, GELU": ("CLIPVisionModel", {**MLP, "hidden_act": "gelu"}),
    "CLIP, projection": ("CLIPVisionModelWithProjection", {**MLP, "projection_dim": 7}),
    "SigLIP": ("SiglipVisionModel", MLP),
    "SigLIP, no head": ("SiglipVisionModel", {**MLP, "vision_use_head": False}),
}
each_model = pytest.mark.parametrize("family", MODELS)


def build(family="ViT", **more):
    """A tiny model whose weights are all random: those of its beginning hide what is left out."""
    name, settings = MODELS[family]
    cls = getattr(transformers, name)
    config = cls.config_class(**{**TINY, **settings, **more})
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(model, count=2):
    size = model.config.image_size
    shape = size if isinstance(size, tuple | list) else (size, size)
    return torch.randn(count, model.config.num_channels, *shape)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@each_model
@torch.no_grad()
def test_each_block_gives_the_same(family):
    model = build(family)
    vit = from_transformers(model)
    pixels = images(model)
    theirs = model(pixels, output_hidden_states=True).hidden_states
    if theirs is None:  # DeiT with a teacher keeps its own outputs only
        theirs = model.deit(pixels, output_hidden_states=True).hidden_states
    assert len(theirs) == DEPTH + 1
    ours = vit.forward_intermediates(
        pixels, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    for mine, other in zip(ours, theirs[1:], strict=True):
        tokens = torch.cat(mine[::-1], dim=1) if isinstance(mine, tuple) else mine
        close(tokens, other)


@each_model
@torch.no_grad()
def test_what_is_pooled_is_the_same(family):
    model = build(family)
    found = model(pixels := images(model))
    vit = from_transformers(model)
    if KINDS[type(model).__name__].output == "logits":
        close(vit(pixels), found.logits)
    elif KINDS[type(model).__name__].output == "image_embeds":
        close(vit(pixels), found.image_embeds)
    elif getattr(model, "pooler", None) is not None:
        close(model.pooler(vit(pixels)[:, None]), found.pooler_output)
    elif found.pooler_output is not None:
        close(vit(pixels), found.pooler_output)


@each_model
def test_it_can_be_staged(family):
    model = build(family)
    assert StagedViT(from_transformers(model)).depth == DEPTH


@pytest.mark.parametrize(
    "family", ["ViT", "DeiT", "DeiT, with teacher", "DINOv2", "DINOv2, registers", "DINOv3", "CLIP"]
)
@torch.no_grad()
def test_another_image_size_resamples_positions_as_theirs(family):
    model = build(family)
    pixels = torch.randn(2, 3, 48, 48)
    vit = from_transformers(model, img_size=48)
    inner = getattr(model, "deit", model)
    option = {} if "DINO" in family else {"interpolate_pos_encoding": True}
    theirs = inner(pixels, **option)
    if family == "CLIP":
        close(vit(pixels), theirs.pooler_output)
    else:
        close(vit.forward_features(pixels), theirs.last_hidden_state)


def test_weights_are_copies_and_random_numbers_are_left_alone():
    model = build()
    state = torch.get_rng_state()
    vit = from_transformers(model.double())
    assert torch.equal(torch.get_rng_state(), state)
    assert vit.cls_token.dtype == torch.float64
    vit.cls_token.data.zero_()
    assert model.embeddings.cls_token.abs().sum() > 0
    assert not vit.training


def test_timms_name_is_the_one_of_the_size():
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=1, patch_size=14, image_size=28
    )
    vit = from_transformers(transformers.Dinov2Model(config))
    assert vit.pretrained_cfg["architecture"] == "vit_small_patch14_dinov2"
    assert vit.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert vit.pretrained_cfg["input_size"] == (3, 28, 28)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("ViT", {"hidden_act": "gelu_10"}, "with hidden_act='gelu_10'"),
        ("ViT", {"head_dim": 32}, "with head_dim=32"),
        ("DINOv3", {"key_bias": True}, "with key_bias=True"),
        ("DINOv3", {"hidden_act": "relu"}, "with hidden_act='relu'"),
        ("DINOv3, gated", {"hidden_act": "gelu"}, "with hidden_act='gelu'"),
    ],
)
def test_what_timm_cant_express_is_refused(family, settings, message):
    model = build(family, **settings)
    with pytest.raises(UnsupportedBackboneError, match=message):
        from_transformers(model)


def test_other_classes_are_refused():
    config = transformers.BeitConfig(**TINY, **MLP)
    with pytest.raises(UnsupportedBackboneError, match=r"BeitModel is no .* those are ViT"):
        from_transformers(transformers.BeitModel(config))
    config = transformers.Dinov2Config(**TINY)
    with pytest.raises(UnsupportedBackboneError, match=r"Dinov2ForImage.*: give model\.dinov2$"):
        from_transformers(transformers.Dinov2ForImageClassification(config))

    class Own(transformers.ViTModel):
        """May do anything."""

    with pytest.raises(UnsupportedBackboneError, match=r"^Own is no model"):
        from_transformers(Own(transformers.ViTConfig(**TINY, **MLP)))


def test_hooks_and_other_weights_are_refused():
    model = build()
    handle = model.layernorm.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedBackboneError, match="ViTModel has hooks"):
        from_transformers(model)
    handle.remove()
    parametrizations.weight_norm(model.pooler.dense)  # stays theirs
    from_transformers(model)
    parametrizations.weight_norm(next(p for p in model.modules() if isinstance(p, nn.Linear)))
    with pytest.raises(UnsupportedBackboneError, match="no weights for timm's blocks"):
        from_transformers(model)


def test_models_of_others_are_none_of_transformers():
    assert is_of_transformers(build())
    assert not is_of_transformers(nn.Linear(2, 2))
    assert not is_of_transformers(create_backbone(untrained=True))
