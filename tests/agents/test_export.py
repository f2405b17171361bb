"""ONNX: onnxruntime's logits and survivors are ours, however many tokens and images there are."""

import contextlib
import io
import json
import logging
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from prunevit.agents import (
    AttentionThreshold,
    KeepAll,
    PrunedViT,
    TopK,
    export,
    prune,
)
from prunevit.agents.export import ExportConfig, compare_onnx, export_onnx, main
from prunevit.agents.onnx_graphs import ExportError, ImageBatch, OneImage
from prunevit.agents.onnx_int8 import quantize_onnx
from prunevit.agents.policies.calibration import Calibration
from prunevit.agents.policies.serialization import dynamic_vit_policy, learned_policy
from prunevit.envs.data_config import model_data_config
from prunevit.envs.fields import DEFAULT_FIELDS
from prunevit.envs.vit.staged_vit import StagedViT

STAGES, INSIDE = (1, 3), (0, 1)


def pruned(vit, prior=True, fields=DEFAULT_FIELDS, heads=0, stages=STAGES, alpha=None, **options):
    """Its decisions differ from image to image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        policy = learned_policy(StagedViT(vit, stages), list(fields), [8], prior, alpha, heads)
        for layer in (policy.actor.net[1], policy.actor.net[-1]):
            torch.nn.init.normal_(layer.weight)
        if heads:
            torch.nn.init.normal_(policy.actor.among_agents.output.weight)
    policy.actor.keep_bias.data.fill_(-0.1)
    return prune(vit, policy, stages, **options)


def dithering(vit):
    policy = pruned(vit).policy
    policy.dither = True
    return policy


def dynamic_vit(vit, dither):
    policy = dynamic_vit_policy(StagedViT(vit, INSIDE), keep=0.6, hidden=8)
    policy.dither = dither
    return policy


POLICIES = {
    "keep-all": lambda vit: KeepAll(),
    "top-k by attention": lambda vit: TopK((9, 4), "attention"),
    "top-k by norm": lambda vit: TopK((0.6, 0), "norm"),
    "top-k by brightness": lambda vit: TopK((9, 4), "brightness"),
    "threshold": lambda vit: AttentionThreshold((0.9, 0.9)),
    "threshold with dither": lambda vit: AttentionThreshold((0.5, 0.9), dither=1.0),
    "learned with dither": dithering,
    "DynamicViT's": lambda vit: dynamic_vit(vit, dither=False),
    "DynamicViT's with dither": lambda vit: dynamic_vit(vit, dither=True),
}


# how a backbone may end, and how it may tell positions
BACKBONES = {
    "avg": {"global_pool": "avg"},
    "avg without a class token": {"global_pool": "avg", "class_token": False},
    "avgmax": {"global_pool": "avgmax"},
    "map": {"global_pool": "map", "class_token": False},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "class embedding": {"num_classes": 0},
    "pooled embedding": {"num_classes": 0, "global_pool": "avg", "reg_tokens": 2},
    "eva02": {"name": "eva02_tiny_patch14_224"},
    "dinov3": {"name": "vit_small_patch16_dinov3"},
    "rope mixed": {"name": "vit_small_patch16_rope_mixed_224"},
}
HEADS = {"max": {"global_pool": "max"}, "prr": {"global_pool": "prr"}}


def check_graphs(model, images):
    """PyTorch's forms for one image and for many give what the pruned ViT gives."""
    expected, survivors = model(images, return_keep=True)
    merges = model.backbone.on_prune == "merge"
    one, many = (ImageBatch if merges else OneImage)(model).eval(), ImageBatch(model).eval()
    ones = [one(image[None]) for image in images]
    for logits, kept in (
        many(images),
        many(images[:1]),
        [torch.cat(parts) for parts in zip(*ones, strict=True)],
    ):
        torch.testing.assert_close(logits, expected[: len(logits)], rtol=0, atol=1e-5)
        assert torch.equal(kept, survivors[: len(kept)])


def check_onnx(model, images, file, batch):
    """So does onnxruntime."""
    import onnxruntime as runtime

    export_onnx(model, file, batch=batch)
    session = runtime.InferenceSession(file)
    expected, survivors = model(images, return_keep=True)
    for size in (1,) if batch == "one" else (len(images), 1):
        found = [session.run(None, {"image": some.numpy()}) for some in images.split(size)]
        logits, kept = (
            torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True)
        )
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(kept, survivors)


@pytest.fixture(autouse=True, scope="module")
def untold():
    """pytest listens to all loggers, and torch would write each step of a trace down for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
        yield


@pytest.fixture
def images(make_images):
    return make_images(12).images


@pytest.mark.parametrize(
    ("kwargs", "heads"), [({}, 0), ({"reg_tokens": 2}, 0), ({"init_values": 0.1}, 0), ({}, 2)]
)
@torch.no_grad()
def test_graphs_give_what_the_pruned_vit_gives(make_vit, images, kwargs, heads):
    check_graphs(pruned(make_vit(**kwargs), heads=heads), images)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_other_policies_decide_in_graphs_as_elsewhere(vit, images, name):
    check_graphs(prune(vit, POLICIES[name](vit), STAGES), images)


@torch.no_grad()
def test_graphs_prune_inside_of_blocks(vit, images):
    model = pruned(vit, stages=INSIDE, prune_at="mlp")
    assert len({int(kept.sum()) for kept in model(images, return_keep=True)[1]}) > 3
    check_graphs(model, images)


@pytest.mark.parametrize("name", ["class embedding", "pooled embedding", "rope mixed", "map",
                                  "avgmax", *HEADS])  # fmt: skip
@pytest.mark.parametrize("prune_at", ["mlp", "block"])
@torch.no_grad()
def test_graphs_merge(make_vit, images, name, prune_at):
    vit, fields = make_vit(**(BACKBONES | HEADS)[name]), (*DEFAULT_FIELDS, "redundancy")
    stages = INSIDE if prune_at == "mlp" else STAGES
    model = pruned(vit, fields=fields, stages=stages, prune_at=prune_at, on_prune="merge")
    assert 0 < model(images, return_keep=True)[1].float().mean() < 1
    check_graphs(model, images)
    dropping = pruned(vit, fields=fields, stages=stages, prune_at=prune_at)
    assert (model(images) - dropping(images)).abs().amax() > 1e-3


@torch.no_grad()
def test_a_graph_merges_into_nothing_where_no_patch_is_left(vit, images):
    model = prune(vit, TopK((9, 0), "norm"), STAGES, on_prune="merge")
    check_graphs(model, images)


@pytest.mark.parametrize("name", [*BACKBONES, *HEADS])
@torch.no_grad()
def test_graphs_of_other_backbones(make_vit, images, name):
    check_graphs(pruned(make_vit(**(BACKBONES | HEADS)[name])), images)


def pruned_by_alpha(vit, **kwargs):
    model = pruned(vit, fields=(*DEFAULT_FIELDS, "alpha"), alpha=0.2, **kwargs)
    model.policy.actor.alpha_weight.data.fill_(-0.3)
    return model


@torch.no_grad()
def test_graphs_at_other_alphas(vit, images):
    model = pruned_by_alpha(vit)
    check_graphs(model, images)
    one, many = OneImage(model).eval(), ImageBatch(model).eval()
    alphas = torch.tensor([0.01, 1.0]).repeat(6)
    ones = [one(image[None], alpha[None])[1] for image, alpha in zip(images, alphas, strict=True)]
    kept = many(images, alphas)[1]
    assert torch.equal(torch.cat(ones), kept)
    for i, alpha in enumerate((0.01, 1.0)):
        model.policy.alpha = alpha
        assert torch.equal(kept[i::2], model(images[i::2], return_keep=True)[1])


@pytest.mark.integration("onnx")
@pytest.mark.parametrize("batch", ["one", "any"])
@torch.no_grad()
def test_alpha_is_an_input_that_may_be_left_out(make_vit, images, tmp_path, batch):
    import onnxruntime as runtime

    model = pruned_by_alpha(make_vit(depth=2), stages=INSIDE, prune_at="mlp")
    check_onnx(model, images, tmp_path / "pruned.onnx", batch)
    session = runtime.InferenceSession(tmp_path / "pruned.onnx")
    assert [each.name for each in session.get_inputs()] == ["image"]
    counts, size = [], 1 if batch == "one" else len(images)
    for alpha in (0.01, 0.2, 1.0):
        model.policy.alpha = alpha
        survivors = model(images, return_keep=True)[1]
        counts.append(int(survivors.sum()))
        for some, expected in zip(images.split(size), survivors.split(size), strict=True):
            for given in {1, size}:
                feeds = {"image": some.numpy(), "alpha": np.float32([alpha] * given)}
                assert np.array_equal(session.run(["keep"], feeds)[0], expected)
    assert counts[0] > counts[1] > counts[2]


@torch.no_grad()
def test_a_head_that_pools_has_a_patch_to_read(make_vit, images):
    model = prune(make_vit(global_pool="avg"), TopK((4, 0), "norm"), STAGES)
    assert model(images, return_keep=True)[1].sum(2)[:, 1].eq(1).all()
    check_graphs(model, images)


@torch.no_grad()
def test_a_head_that_looks_at_all_tokens_does_so(make_vit, images):
    vit = make_vit()
    vit.norm.register_forward_hook(lambda _, __, out: out - out.mean(1, keepdim=True))
    model = pruned(vit)
    one = OneImage(model).eval()
    logits = torch.cat([one(image[None])[0] for image in images])
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-5)
    with pytest.raises(ExportError, match="would see the padding of a batch: export the model for"):
        ImageBatch(model)


# each policy and each backbone once, pruned inside of two blocks: exports take seconds
EXPORTED = [
    ("one", "eva02", "threshold with dither", {}),
    ("one", "avg without a class token", "top-k by norm", {}),
    ("one", "map", None, {"heads": 2}),
    ("any", "avg", "top-k by attention", {}),
    ("any", "avgmax", "top-k by brightness", {}),
    ("any", "map", "threshold", {}),
    ("any", "class embedding", "DynamicViT's", {}),
    ("any", "pooled embedding", None, {"heads": 2}),
    ("any", "dinov3", "DynamicViT's with dither", {}),
    ("any", "rope mixed", None, {"fields": (*DEFAULT_FIELDS, "redundancy")}),
    ("one", "class embedding", None, {"on_prune": "merge"}),
    ("any", "avg", None, {"on_prune": "merge", "fields": (*DEFAULT_FIELDS, "redundancy")}),
]


@pytest.mark.integration("onnx")
@pytest.mark.parametrize(("batch", "backbone", "name", "kwargs"), EXPORTED)
@torch.no_grad()
def test_onnxruntime_gives_the_same(make_vit, images, tmp_path, batch, backbone, name, kwargs):
    vit = make_vit(**(BACKBONES[backbone] | {"depth": 2}))
    if name is None:
        model = pruned(vit, stages=INSIDE, prune_at="mlp", **kwargs)
        assert len({int(kept.sum()) for kept in model(images, return_keep=True)[1]}) > 3
    else:
        model = prune(vit, POLICIES[name](vit), INSIDE, prune_at="mlp")
    check_onnx(model, images, tmp_path / "pruned.onnx", batch)


@pytest.mark.integration("onnx")
@torch.no_grad()
def test_pruned_between_blocks(vit, images, tmp_path):
    check_onnx(pruned(vit), images, tmp_path / "pruned.onnx", "any")


def test_what_has_no_onnx_form_is_refused(vit, make_vit, tmp_path):
    for policy, stages, message in [
        (TopK((9, 4), "random"), STAGES, "top-k by random scores can't be exported"),
        (TopK((9, 4)), (0, 2), "top-k by attention before block 0 can't be exported"),
    ]:
        with pytest.raises(ExportError, match=message):
            export_onnx(prune(vit, policy, stages), tmp_path / "pruned.onnx")
    with pytest.raises(ExportError, match="a VisionTransformer can't be exported: only a PrunedV"):
        export_onnx(vit, tmp_path / "pruned.onnx")
    with pytest.raises(ExportError, match="a backbone without pooling"):
        export_onnx(pruned(make_vit(global_pool="")), tmp_path / "pruned.onnx")
    with pytest.raises(ExportError, match="is exported as an ImageBatch, of one image too"):
        OneImage(pruned(vit, on_prune="merge"))
    watched = make_vit()
    watched.norm.register_forward_hook(lambda _, __, out: out)
    with pytest.raises(ExportError, match="can't be exported with a model that merges"):
        export_onnx(pruned(watched, on_prune="merge"), tmp_path / "pruned.onnx")
    hooked, replaced = (pruned(vit) for _ in range(2))
    hooked.policy.register_forward_hook(lambda _, __, keep: ~keep)
    replaced.policy.forward = lambda view: view.alive
    for model, message in [
        (hooked, "it has hooks of its own"),
        (replaced, "it has forward of its own"),
    ]:
        with pytest.raises(ExportError, match=message):
            export_onnx(model, tmp_path / "pruned.onnx")
    assert not list(tmp_path.iterdir())


def looks_at_a_value(view):
    return view.alive if view.token.sum() > 0 else ~view.alive


def leaves_torch(view):
    return torch.from_numpy(view.scatter(view.token[:, 0]).numpy() > 0)


def asks_for_what_onnx_lacks(view):
    norm = view.scatter(view.token.norm(dim=1))
    return torch.searchsorted(norm, norm) < 5


@pytest.mark.integration("onnx")
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (looks_at_a_value, "view.token.sum.. > 0 .*test_export.py, line .*: Could not guard on"),
        (leaves_torch, "numpy.. > 0.*: .numpy.. is not supported"),
        (asks_for_what_onnx_lacks, "ONNX has no operation for torch's aten.searchsorted"),
    ],
)
def test_the_operation_that_cannot_be_traced_is_named(make_vit, tmp_path, policy, message):
    model = prune(make_vit(depth=1), policy, (0,), prune_at="mlp")
    with pytest.raises(ExportError, match=f"the model can't be traced: .*{message}"):
        export_onnx(model, tmp_path / "pruned.onnx")
    assert not list(tmp_path.iterdir())


class Alternating:
    """Its first decision is the only one that a graph would know."""

    needs_attention = False

    def __init__(self):
        self.calls = 0

    def __call__(self, view):
        self.calls += 1
        return view.alive & (torch.arange(view.alive.shape[1]) % 2 == self.calls % 2)


@pytest.mark.integration("onnx")
def test_a_policy_of_ones_own_is_checked(make_vit, tmp_path):
    model = prune(make_vit(depth=1), Alternating(), (0,), prune_at="mlp")
    with pytest.raises(ExportError, match="onnxruntime differs from PyTorch: it agrees"):
        export_onnx(model, tmp_path / "pruned.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.integration("onnx")
def test_a_runtime_that_is_too_old_is_refused(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.13.1")
    with pytest.raises(ExportError, match=r"onnxruntime 1.13.1 is too old .* .opset 18.: install"):
        export_onnx(pruned(vit), tmp_path / "pruned.onnx")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.RandomState(0)
    for i in range(4):
        pixels = noise.randint(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def saved(make_vit, tmp_path_factory):
    folder, vit = tmp_path_factory.mktemp("models") / "saved", make_vit(depth=2)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "label_names": list("abcde")}
    fields = (*DEFAULT_FIELDS, "alpha")
    shape = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}  # not seen on a model
    options = {"stages": INSIDE, "prune_at": "mlp", "model_kwargs": shape}
    model = pruned(vit, fields=fields, alpha=0.2, **options)
    model.policy.calibration = Calibration("alpha", (0.1, 0.4), (0.9, 0.5), False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(saved):
    """What the command wrote after a check on the package's photographs, and what it said."""
    file, said = saved.parent / "model.onnx", io.StringIO()
    with contextlib.redirect_stdout(said):
        main([str(saved), "--out", str(file)])
    return file, said.getvalue()


@pytest.mark.integration("onnx")
def test_the_command_writes_what_it_checked_with_metadata(saved, exported):
    import onnxruntime as runtime

    file, said = exported
    assert said.startswith(f"exported to {file}; it agrees with PyTorch on 2 images: 100.00% of ")
    session = runtime.InferenceSession(file)
    metadata = session.get_modelmeta().custom_metadata_map
    told = {name: json.loads(value) for name, value in metadata.items()}
    config = model_data_config(PrunedViT.from_pretrained(saved).backbone.model)
    prepared = told.pop("preprocessing")
    assert prepared["input_size"] == [3, 32, 32]
    assert prepared["mean"] == list(config["mean"])
    assert prepared["std"] == list(config["std"])
    assert prepared["interpolation"] == config["interpolation"]
    assert told == {
        "class_names": list("abcde"),
        "compute": pytest.approx(0.7),
        "calibration": {"alpha": [0.1, 0.4], "compute": [0.9, 0.5]},
    }
    assert [output.name for output in session.get_outputs()] == ["logits", "keep"]


@pytest.mark.integration("onnx")
@pytest.mark.parametrize("int8", ["dynamic", "static"])
def test_int8_quantises_the_vit_and_not_its_policy(saved, exported, images, tmp_path, int8):
    import onnx

    file = tmp_path / "int8.onnx"
    quantize_onnx(exported[0], file, int8, images)
    graph = onnx.load(file).graph
    kinds = Counter(node.op_type for node in graph.node)
    # four linear layers in each of two blocks, and the head
    if int8 == "dynamic":
        assert kinds["MatMulInteger"] == 9
    else:
        assert kinds["DequantizeLinear"] >= 2 * 9
    weights = {each.name for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT}
    linear = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    # two of the policy at each of two stages
    assert sum(not weights.isdisjoint(node.input) for node in linear) == 4
    found = compare_onnx(PrunedViT.from_pretrained(saved), file, images, torch.arange(12) % 5)
    assert 0 < found.error < 1
    assert found.decisions > 0.9
    assert found.classes > 0.7
    assert len(found.accuracy) == 2


@pytest.mark.integration("onnx")
def test_the_command_says_how_far_int8_agrees(saved, photos, tmp_path, capsys):
    file = tmp_path / "model.onnx"
    dataset = f"photos:{photos}"
    options = ["--int8", "static", "--calibrate", dataset, "--check", dataset, "--batch", "any"]
    main([str(saved), "--out", str(file), *options, "--check-images", "3"])
    said = capsys.readouterr().out
    assert said.startswith(f"exported to {file}; in static int8 it agrees with PyTorch on 3 images")
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.integration("onnx")
def test_a_graph_that_gives_something_else_is_not_written(
    saved, exported, images, tmp_path, monkeypatch
):
    class Program:
        model = SimpleNamespace(metadata_props={})

        def save(self, file):
            shutil.copy(exported[0], file)

    monkeypatch.setattr(export, "_trace", lambda graph, batch: Program())
    model = PrunedViT.from_pretrained(saved)
    export_onnx(model, tmp_path / "model.onnx", images)
    (tmp_path / "model.onnx").unlink()
    model.policy.alpha = 0.001
    with pytest.raises(ExportError, match="onnxruntime differs from PyTorch: it agrees with"):
        export_onnx(model, tmp_path / "model.onnx", images)
    assert not list(tmp_path.iterdir())


@pytest.mark.integration("onnx")
def test_nothing_to_quantise(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("image", "out")]
    node = helper.make_node("Relu", ["image"], ["out"])
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", *[[v] for v in values])), tmp_path / "m"
    )
    with pytest.raises(ExportError, match="has no linear layers, so int8 has nothing to quantise"):
        quantize_onnx(tmp_path / "m", tmp_path / "int8", "dynamic")
    with pytest.raises(ExportError, match="needs images to calibrate on"):
        quantize_onnx(tmp_path / "m", tmp_path / "int8", "static", torch.zeros(0, 3, 32, 32))
    assert not (tmp_path / "int8").exists()


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
    with pytest.raises(ValueError, match="int8='static' needs images to calibrate on: --calib"):
        ExportConfig(tmp_path, tmp_path / "model.onnx", int8="static")
    with pytest.raises(ValueError, match="only --int8 static is calibrated"):
        ExportConfig(tmp_path, tmp_path / "model.onnx", int8="dynamic", calibrate="photos:p")


def test_a_folder_without_images_ends_in_one_line(saved, tmp_path):
    options = ["--int8", "static", "--calibrate", f"photos:{tmp_path}"]
    with pytest.raises(SystemExit, match=r"error: the folder .* holds no images"):
        main([str(saved), "--out", str(tmp_path / "model.onnx"), *options])
    assert not list(tmp_path.iterdir())
