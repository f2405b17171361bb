import json
import socket

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from prunevit.envs.data import digits
from prunevit.envs.data.datasets import open_images
from prunevit.envs.vit import create, digits_vit
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import ConvStem, build_digits_vit
from prunevit.envs.vit.weights import BackboneError, sha256, write_weights

VIT = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(7)
    return build_digits_vit().state_dict()


@pytest.fixture
def assets(weights, tmp_path, monkeypatch):
    """Weights of the right shape in the place of those that are shipped; returns them."""
    file = tmp_path / "digits_vit.safetensors"
    write_weights(file, weights, "digits_vit", 10, {})
    (tmp_path / "digits_vit.json").write_text(json.dumps({"sha256": sha256(file)}))
    monkeypatch.setattr(digits_vit, "ASSETS", tmp_path)
    return weights


def small(seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_backbone(VIT, untrained=True, **({"num_classes": 5} | SMALL | kwargs))


def same(model, weights):
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[k], weights[k]) for k in own)


# --- the ViT for the digits ---


@pytest.mark.parametrize("pretrained", [False, True])
def test_digits_vit_comes_with_the_shipped_weights(assets, no_network, pretrained):
    model = create_backbone(pretrained=pretrained)
    assert same(model, assets)
    assert not model.training
    assert not same(create_backbone(untrained=True), assets)


def test_digits_vit_takes_the_digits(assets):
    model = create_backbone()
    images = open_images("digits", "test", resolve_model_data_config(model), size=2)
    assert model(images.load([0, 1])[0]).shape == (2, 10)
    assert model.patch_embed.num_patches == 64
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_300_000


def test_random_weights_are_told_unless_they_are_wanted(recwarn):
    create_backbone()
    create_backbone(VIT, untrained=True, **SMALL)
    assert not recwarn
    with pytest.warns(UserWarning, match=f"weights of {VIT} are random: give pretrained weights"):
        create_backbone(VIT, **SMALL)


def test_damaged_or_missing_shipped_weights_are_named(assets, tmp_path):
    file = tmp_path / "digits_vit.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BackboneError, match=r"digits_vit\.safetensors.*digits_vit\.json"):
        create_backbone()
    file.unlink()
    with pytest.raises(BackboneError, match=r"digits_vit\.safetensors is missing"):
        create_backbone()
    assert create_backbone(untrained=True)


def test_shipped_weights_are_as_good_as_they_say():
    model = create_backbone()
    images = open_images("digits", "test", resolve_model_data_config(model), size=400)
    inputs, labels = images.load(range(400))
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == labels).float().mean()
    facts = json.loads((digits_vit.ASSETS / "digits_vit.json").read_text())
    assert facts["test_accuracy"] >= 0.93
    # the standard error over 400 images is 1.1%
    assert abs(accuracy - facts["test_accuracy"]) < 0.04
    assert (digits_vit.ASSETS / "digits_vit.safetensors").stat().st_size < 6_000_000


# --- the stem ---


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_the_stem_makes_a_token_a_patch(patch_size):
    stem = ConvStem(img_size=32, patch_size=patch_size, in_chans=2, embed_dim=32).eval()
    images = torch.zeros(2, 2, 32, 32)
    images[1, :, 16:, :16] = 1
    tokens = stem(images)
    side = 32 // patch_size
    assert tokens.shape == (2, side * side, 32)
    assert stem.num_patches == side * side
    assert stem.grid_size == (side, side)
    # row by row: what is bright below on the left doesn't reach the corner above on the right
    change = (tokens[1] - tokens[0]).abs().sum(1).reshape(side, side)
    assert change[-1, 0] > 0
    assert change[0, -1] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 6}, "patch_size=6"),
        ({"img_size": 60}, "img_size=60"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad"),
    ],
)
def test_the_stem_refuses_what_it_can_not_cut(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvStem(**arguments)


def test_the_stem_refuses_images_of_another_size():
    with pytest.raises(ValueError, match=r"\(32, 64\).*\(64, 64\)"):
        ConvStem()(torch.zeros(1, 1, 32, 64))


# --- timm's models ---


def test_timm_models_by_name_without_a_network(no_network):
    model = small()
    assert not model.training
    assert model.num_classes == 5
    assert len(model.blocks) == 1
    assert not isinstance(model.patch_embed, ConvStem)
    assert same(small(), model.state_dict())
    assert not same(small(seed=1), model.state_dict())


@pytest.mark.parametrize(("name", "convs"), [("conv_stem", 3), ("deep_conv_stem", 6)])
def test_stems_have_names(name, convs):
    model = small(embed_layer=name)
    stem = model.patch_embed
    assert isinstance(stem, ConvStem)
    strides = [layer.stride[0] for layer in stem.layers if isinstance(layer, torch.nn.Conv2d)]
    assert strides == ([2, 1] * 3 if convs == 6 else [2] * 3) + [1]
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_an_unknown_stem_is_refused():
    with pytest.raises(BackboneError, match=r"unknown embed_layer 'stem': choose from conv_stem"):
        small(embed_layer="stem")


@pytest.mark.parametrize("name", ["conv_stem", "deep_conv_stem"])
def test_a_stem_gives_the_same_with_its_norms_folded(name):
    stem = small(embed_layer=name).patch_embed
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for layer in stem.layers:
        if isinstance(layer, torch.nn.BatchNorm2d):
            for part in (layer.running_mean, layer.weight.data, layer.bias.data):
                torch.nn.init.normal_(part)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    expected = stem.layers(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "means"),
    [
        (VIT, SMALL, (3, 32, 32), 3),
        (VIT, SMALL | {"in_chans": 1}, (1, 32, 32), 1),
        (VIT, SMALL | {"img_size": (32, 64)}, (3, 32, 64), 3),
        ("test_resnet", {"in_chans": 1}, (1, 160, 160), 1),
        ("digits_vit", {"img_size": 32, "in_chans": 3, "depth": 1}, (3, 32, 32), 3),
        ("digits_vit", {"depth": 1}, (1, 64, 64), 1),
    ],
)
def test_the_data_configuration_fits_the_model(name, kwargs, size, means):
    model = create_backbone(name, untrained=True, **kwargs)
    config = resolve_model_data_config(model)
    assert config["input_size"] == size
    assert len(config["mean"]) == len(config["std"]) == means
    assert model(torch.zeros(1, *size)).shape[0] == 1
    if name == "digits_vit":
        assert config["mean"][0] == digits.PIXEL_MEAN
        assert config["std"][0] == digits.PIXEL_STD


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("deit_smal", "deit_small_patch16_224"),
        ("vit_tiny_patch16_242", "vit_tiny_patch16_224"),
        ("digit_vit", "digits_vit"),
        ("qqqqqq", "timm.list_models"),
        ("", "timm.list_models"),
    ],
)
def test_an_unknown_name_is_told_what_is_near(name, near):
    with pytest.raises(BackboneError, match=f"unknown backbone '{name}'.*{near}"):
        create_backbone(name)


@pytest.mark.parametrize("name", [VIT, "digits_vit"])
def test_an_unknown_argument_is_named(name):
    with pytest.raises(BackboneError, match=f"can't build {name}.*depht"):
        create_backbone(name, untrained=True, depht=3)


def test_an_unknown_tag_is_named():
    with pytest.raises(BackboneError, match="nonsense"):
        create_backbone(f"{VIT}.nonsense")


def test_a_hub_is_not_asked_unless_told_to(no_network):
    with pytest.raises(BackboneError, match="pretrained=True"):
        create_backbone("hf-hub:timm/anything")


def test_pretrained_weights_without_a_network(monkeypatch):
    def fail(name, pretrained, **_):
        assert pretrained
        raise OSError("An error happened while\ntrying to locate the file on the Hub")

    monkeypatch.setattr(create.timm, "create_model", fail)
    with pytest.raises(BackboneError, match=rf"{VIT}.*while trying to locate.*checkpoint"):
        create_backbone(VIT, pretrained=True)


def test_only_one_origin_of_weights(tmp_path):
    for two in (
        {"pretrained": True, "untrained": True},
        {"pretrained": True, "checkpoint": tmp_path / "x"},
        {"untrained": True, "checkpoint": tmp_path / "x"},
    ):
        with pytest.raises(BackboneError, match="choose one"):
            create_backbone(VIT, **two)


# --- local weights ---


def test_a_checkpoint_of_ours_rebuilds_its_model(tmp_path):
    kwargs = SMALL | {"embed_layer": "conv_stem", "depth": 2}
    model = small(seed=1, **kwargs).to(memory_format=torch.channels_last)
    write_weights(tmp_path / "w.safetensors", model.state_dict(), VIT, 5, kwargs)
    again = create_backbone(VIT, checkpoint=tmp_path / "w.safetensors")
    assert same(again, model.state_dict())
    assert again.num_classes == 5
    assert again.pretrained_cfg["input_size"] == (3, 32, 32)


def test_the_same_weights_make_the_same_file(tmp_path):
    for name in ("a", "b"):
        write_weights(tmp_path / name, small().state_dict(), VIT, 5, SMALL)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


def test_weights_that_share_memory_are_written(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    weights = {"a": shared, "b": shared.T}
    write_weights(tmp_path / "w.safetensors", weights, "x", 1, {})
    loaded = load_file(tmp_path / "w.safetensors")
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared.T)


@pytest.mark.parametrize(
    "nest",
    [
        lambda w: w,
        lambda w: {"model": w, "epoch": 3},
        lambda w: {"state_dict": {f"module.{key}": tensor for key, tensor in w.items()}},
        lambda w: {f"visual.trunk.{key}": tensor for key, tensor in w.items()},  # OpenCLIP's
    ],
)
def test_a_checkpoint_of_pytorch(tmp_path, nest):
    model = small(seed=1)
    torch.save(nest(model.state_dict()), tmp_path / "w.pth")
    again = create_backbone(VIT, checkpoint=str(tmp_path / "w.pth"), num_classes=5, **SMALL)
    assert same(again, model.state_dict())
    assert not again.training


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(BackboneError, match=r"no checkpoint .*w\.safetensors"):
        create_backbone(VIT, checkpoint=tmp_path / "w.safetensors")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_truncated_checkpoint_is_named(tmp_path, name, keep):
    file = tmp_path / name
    if file.suffix == ".pth":
        torch.save(small().state_dict(), file)
    else:
        write_weights(file, small().state_dict(), VIT, 5, SMALL)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(BackboneError, match=rf"checkpoint .*{name} is damaged"):
        create_backbone(VIT, checkpoint=file, num_classes=5, **SMALL)


def test_a_checkpoint_of_code_is_not_run(tmp_path):
    torch.save({"a": Evil()}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"w\.pth is damaged, or not a file of plain tensors"):
        create_backbone(VIT, checkpoint=tmp_path / "w.pth", **SMALL)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("the checkpoint ran code",))


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, torch.zeros(2)])
def test_a_file_without_a_state_dict_is_named(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"w\.pth is damaged, or not a file of plain tensors"):
        create_backbone(VIT, checkpoint=tmp_path / "w.pth", **SMALL)


def test_a_checkpoint_of_another_backbone_is_named(tmp_path):
    file = tmp_path / "w.safetensors"
    write_weights(file, small().state_dict(), VIT, 5, SMALL)
    with pytest.raises(BackboneError, match=f"{VIT}, not digits_vit"):
        create_backbone(checkpoint=file)


def test_differences_to_the_model_are_named(tmp_path):
    file = tmp_path / "w.pth"
    weights = small().state_dict()
    torch.save(weights, file)
    with pytest.raises(BackboneError, match=r"head\.bias is \(5,\) .*\(7,\)"):
        create_backbone(VIT, checkpoint=file, num_classes=7, **SMALL)
    torch.save({k: v for k, v in weights.items() if k != "cls_token"}, file)
    with pytest.raises(BackboneError, match=r"fit vit_tiny_patch16_224: cls_token is missing"):
        create_backbone(VIT, checkpoint=file, num_classes=5, **SMALL)
    torch.save(weights | {"extra": torch.zeros(1)}, file)
    with pytest.raises(BackboneError, match=r"224: extra is unknown to the model$"):
        create_backbone(VIT, checkpoint=file, num_classes=5, **SMALL)
    with pytest.raises(BackboneError, match=r"and \d+ more differences"):
        create_backbone(VIT, checkpoint=file, num_classes=5, **(SMALL | {"depth": 2}))


# --- weights of other image sizes and heads ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_position_embeddings_are_resampled_as_timm_does(tmp_path, dtype):
    file = tmp_path / "w.pth"
    larger = small(img_size=48).to(dtype).state_dict()
    torch.save(larger, file)
    ours = create_backbone(VIT, checkpoint=file, num_classes=5, **SMALL)
    timms = timm.create_model(
        VIT, pretrained=True, num_classes=5, **SMALL,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 5, "custom_load": False},
    )  # fmt: skip
    assert same(ours, timms.state_dict())
    assert ours.pos_embed.shape != larger["pos_embed"].shape
    assert ours.pos_embed.dtype == torch.float32


@pytest.mark.parametrize("had", [0, 7])
def test_a_head_that_a_file_lacks_is_begun_anew_only_where_it_is_trained(tmp_path, had):
    file = tmp_path / "w.pth"
    weights = small(seed=1, num_classes=had).state_dict()
    torch.save(weights, file)
    with pytest.raises(BackboneError, match=r"head.bias is .*trainers.backbone trains a head"):
        create_backbone(VIT, checkpoint=file, num_classes=5, **SMALL)
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match=r"w\.pth has no head for 5 classes: .* a random one"):
        model = create_backbone(VIT, checkpoint=file, num_classes=5, new_head=True, **SMALL)
    built = small(seed=2).state_dict()
    body = {key: t for key, t in weights.items() if not key.startswith("head")}
    assert same(model, body | {key: built[key] for key in ("head.weight", "head.bias")})
    without = create_backbone(VIT, checkpoint=file, num_classes=had, new_head=True, **SMALL)
    assert same(without, weights)


def test_a_new_head_excuses_no_other_difference(tmp_path):
    file = tmp_path / "w.pth"
    weights = small(num_classes=0).state_dict()
    for changed, message in (
        ({k: v for k, v in weights.items() if k != "cls_token"}, "224: cls_token is missing"),
        (weights | {"extra": torch.zeros(1)}, "224: extra is unknown to the model$"),
        (weights | {"head.extra": torch.zeros(1)}, "224: head.extra is unknown to the model$"),
    ):
        torch.save(changed, file)
        with pytest.raises(BackboneError, match=message):
            create_backbone(VIT, checkpoint=file, num_classes=5, new_head=True, **SMALL)
