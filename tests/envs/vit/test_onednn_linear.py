"""oneDNN's way through linear layers: the same numbers, and only where nobody could tell."""

import math

import pytest
import torch
from timm.layers import Mlp
from torch.utils.flop_counter import FlopCounterMode

from prunevit.envs.vit import onednn_linear
from prunevit.envs.vit.onednn_linear import linear, mlp, uses_onednn
from prunevit.envs.vit.staged_vit import StagedViT

pytestmark = pytest.mark.skipif(
    not onednn_linear.HAS_ONEDNN, reason="torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch):
    monkeypatch.setattr(onednn_linear, "MIN_MACS", 0)


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was called."""
    seen = []
    original = onednn_linear._onednn

    def counted(*arguments):
        seen.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(onednn_linear, "_onednn", counted)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (16, 12), (1, 12), (256, 12)])
def test_the_product_is_the_layers(bias, shape, calls):
    layer = torch.nn.Linear(12, 7, bias=bias)
    x = torch.randn(shape)
    torch.testing.assert_close(linear(layer, x), layer(x))
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "act",
    [
        torch.nn.GELU,
        lambda: torch.nn.GELU(approximate="tanh"),
        torch.nn.SiLU,
    ],
)
@pytest.mark.parametrize("norm", [None, torch.nn.LayerNorm])
def test_an_mlp_is_timms(act, norm, calls):
    layer = Mlp(12, 20, act_layer=act, norm_layer=norm, drop=0.5).eval()
    x = 3 * torch.randn(9, 12)
    torch.testing.assert_close(mlp(layer, x), layer(x), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


def test_gradients_take_the_layers_own_way(calls):
    layer = torch.nn.Linear(4, 3)
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        x = torch.randn(5, 4, requires_grad=True)
        linear(layer, x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 4))
    linear(layer.requires_grad_(True), torch.randn(5, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert not calls


@torch.no_grad()
def test_what_somebody_put_in_the_way_runs(calls):
    """Hooks, layers of another class, autocast, dropout in training."""
    x = torch.randn(5, 4)
    hooked = torch.nn.Linear(4, 3)
    hooked.register_forward_hook(lambda layer, given, out: out + 1)
    torch.testing.assert_close(linear(hooked, x), x @ hooked.weight.T + hooked.bias + 1)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    other = Doubled(4, 3)
    torch.testing.assert_close(linear(other, x), other(x))
    plain = torch.nn.Linear(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(plain, x).dtype == torch.bfloat16
    assert linear(plain.double(), x.double()).dtype == torch.float64
    training = Mlp(4, 64, drop=0.5).train()
    assert not torch.equal(mlp(training, x), mlp(training, x))
    assert not calls


@torch.no_grad()
def test_small_products_and_many_rows_are_not_worth_it(monkeypatch):
    layer = torch.nn.Linear(4, 3)
    assert uses_onednn(layer, torch.randn(256, 4))
    assert not uses_onednn(layer, torch.randn(257, 4))
    assert not uses_onednn(layer, torch.randn(0, 4))
    monkeypatch.setattr(onednn_linear, "MIN_MACS", 5 * 4 * 3)
    assert uses_onednn(layer, torch.randn(5, 4))
    assert not uses_onednn(layer, torch.randn(4, 4))


@torch.no_grad()
def test_kernels_are_built_for_few_numbers_of_rows(calls):
    """Each costs memory and time, and pruning leaves any number."""
    layers = Mlp(4, 64).eval(), torch.nn.Linear(4, 3)
    for rows in range(1, 257):
        x = torch.randn(rows, 4)
        assert mlp(layers[0], x).shape == (rows, 4)
        assert linear(layers[1], x).shape == (rows, 3)
    assert len(calls) == 3 * 256
    assert {len(rows) for _, rows, *_ in calls} == set(
        range(onednn_linear.ROW_STEP, 257, onednn_linear.ROW_STEP)
    )


@torch.no_grad()
def test_those_who_count_operations_find_them(calls):
    layer = torch.nn.Linear(12, 7)
    for shape in ((5, 12), (2, 3, 12)):
        with FlopCounterMode(display=False) as counter:
            linear(layer, torch.randn(shape))
        padded = math.ceil(math.prod(shape[:-1]) / onednn_linear.ROW_STEP) * onednn_linear.ROW_STEP
        assert counter.get_total_flops() == 2 * padded * 12 * 7
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_dinov2",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "vit_base_patch16_siglip_224",
    ],
)
@pytest.mark.parametrize("images", [1, 3])
def test_pruned_models_give_the_logits_of_masked_ones(
    name, images, calls, keeps, make_vit, monkeypatch
):
    model = make_vit(name)
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    staged = StagedViT(model, (1, 3))
    logits = {}
    for execution in ("packed", "masked"):
        monkeypatch.setattr(onednn_linear, "HAS_ONEDNN", execution == "packed")
        tokens = staged.begin(x, execution=execution)
        for stage in range(2):
            tokens = staged.advance(tokens, keeps(3, 2, 16)[stage, :images], stage)
        logits[execution] = staged.finish(tokens)
    torch.testing.assert_close(logits["packed"], logits["masked"], rtol=1e-4, atol=1e-4)
    assert len(calls) >= 4  # once a block at least


@torch.no_grad()
def test_hooks_of_an_mlp_see_few_rows_too(calls):
    layer = Mlp(12, 20).eval()
    layer.register_forward_hook(lambda layer, given, out: out + 1)
    x = torch.randn(5, 12)
    torch.testing.assert_close(mlp(layer, x), layer.fc2(layer.act(layer.fc1(x))) + 1)
    assert not calls
