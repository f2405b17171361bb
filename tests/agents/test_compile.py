"""``torch.compile(pruned)``: the blocks are compiled once, whatever number of tokens is left."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from prunevit.agents import KeepAll, prune
from prunevit.agents.policies.serialization import learned_policy
from prunevit.envs.fields import DEFAULT_FIELDS
from prunevit.envs.vit import execution
from prunevit.envs.vit.staged_vit import StagedViT

STAGES = (1, 2, 3)


class Draw:
    """Keeps another share of each image's patches at each call, at times none or all of them."""

    needs_attention, macs_per_decision = True, 0

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, view):
        share = torch.rand(len(view.alive), 1, generator=self.generator) * 1.5 - 0.25
        return torch.rand(view.alive.shape, generator=self.generator) < share


def batches(sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 32, 32, generator=generator) for size in sizes]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    limit = torch._dynamo.config.cache_size_limit
    yield
    torch._dynamo.config.cache_size_limit = limit
    torch.compiler.reset()


# one image, images of one length, images of several, in any order
SIZES = [1, 2, 3, 1, 5, 4, 12, 1, 1, 7]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
        pytest.param("eva02_tiny_patch14_224", {}, marks=pytest.mark.stress),
    ],
)
def test_new_numbers_of_tokens_compile_nothing_anew(make_vit, name, kwargs):
    """A block has graphs with and without padding, with and without attention observed, for a
    single row, and before sizes are known to vary. Embeddings have three.
    """
    torch._dynamo.config.cache_size_limit = 64  # beyond its limit, torch runs eagerly
    model, eager = (prune(make_vit(name, **kwargs), Draw(), STAGES) for _ in range(2))
    compiled = torch.compile(model, backend="eager")
    for images in batches(SIZES * 2):
        torch.testing.assert_close(compiled(images), eager(images), rtol=0, atol=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 11
    assert sum(counters["graph_break"].values()) <= 3  # around all but the blocks
    for images in batches(SIZES):
        compiled(images)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.stress
@torch.no_grad()
def test_chunks_compile_nothing_anew(vit, monkeypatch):
    """Neither their number nor their sizes are a compiler's business."""
    model = prune(vit, Draw(), STAGES)
    size = 2 * model.backbone.num_slots * model.backbone.width * 4
    monkeypatch.setattr(execution, "CHUNK_BYTES", size)
    compiled = torch.compile(model, dynamic=True, backend="eager")
    for images in batches([7, 8, 9, 10, 11, 12, 7, 13, 14, 15]):
        compiled(images)
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.stress
@torch.no_grad()
def test_compiled_is_what_eager_is(vit):
    backbone = StagedViT(vit, STAGES)
    policy = learned_policy(backbone, list(DEFAULT_FIELDS), [8], attention_prior=True)
    for decides in (policy, KeepAll()):
        model = prune(vit, decides, STAGES)
        compiled = torch.compile(model, dynamic=True, backend="eager")
        for images in batches([4, 7]):
            torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.stress), True])
def test_gradients_are_those_of_eager_blocks(make_vit, training):
    model, eager = (prune(make_vit(), Draw(), STAGES).train(training) for _ in range(2))
    compiled = torch.compile(model, backend="eager")
    for images in batches([4, 1]):
        for each in (compiled, eager):
            each(images).square().sum().backward()
    for ours, expected in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_with_hooks_run_as_timm_runs_them_and_are_not_compiled(make_vit):
    vit = make_vit()
    for block in vit.blocks:
        block.attn.register_forward_hook(lambda module, given, out: 2 * out)
    model, eager = (prune(vit, Draw(), STAGES) for _ in range(2))
    compiled = torch.compile(model, backend="eager")
    for images in batches(SIZES):
        torch.testing.assert_close(compiled(images), eager(images), rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.stress
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_inductors_code_gives_the_same_logits(vit):
    decided, again = Draw(), Draw()
    model, compiled = prune(vit, decided, STAGES), prune(vit, again, STAGES)
    compiled = torch.compile(compiled)
    for images in batches([4, 7, 1, 5, 1]):
        torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-4)
