"""ONNX for one image: onnxruntime's logits and survivors are ours, however many tokens survive."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from prunevit.agents import (
    AttentionThreshold,
    KeepAll,
    LearnedPolicy,
    PrunedViT,
    TopK,
    export,
    prune,
)
from prunevit.agents.export import ExportConfig, ExportError, OneImage, export_onnx, main
from prunevit.agents.policies.serialization import dynamic_vit_policy, learned_policy
from prunevit.envs.data_config import model_data_config
from prunevit.envs.fields import DEFAULT_FIELDS
from prunevit.envs.vit.staged_vit import StagedViT

STAGES, INSIDE = (1, 3), (0, 2)


def pruned(
    vit, prior=True, fields=DEFAULT_FIELDS, heads=0, stages=STAGES, prune_at="block", alpha=None
):
    """Its decisions differ from image to image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        policy = learned_policy(StagedViT(vit, stages), list(fields), [8], prior, alpha, heads)
        for layer in (policy.actor.net[1], policy.actor.net[-1]):
            torch.nn.init.normal_(layer.weight)
        if heads:
            torch.nn.init.normal_(policy.actor.among_agents.output.weight)
    policy.actor.keep_bias.data.fill_(-0.1)
    return prune(vit, policy, stages, prune_at=prune_at)


def dynamic_vit(vit, dither):
    policy = dynamic_vit_policy(StagedViT(vit, STAGES), keep=0.6, hidden=8)
    policy.dither = dither
    return policy


POLICIES = {
    "keep-all": lambda vit: KeepAll(),
    "top-k by attention": lambda vit: TopK((9, 4), "attention"),
    "top-k by norm": lambda vit: TopK((0.6, 0), "norm"),
    "top-k by brightness": lambda vit: TopK((9, 4), "brightness"),
    "threshold": lambda vit: AttentionThreshold((0.9, 0.9)),
    "threshold with dither": lambda vit: AttentionThreshold((0.5, 0.9), dither=1.0),
    "DynamicViT's": lambda vit: dynamic_vit(vit, dither=False),
    "DynamicViT's with dither": lambda vit: dynamic_vit(vit, dither=True),
}


# how a backbone may end, and how it may tell positions
BACKBONES = {
    "avg": {"global_pool": "avg"},
    "avg without a class token": {"global_pool": "avg", "class_token": False},
    "avgmax": {"global_pool": "avgmax"},
    "map": {"global_pool": "map", "class_token": False},
    "class embedding": {"num_classes": 0},
    "pooled embedding": {"num_classes": 0, "global_pool": "avg", "reg_tokens": 2},
    "eva02": {"name": "eva02_tiny_patch14_224"},
    "dinov3": {"name": "vit_small_patch16_dinov3"},
    "rope mixed": {"name": "vit_small_patch16_rope_mixed_224"},
}


def check_one_image(model, images):
    """PyTorch's form for one image gives the logits and survivors of the pruned ViT."""
    one = OneImage(model).eval()
    for image in images:
        (logits, kept), (expected, survivors) = one(image[None]), model(image[None], True)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(kept, survivors)


def check_onnx(model, images, file):
    """So does onnxruntime."""
    import onnxruntime as runtime

    export_onnx(model, file)
    session = runtime.InferenceSession(file)
    for image in images:
        logits, kept = map(torch.from_numpy, session.run(None, {"image": image[None].numpy()}))
        expected, survivors = model(image[None], return_keep=True)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(kept, survivors)


@pytest.fixture
def images(make_images):
    return make_images(12).images


@pytest.mark.parametrize(
    ("kwargs", "heads"), [({}, 0), ({"reg_tokens": 2}, 0), ({"init_values": 0.1}, 0), ({}, 2)]
)
@torch.no_grad()
def test_one_image_is_what_the_pruned_vit_does(make_vit, images, kwargs, heads):
    check_one_image(pruned(make_vit(**kwargs), heads=heads), images)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_other_policies_decide_on_one_image_as_on_many(vit, images, name):
    check_one_image(prune(vit, POLICIES[name](vit), STAGES), images)


@torch.no_grad()
def test_one_image_is_pruned_inside_of_its_blocks(vit, images):
    model = pruned(vit, stages=INSIDE, prune_at="mlp")
    assert len({int(kept.sum()) for kept in model(images, return_keep=True)[1]}) > 3
    check_one_image(model, images)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_one_image_of_other_backbones(make_vit, images, name):
    check_one_image(pruned(make_vit(**BACKBONES[name])), images)


def pruned_by_alpha(vit):
    model = pruned(vit, fields=(*DEFAULT_FIELDS, "alpha"), alpha=0.2)
    model.policy.actor.alpha_weight.data.fill_(-0.01)
    return model


@torch.no_grad()
def test_one_image_at_another_alpha(vit, images):
    model = pruned_by_alpha(vit)
    one = OneImage(model).eval()
    check_one_image(model, images)
    for alpha in (0.01, 1.0):
        kept = [one(image[None], torch.tensor([alpha]))[1] for image in images]
        model.policy.alpha = alpha
        assert torch.equal(torch.cat(kept), model(images, return_keep=True)[1])


@pytest.mark.integration("onnx")
@torch.no_grad()
def test_alpha_is_an_input_that_may_be_left_out(vit, images, tmp_path):
    import onnxruntime as runtime

    model = pruned_by_alpha(vit)
    check_onnx(model, images, tmp_path / "pruned.onnx")
    session = runtime.InferenceSession(tmp_path / "pruned.onnx")
    assert [each.name for each in session.get_inputs()] == ["image"]
    counts = []
    for alpha in (0.01, 0.2, 1.0):
        model.policy.alpha = alpha
        survivors = model(images, return_keep=True)[1]
        counts.append(int(survivors.sum()))
        for image, expected in zip(images, survivors, strict=True):
            feeds = {"image": image[None].numpy(), "alpha": np.float32([alpha])}
            assert np.array_equal(session.run(["keep"], feeds)[0][0], expected)
    assert counts[0] > counts[1] > counts[2]


@torch.no_grad()
def test_a_head_that_pools_has_a_patch_to_read(make_vit, images):
    model = prune(make_vit(global_pool="avg"), TopK((4, 0), "norm"), STAGES)
    assert model(images, return_keep=True)[1].sum(2)[:, 1].eq(1).all()
    check_one_image(model, images)


@torch.no_grad()
def test_a_head_that_looks_at_all_tokens_does_so(make_vit, images):
    vit = make_vit()
    vit.norm.register_forward_hook(lambda _, __, out: out - out.mean(1, keepdim=True))
    check_one_image(pruned(vit), images)


@pytest.mark.integration("onnx")
@pytest.mark.parametrize(
    ("fields", "heads", "prune_at"),
    [
        (DEFAULT_FIELDS, 0, "block"),
        ((*DEFAULT_FIELDS, "redundancy"), 0, "block"),
        (DEFAULT_FIELDS, 2, "block"),
        (DEFAULT_FIELDS, 0, "mlp"),
    ],
)
@torch.no_grad()
def test_onnxruntime_gives_the_same_logits(vit, images, tmp_path, fields, heads, prune_at):
    stages = STAGES if prune_at == "block" else INSIDE
    model = pruned(vit, fields=fields, heads=heads, stages=stages, prune_at=prune_at)
    survivors = {int(kept.sum()) for kept in model(images, return_keep=True)[1]}
    assert len(survivors) > 3
    check_onnx(model, images, tmp_path / "pruned.onnx")


@pytest.mark.integration("onnx")
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_onnxruntime_gives_the_same_of_other_backbones(make_vit, images, tmp_path, name):
    check_onnx(pruned(make_vit(**BACKBONES[name])), images, tmp_path / "pruned.onnx")


@pytest.mark.integration("onnx")
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_onnxruntime_decides_as_other_policies_do(vit, images, tmp_path, name):
    check_onnx(prune(vit, POLICIES[name](vit), STAGES), images, tmp_path / "pruned.onnx")


def test_what_has_no_onnx_form_is_refused(vit, make_vit, tmp_path):
    for policy, stages, message in [
        (lambda view: view.alive, STAGES, "a function can't be exported: only KeepAll, TopK, "),
        (TopK((9, 4), "random"), STAGES, "top-k by random scores can't be exported"),
        (TopK((9, 4)), (0, 2), "top-k by attention before block 0 can't be exported"),
    ]:
        with pytest.raises(ExportError, match=message):
            export_onnx(prune(vit, policy, stages), tmp_path / "pruned.onnx")
    with pytest.raises(ExportError, match="a backbone without pooling"):
        export_onnx(pruned(make_vit(global_pool="")), tmp_path / "pruned.onnx")
    merging = pruned(vit)
    merging.backbone.on_prune = "merge"
    with pytest.raises(ExportError, match="merges what it prunes can't be exported"):
        export_onnx(merging, tmp_path / "pruned.onnx")
    hooked, replaced, other = (pruned(vit) for _ in range(3))
    hooked.policy.register_forward_hook(lambda _, __, keep: ~keep)
    replaced.policy.forward = lambda view: view.alive
    other.policy.__class__ = type("Other", (LearnedPolicy,), {})
    for model, message in [
        (hooked, "it has hooks of its own"),
        (replaced, "it has forward of its own"),
        (other, "a Other can't be exported"),
    ]:
        with pytest.raises(ExportError, match=message):
            export_onnx(model, tmp_path / "pruned.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.RandomState(0)
    for i in range(4):
        pixels = noise.randint(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def saved(make_vit, tmp_path):
    folder, vit = tmp_path / "saved", make_vit()
    vit.pretrained_cfg = {**vit.pretrained_cfg, "label_names": list("abcde")}
    prune(vit, TopK((9, 4), "norm"), STAGES).save_pretrained(folder)
    return folder


@pytest.mark.integration("onnx")
def test_the_command_writes_what_it_checked_with_preprocessing(saved, photos, tmp_path, capsys):
    import onnxruntime as runtime

    file = tmp_path / "model.onnx"
    main([str(saved), "--out", str(file), "--check", str(photos), "--check-images", "3"])
    assert capsys.readouterr().out == f"exported to {file}, checked on 3 photographs\n"
    session = runtime.InferenceSession(file)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list("abcde")
    told = json.loads(metadata["preprocessing"])
    config = model_data_config(PrunedViT.from_pretrained(saved).backbone.model)
    assert told["input_size"] == [3, 32, 32]
    assert told["mean"] == list(config["mean"])
    assert told["std"] == list(config["std"])
    assert told["interpolation"] == config["interpolation"]
    assert [output.name for output in session.get_outputs()] == ["logits", "keep"]


@pytest.mark.integration("onnx")
def test_a_graph_that_gives_something_else_is_not_written(vit, images, tmp_path, monkeypatch):
    model = prune(vit, TopK((9, 4), "norm"), STAGES)
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match="onnxruntime differs from PyTorch on image 0: by"):
        export_onnx(model, tmp_path / "model.onnx", images)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["none", "--out", "model.onnx"])
    assert ended.value.code == "error: none holds no finished run: config.json is missing"
    assert not list(tmp_path.iterdir())


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        ExportConfig(tmp_path, tmp_path / "none" / "model.onnx")
    with pytest.raises(ValueError, match="check_images=0 must be at least 1"):
        ExportConfig(tmp_path, tmp_path / "model.onnx", check_images=0)
