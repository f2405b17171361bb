"""Vision models of Hugging Face's ``transformers`` as timm models of the same architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn

from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError, some_tensor
from prunevit.envs.vit.untouched import has_hooks, is_plain

ImageSize = int | Sequence[int]
# by which timm calls embedding widths in the names of its models
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
# timm's names of the functions that transformers calls so
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Parts of transformers' names and timm's for them, in this order. Those of transformers 5 come
# first in an alternative, those of transformers 4 last.
NAMES = (
    (r"^(vit|deit|vision_model)\.", ""),
    (r"^(encoder\.|model\.)?layers?\.(?=\d)", "blocks."),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.(register_tokens|distillation_token)$", "reg_token"),
    (r"^embeddings\.(patch_embeddings\.projection|patch_embeddings|patch_embedding)\.",
     "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^(classifier|cls_classifier|visual_projection)\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.(attention\.attention|attention|self_attn)\.", ".attn."),
    (r"\.attn\.(q_proj|query)\.", ".attn.q."),
    (r"\.attn\.(k_proj|key)\.", ".attn.k."),
    (r"\.attn\.(v_proj|value)\.", ".attn.v."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.(?<!attn\.)output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(down_proj|weights_out)\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)  # fmt: skip
# what pre-training needs, and what stays theirs
LEFT_OUT = re.compile(r"^((vit|deit)\.)?(embeddings\.(mask_token|position_ids)|pooler\.)")

Output = Literal["model", "logits", "image_embeds"]


@dataclass(frozen=True)
class Architecture:
    """A timm model.

    Attributes:
        name: its name, the one of its size if timm has that.
        kwargs: arguments of ``create_backbone`` that make it like the one of transformers.
    """

    name: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A class of transformers' models.

    Attributes:
        describe: (model) -> timm's architecture of it; raises UnsupportedBackboneError.
        output: what its forward pass returns: the last hidden state and what is pooled of it, the
            logits of a classifier, or embeddings that are compared with those of texts.
    """

    describe: Callable[[Any], Architecture]
    output: Output = "model"


def is_of_transformers(model: object) -> bool:
    """Whether a model's class, or one that it inherits from, is one of transformers' models."""
    return any(cls.__module__.startswith("transformers.models.") for cls in type(model).__mro__)


def from_transformers(model: nn.Module, img_size: ImageSize | None = None) -> nn.Module:
    """Builds timm's model of the same architecture with copies of the weights.

    It is in evaluation mode, on the model's device, and of its type. Dropout isn't taken over.

    Args:
        model: a model of transformers: ``ViTModel``, ``Dinov2Model`` and others of ``KINDS``.
        img_size: size of the images, by default ``model.config.image_size``. For another size,
            position embeddings are resampled as the model itself does it.

    Raises:
        UnsupportedBackboneError: the model is of another class, has a setting that timm's doesn't
            have, hooks, or weights that aren't plain tensors.
    """
    architecture = kind_of(model).describe(model)
    _check_plain(model)
    theirs = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if img_size is not None:
        size = _pair(img_size)
        if size != _pair(cast(Any, model).config.image_size):
            theirs = _with_positions(model, theirs, size)
        architecture.kwargs["img_size"] = size
    with torch.random.fork_rng(devices=[]):
        vit = create_backbone(architecture.name, untrained=True, **architecture.kwargs)
    vit.load_state_dict(_rename(theirs, vit))
    some = some_tensor(model)
    return vit.to(some.device, some.dtype)


def kind_of(model: nn.Module) -> Kind:
    """What ``KINDS`` has of a model's class.

    Raises:
        UnsupportedBackboneError: it has nothing.
    """
    cls = type(model)
    kind = KINDS.get(cls.__name__)
    if kind is not None and cls.__module__.startswith("transformers."):
        return kind
    name = cls.__name__
    parts: list[str] = [
        f"model.{part}"
        for part, module in model.named_children()
        if type(module).__name__ in KINDS and is_of_transformers(module)
    ]
    hint = f": give {' or '.join(parts)}" if parts else f"; those are {', '.join(KINDS)}"
    raise UnsupportedBackboneError(f"{name} is no model of transformers that timm has too{hint}")


def _check_plain(model: nn.Module) -> None:
    if has_hooks(model):
        raise UnsupportedBackboneError(
            f"the {type(model).__name__} has hooks, which would never run: remove them, and load "
            "it without device_map"
        )
    for name, parameter in model.named_parameters():
        if ".base_layer." in name:
            raise UnsupportedBackboneError(
                f"the {type(model).__name__} has adapters: give peft_model.merge_and_unload(), or "
                "add them to the pruned model"
            )
        if not is_plain(parameter) or not parameter.is_floating_point():
            raise UnsupportedBackboneError(
                f"{name} is no plain tensor: prune the model before it is quantised or sharded"
            )


def _with_positions(
    model: Any, theirs: Mapping[str, Tensor], size: tuple[int, int]
) -> dict[str, Tensor]:
    """The weights with the position embeddings that the model uses on images of another size."""
    model = next((part for part in model.modules() if hasattr(part, "embeddings")), model)
    resample = getattr(model.embeddings, "interpolate_pos_encoding", None)
    if resample is None:  # rotary positions
        return dict(theirs)
    name = next(name for name in theirs if _new_name(name) == "pos_embed")
    old, patch = theirs[name], _pair(model.config.patch_size)
    width = old.shape[-1]
    trained = _pair(model.config.image_size)
    prefix = old.numel() // width - (trained[0] // patch[0]) * (trained[1] // patch[1])
    count = (size[0] // patch[0]) * (size[1] // patch[1])
    with torch.no_grad():
        new = resample(old.new_empty(1, prefix + count, width), *size)
    return {**theirs, name: new}


def _rename(theirs: Mapping[str, Tensor], vit: Any) -> dict[str, Tensor]:
    """The weights ``theirs`` under the names and in the shapes of timm's ``vit``.

    Raises:
        UnsupportedBackboneError: some are missing or left over.
    """
    left = {
        _new_name(name): tensor
        for name, tensor in theirs.items()
        if tensor.numel() and not LEFT_OUT.match(name)  # no registers are a tensor of size 0
    }
    if getattr(vit, "no_embed_class", False) and vit.pos_embed is not None:
        # timm has no position of the class token, which is the same in each image
        positions = left["pos_embed"]
        left["cls_token"] = left["cls_token"] + positions[:, :1]
        left["pos_embed"] = positions[:, 1:]
    elif hasattr(vit, "dist_token"):
        left["dist_token"] = left.pop("reg_token")
    for part in ("weight", "bias"):
        fused = left.pop(f"attn_pool.qkv.{part}", None)
        if fused is not None:
            width = vit.embed_dim
            left[f"attn_pool.q.{part}"], left[f"attn_pool.kv.{part}"] = fused.split(
                (width, 2 * width)
            )
    renamed = {}
    own = vit.state_dict()
    for name, wanted in own.items():
        sources = next((found for found in _sources(name) if set(found) <= left.keys()), None)
        if sources is not None:
            tensor = torch.cat([left.pop(source) for source in sources])
            while tensor.dim() < wanted.dim():
                tensor = tensor[None]
        elif name.endswith("bias"):
            tensor = torch.zeros_like(wanted)  # theirs has a linear layer without one
        else:
            raise UnsupportedBackboneError(f"the model has no weights for timm's {name}")
        if tensor.shape != wanted.shape:
            raise UnsupportedBackboneError(
                f"timm's {name} is {list(wanted.shape)}, the model's {list(tensor.shape)}"
            )
        renamed[name] = tensor
    if left:
        raise UnsupportedBackboneError(f"timm's model has nothing like the weights {min(left)}")
    return renamed


def _new_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _sources(name: str) -> list[tuple[str, ...]]:
    """Names, as ``_new_name`` has them, of what makes timm's weights ``name``, best first."""
    block, _, part = name.rpartition(".")
    up, gate = (f"{block.rpartition('.')[0]}.{layer}.{part}" for layer in ("up_proj", "gate_proj"))
    found: list[tuple[str, ...]] = [(name,)]
    if name.endswith((".attn.q_bias", ".attn.v_bias")):
        found = [(f"{block}.{part[0]}.bias",)]
    elif block.endswith(".attn.qkv"):
        found = [tuple(f"{block.removesuffix('qkv')}{part_of}.{part}" for part_of in "qkv")]
    elif block.endswith(".mlp.fc1"):
        found += [(gate, up), (up,)]
    elif block.endswith(".mlp.fc1_g"):
        found = [(gate,)]
    elif block.endswith(".mlp.fc1_x"):
        found = [(up,)]
    elif part in ("gamma_1", "gamma_2"):
        found = [(f"{block}.ls{part[-1]}.gamma",)]
    return found


def _pair(size: ImageSize) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _architecture(
    model: Any, default: str, hidden: int, named: str | None = None, **kwargs: Any
) -> Architecture:
    """Arguments that all architectures have.

    Args:
        model: the model of transformers.
        default: timm's model that is like it but for its size.
        hidden: width of the MLP.
        named: timm's name of one of some size, with {size} and {patch}; ``default`` if None.
        kwargs: further arguments, in place of those of ``default``.
    """
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "head_dim", None) not in (None, width // heads):
        raise _unsupported(model, "head_dim", config.head_dim)
    patch = _pair(config.patch_size)
    name = default
    if named is not None and width in SIZES:
        of_size = named.format(size=SIZES[width], patch=patch[0])
        name = of_size if timm.is_model(of_size) else default
    classes = config.num_labels if KINDS[type(model).__name__].output == "logits" else 0
    return Architecture(
        name,
        {
            "num_classes": classes,
            "img_size": _pair(config.image_size),
            "patch_size": patch,
            "in_chans": config.num_channels,
            "embed_dim": width,
            "depth": config.num_hidden_layers,
            "num_heads": heads,
            "mlp_ratio": (hidden + 0.5) / width,  # which timm rounds down
            "norm_eps": config.layer_norm_eps,
            **kwargs,
        },
    )


def _activation(model: Any) -> str:
    name = model.config.hidden_act
    if name not in ACTIVATIONS:
        raise _unsupported(model, "hidden_act", name)
    return ACTIVATIONS[name]


def _unsupported(model: Any, setting: str, value: object) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"timm has no model like this {type(model).__name__}, with {setting}={value!r}"
    )


def _vit(model: Any) -> Architecture:
    return _architecture(
        model,
        "vit_base_patch16_224",
        model.config.intermediate_size,
        act_layer=_activation(model),
        qkv_bias=model.config.qkv_bias,
    )


def _deit(model: Any) -> Architecture:
    # without a head of its own, the distillation token is one more register with a position
    return _architecture(
        model,
        "deit_base_patch16_224",
        model.config.intermediate_size,
        "deit_{size}_patch{patch}_224",
        act_layer=_activation(model),
        qkv_bias=model.config.qkv_bias,
        reg_tokens=1,
    )


def _deit_with_teacher(model: Any) -> Architecture:
    return _architecture(
        model,
        "deit_base_distilled_patch16_224",
        model.config.intermediate_size,
        "deit_{size}_distilled_patch{patch}_224",
        act_layer=_activation(model),
        qkv_bias=model.config.qkv_bias,
    )


def _dinov2(model: Any) -> Architecture:
    config = model.config
    hidden = int(config.hidden_size * config.mlp_ratio)
    registers = getattr(config, "num_register_tokens", 0)
    suffix = "reg4_dinov2" if registers else "dinov2"
    kwargs: dict[str, Any] = {"qkv_bias": config.qkv_bias}
    if registers:
        kwargs |= {"reg_tokens": registers, "no_embed_class": True}
    if config.use_swiglu_ffn:
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
        return _architecture(model, f"vit_giant_patch14_{suffix}", hidden, **kwargs)
    kwargs["act_layer"] = _activation(model)
    named = f"vit_{{size}}_patch{{patch}}_{suffix}" if config.hidden_size < 1536 else None
    return _architecture(model, f"vit_base_patch14_{suffix}", hidden, named, **kwargs)


def _dinov3(model: Any) -> Architecture:
    config = model.config
    if config.key_bias:
        raise _unsupported(model, "key_bias", True)
    wanted = "silu" if config.use_gated_mlp else "gelu"
    if ACTIVATIONS.get(config.hidden_act) != wanted:
        raise _unsupported(model, "hidden_act", config.hidden_act)
    plus = "_plus" if config.use_gated_mlp else ""
    return _architecture(
        model,
        f"vit_small{plus}_patch16_dinov3_qkvb",
        config.intermediate_size,
        f"vit_{{size}}{plus}_patch{{patch}}_dinov3_qkvb",
        global_pool="token",
        num_reg_tokens=config.num_register_tokens,
        rope_temperature=config.rope_theta,
        swiglu_mlp=config.use_gated_mlp,
        swiglu_align_to=1 if config.use_gated_mlp else 0,
    )


def _clip(model: Any) -> Architecture:
    config = model.config
    quick = "_quickgelu" if config.hidden_act == "quick_gelu" else ""
    kwargs = {}
    if KINDS[type(model).__name__].output == "image_embeds":
        kwargs["num_classes"] = config.projection_dim
    return _architecture(
        model,
        f"vit_base_patch16_clip{quick}_224",
        config.intermediate_size,
        f"vit_{{size}}_patch{{patch}}_clip{quick}_224",
        act_layer=_activation(model),
        **kwargs,
    )


def _siglip(model: Any) -> Architecture:
    return _architecture(
        model,
        "vit_base_patch16_siglip_224",
        model.config.intermediate_size,
        "vit_{size}_patch{patch}_siglip_224",
        act_layer=_activation(model),
        global_pool="map" if getattr(model.config, "vision_use_head", True) else "",
    )


# CLIP's and SigLIP's towers are called Transformer where they are part of a model in transformers 4
KINDS = {
    "ViTModel": Kind(_vit),
    "ViTForImageClassification": Kind(_vit, "logits"),
    "DeiTModel": Kind(_deit),
    "DeiTForImageClassification": Kind(_deit, "logits"),
    "DeiTForImageClassificationWithTeacher": Kind(_deit_with_teacher, "logits"),
    "Dinov2Model": Kind(_dinov2),
    "Dinov2WithRegistersModel": Kind(_dinov2),
    "DINOv3ViTModel": Kind(_dinov3),
    "CLIPVisionModel": Kind(_clip),
    "CLIPVisionTransformer": Kind(_clip),
    "CLIPVisionModelWithProjection": Kind(_clip, "image_embeds"),
    "SiglipVisionModel": Kind(_siglip),
    "SiglipVisionTransformer": Kind(_siglip),
}
