import pytest

BACKBONES = {
    "class token": {},
    "layer scale": {"init_values": 0.1},
    "query and key norms": {"qk_norm": True},
    "registers": {"reg_tokens": 2},
}


@pytest.fixture(params=BACKBONES.values(), ids=BACKBONES)
def kwargs(request):
    """Arguments of each backbone that rivals have to run on."""
    return request.param


@pytest.fixture
def images(some_images):
    return some_images.load(range(3))[0]


@pytest.fixture
def sharp_vit(make_vit):
    """Models whose images differ in how many patches have most of the attention."""

    def make(**kwargs):
        model = make_vit(**kwargs).requires_grad_(False)
        for block in model.blocks:
            block.attn.qkv.weight *= 3
            if kwargs.get("qk_norm"):
                block.attn.q_norm.weight *= 20
        return model

    return make
