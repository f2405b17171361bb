"""``torch.compile(pruned)``: the blocks are compiled once, not once a number of tokens."""

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
    """Keeps another share of each image's patches at each call."""

    needs_attention, macs_per_decision = True, 0

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, view):
        share = torch.rand(len(view.alive), 1, generator=self.generator)
        return torch.rand(view.alive.shape, generator=self.generator) < share


def batches(sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 32, 32, generator=generator) for size in sizes]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_new_numbers_of_tokens_compile_nothing_anew(vit):
    """A block has graphs with and without padding, with and without attention observed, and for
    images of one length: five, and the embedding's, are all that a hundred layouts ask for.
    """
    model = prune(vit, Draw(), STAGES)
    compiled = torch.compile(model, dynamic=True, backend="eager")
    for images in batches([4, 5, 6, 12, 16, 3, 7, 9, 12, 5, 16, 11] * 3):
        compiled(images)
    assert counters["stats"]["unique_graphs"] <= 6
    assert sum(counters["graph_break"].values()) <= 1  # around all but the blocks


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


@torch.no_grad()
def test_compiled_is_what_eager_is(vit):
    backbone = StagedViT(vit, STAGES)
    policy = learned_policy(backbone, list(DEFAULT_FIELDS), [8], with_prior=True)
    for decides in (policy, KeepAll()):
        model = prune(vit, decides, STAGES)
        compiled = torch.compile(model, dynamic=True, backend="eager")
        for images in batches([4, 7]):
            torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.stress
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_inductors_code_gives_the_same_logits(vit):
    decided, again = Draw(), Draw()
    model, compiled = prune(vit, decided, STAGES), prune(vit, again, STAGES)
    compiled = torch.compile(compiled, dynamic=True)
    for images in batches([4, 7, 5]):
        torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-4)
