"""A pruned model of transformers takes its place: the same calls, the same outputs."""

import pytest
import torch
from torch import nn

from prunevit.agents import KeepAll, PrunedTransformersViT, PrunedViT, TopK, prune
from prunevit.agents.export import export_onnx
from prunevit.agents.onnx_graphs import ExportError, OneImage
from prunevit.agents.policies.serialization import SavedModelError
from prunevit.envs.vit.from_transformers import from_transformers
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

pytestmark = pytest.mark.integration("transformers")
transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8, "intermediate_size": 64, "num_labels": 5, "projection_dim": 7,
}  # fmt: skip
CLASSES = [
    "ViTModel", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassificationWithTeacher",
    "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "CLIPVisionModel",
    "CLIPVisionModelWithProjection", "SiglipVisionModel",
]  # fmt: skip
each_class = pytest.mark.parametrize("name", CLASSES)
PATCHES, WIDTH, STAGES = 16, 48, (1, 2)
KEPT = (9, 4)


def build(name="ViTModel", **settings):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return randomise(cls(cls.config_class(**{**TINY, **settings})).eval())


def randomise(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def pruned(model):
    return prune(model, TopK(KEPT, "attention"), STAGES)


def images(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@each_class
@torch.no_grad()
def test_nothing_pruned_gives_their_outputs(name):
    model = build(name)
    ours, theirs = prune(model, KeepAll(), STAGES)(images()), model(images())
    # DeiT's classifier with a teacher has the outputs of both heads too
    assert "Teacher" in name or type(ours) is type(theirs)
    assert set(ours) == set(theirs) - {"cls_logits", "distillation_logits"}
    for key, value in ours.items():
        close(value, theirs[key])


@each_class
@torch.no_grad()
def test_pruning_drops_patches_and_keeps_their_outputs_keys(name):
    model = pruned(build(name))
    assert isinstance(model, PrunedTransformersViT)
    found, traced = model(images()), model.trace(images())
    assert traced.alive.sum(2).tolist() == [list(KEPT)] * 2
    if "last_hidden_state" in found:
        last = found.last_hidden_state
        prefix = last.shape[1] - PATCHES
        alive = last.ne(0).any(2)
        assert alive[:, :prefix].all()
        assert torch.equal(alive[:, prefix:], traced.alive[:, -1])
    else:
        close(found.logits, traced.logits)


@torch.no_grad()
def test_it_takes_the_place_of_a_part_of_a_larger_model():
    classifier = build("ViTForImageClassification")
    expected = pruned(classifier)(images()).logits
    classifier.vit = pruned(classifier.vit)
    close(classifier(images()).logits, expected)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@torch.no_grad()
def test_it_takes_the_place_of_the_vision_tower(kind):
    vision = {key: value for key, value in TINY.items() if key != "num_labels"}
    text = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 9, "projection_size": 48,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, projection_dim=6
    )
    model = randomise(getattr(transformers, f"{kind}Model")(config).eval())
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": images()}
    dense = model(**inputs).logits_per_image
    tower = model.vision_model
    model.vision_model = prune(tower, KeepAll(), STAGES)
    close(model(**inputs).logits_per_image, dense)
    model.vision_model = pruned(tower)
    assert (model(**inputs).logits_per_image - dense).abs().max() > 1e-3


@torch.no_grad()
def test_a_tuple_is_returned_on_demand():
    model = build()
    ours, theirs = pruned(model)(images(), return_dict=False), model(images(), return_dict=False)
    assert isinstance(ours, tuple)
    assert [part.shape for part in ours] == [part.shape for part in theirs]


def test_what_it_doesnt_have_is_refused():
    model = pruned(build())
    model(images(), output_attentions=False, output_hidden_states=None, bool_masked_pos=None)
    with pytest.raises(ValueError, match="doesn't support output_attentions"):
        model(images(), output_attentions=True)
    with pytest.raises(ValueError, match="doesn't support labels"):
        model(images(), labels=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="images of shape"):
        model(torch.zeros(1, 3, 40, 40), interpolate_pos_encoding=True)


@torch.no_grad()
def test_a_pooling_layer_is_a_copy_and_left_out_where_theirs_has_none():
    model = build()
    ours = pruned(model)
    ours.pooler.dense.weight.zero_()
    assert model.pooler.dense.weight.any()
    cls = transformers.ViTModel
    without = pruned(cls(cls.config_class(**TINY), add_pooling_layer=False))
    assert without(images()).pooler_output is None
    head = build("SiglipVisionModel", vision_use_head=False)
    assert pruned(head)(images()).pooler_output is None


@torch.no_grad()
def test_images_of_another_size():
    model = build("Dinov2Model")
    larger = torch.randn(2, 3, 48, 48)
    close(
        prune(model, KeepAll(), STAGES, img_size=48)(larger).last_hidden_state,
        model(larger).last_hidden_state,
    )
    with pytest.raises(ValueError, match="img_size is for models of transformers"):
        prune(from_transformers(model), KeepAll(), STAGES, img_size=48)


@torch.no_grad()
def test_half_precision_and_training_mode():
    model = pruned(build().bfloat16())
    assert model.dtype == torch.bfloat16
    assert model(images()).last_hidden_state.dtype == torch.bfloat16
    trained = pruned(build())
    expected = trained(images()).last_hidden_state
    close(trained.train()(images()).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2WithRegistersModel", "CLIPVisionModel"])
@torch.no_grad()
def test_it_is_saved_as_timms(name, tmp_path):
    model = pruned(build(name))
    with pytest.raises(SavedModelError, match=r"save model\.as_timm\(\)"):
        model.save_pretrained(tmp_path)
    timms = model.as_timm()
    timms.save_pretrained(tmp_path)
    again = PrunedViT.from_pretrained(tmp_path)
    assert again.backbone.model.norm.eps == model.config.layer_norm_eps
    assert torch.equal(again(images()), timms(images()))


@torch.no_grad()
def test_a_policy_of_a_file(tmp_path):
    model, file = build(), tmp_path / "policy.safetensors"
    wanted = pruned(model)
    wanted.save_policy(file)
    found = PrunedTransformersViT.from_policy(model, file)
    assert torch.equal(found(images()).last_hidden_state, wanted(images()).last_hidden_state)
    with pytest.raises(SavedModelError, match="holds a policy for vit_base_patch16_224"):
        PrunedTransformersViT.from_policy(build("Dinov2Model"), file)


def test_it_is_exported_as_timms(tmp_path):
    model = pruned(build())
    with pytest.raises(ExportError, match=r"export model\.as_timm\(\)"):
        export_onnx(model, tmp_path / "model.onnx")
    OneImage(model.as_timm())


def test_other_models_of_transformers_are_refused():
    config = transformers.BeitConfig(**TINY)
    with pytest.raises(UnsupportedBackboneError, match="BeitModel is no model of transformers"):
        pruned(transformers.BeitModel(config))
