"""PEFT's adapters and torchao's quantised weights in a pruned ViT; both libraries are optional."""

import copy

import pytest
import torch

from prunevit.agents import KeepAll, TopK, prune
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

pytestmark = pytest.mark.stress
STAGES = (1, 3)
POLICY = TopK((9, 4))


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class TestLora:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    @pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
    def config(self, peft, request):
        return peft.LoraConfig(
            target_modules=["qkv", "proj", "fc1"], r=4, init_lora_weights=False,
            use_dora=request.param,
        )  # fmt: skip

    def test_adapters_act_and_learn(self, peft, config, make_vit, images):
        adapted = peft.get_peft_model(make_vit(), config)
        plain = prune(make_vit(), POLICY, STAGES)(images)
        model = prune(adapted.get_base_model(), POLICY, STAGES)
        merged = prune(copy.deepcopy(adapted).merge_and_unload(), POLICY, STAGES)
        torch.testing.assert_close(model(images), merged(images), rtol=1e-4, atol=1e-4)
        assert (model(images) - plain).abs().max() > 1e-3
        model(images).square().sum().backward()
        learned = {name for name, p in model.named_parameters() if p.grad is not None}
        assert learned
        assert all("lora" in name for name in learned)

    def test_a_pruned_model_is_adapted(self, peft, config, make_vit, images):
        pruned = prune(make_vit(), KeepAll(), STAGES)
        adapted = peft.get_peft_model(pruned, config)
        dense = adapted.get_base_model().backbone.model
        torch.testing.assert_close(adapted(images), dense(images), rtol=1e-4, atol=1e-4)

    def test_the_wrapper_is_refused(self, peft, config, make_vit):
        with pytest.raises(UnsupportedBackboneError, match=r"give model\.get_base_model\(\)"):
            prune(peft.get_peft_model(make_vit(), config), POLICY, STAGES)

    def test_adapters_of_transformers_are_to_be_merged_first(self, peft, images):
        transformers = pytest.importorskip("transformers")
        small = transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=32,
            patch_size=8, intermediate_size=64,
        )  # fmt: skip
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(transformers.ViTModel(small).eval(), config)
        with pytest.raises(UnsupportedBackboneError, match=r"give model\.get_base_model\(\)"):
            prune(adapted, KeepAll(), (1, 2))
        with pytest.raises(UnsupportedBackboneError, match=r"give peft_model\.merge_and_unload"):
            prune(adapted.get_base_model(), KeepAll(), (1, 2))
        merged = adapted.merge_and_unload()
        expected = merged(images).pooler_output
        found = prune(merged, KeepAll(), (1, 2))(images).pooler_output
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"],
)
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_torchaos_weights(make_vit, images, name, count):
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, name)
    images = images[:count]
    vit = make_vit()
    quantization.quantize_(vit, config())
    before = prune(vit, KeepAll(), STAGES)
    torch.testing.assert_close(before(images), vit(images), rtol=1e-3, atol=1e-3)
    after = prune(make_vit(), POLICY, STAGES)
    plain = after(images)
    quantization.quantize_(after, config())
    pruned = prune(vit, POLICY, STAGES)(images)
    torch.testing.assert_close(after(images), pruned, rtol=1e-3, atol=1e-3)
    assert not torch.equal(pruned, plain)
