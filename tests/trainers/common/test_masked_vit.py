"""DynamicViT's keep masks with their gradients, and its losses."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from prunevit.agents.policies.heuristics import TopK
from prunevit.agents.policies.serialization import dynamic_vit_policy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common import masked_vit
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.common.masked_vit import (
    Outputs,
    gumbel_keep,
    losses,
    mask_monitor,
    masked_attention,
    run_dense,
    run_masked,
)

BATCH, STAGES = 5, (1, 3)
BACKBONES = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "mean": {"class_token": False, "global_pool": "avg"},
    "rotary": {"name": "eva02_tiny_patch14_224", "num_heads": 2},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images(some_images):
    return some_images.load(range(BATCH))[0]


# --- masks ---


def test_keep_is_drawn_as_often_as_it_is_likely():
    logits = torch.tensor([[0.0, 0.0], [0.0, 2.0], [3.0, 0.0]]).repeat(20_000, 1)
    drawn = gumbel_keep(logits, seeded())
    assert set(drawn.unique().tolist()) == {0, 1}
    shares = drawn.view(-1, 3).mean(0)
    torch.testing.assert_close(shares, logits[:3].softmax(1)[:, 1], rtol=0, atol=0.01)
    assert torch.equal(drawn, gumbel_keep(logits, seeded()))
    assert not torch.equal(drawn, gumbel_keep(logits, seeded(1)))


def test_the_gradient_of_a_draw_is_that_of_the_softmax_behind_it():
    logits = torch.randn(50, 2, generator=seeded(), requires_grad=True)
    weight = torch.randn(50, generator=seeded(1))
    drawn = gumbel_keep(logits, seeded(2))
    (gradient,) = torch.autograd.grad((weight * drawn).sum(), logits)
    uniform = torch.rand(50, 2, generator=seeded(2))
    soft = F.softmax(logits - (-uniform.log()).log(), dim=-1)[:, 1]
    assert torch.equal(drawn > 0.5, soft > 0.5)
    (expected,) = torch.autograd.grad((weight * soft).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_attention_and_its_gradient_are_the_papers(monkeypatch):
    """exp(P) G / sum(exp(P) G), pruned keys included in the gradient."""
    monkeypatch.setattr(masked_vit, "EPSILON", 0.0)  # it is the authors' code's, not the paper's
    generator = seeded()
    scores = torch.randn(2, 3, 6, 6, generator=generator) * 3
    weight = torch.randn(2, 3, 6, 6, generator=generator)
    kept = torch.tensor([[1, 1, 1, 0, 1, 0.0], [1, 1, 0, 0, 0, 1.0]], requires_grad=True)
    ours = masked_attention(scores, kept)
    (gradient,) = torch.autograd.grad((ours * weight).sum(), kept)

    gate = torch.stack([kept] * 6, dim=1)
    gate = torch.where(torch.eye(6, dtype=torch.bool), torch.ones(()), gate)[:, None]
    unnormed = scores.exp() * gate
    theirs = unnormed / unnormed.sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), kept)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert (gradient != 0).all()


def test_no_patch_is_worth_more_than_its_images_loss_can_be(vit, images):
    """Whatever the gradient says: it explodes where attention is sharp."""
    backbone = StagedViT(copy.deepcopy(vit).requires_grad_(False), STAGES)
    policy = dynamic_vit_policy(backbone, 0.5, 8)
    begun = backbone.begin(images, execution="masked")

    def gradients(scale):
        run = run_masked(backbone, policy, begun, seeded())
        return torch.autograd.grad(scale * run.logits.sum(), list(policy.parameters()))

    for exploding, more in zip(gradients(1e9), gradients(1e12), strict=True):
        assert 0 < exploding.norm() < 10
        torch.testing.assert_close(exploding, more)


@pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("prune_at", ["block", "mlp"])
@torch.no_grad()
def test_a_masked_run_answers_as_the_pruned_model_does(make_vit, images, kwargs, prune_at):
    backbone = StagedViT(make_vit(**kwargs), STAGES, prune_at=prune_at)
    policy = dynamic_vit_policy(backbone, 0.5, 8)
    begun = backbone.begin(images, execution="masked")
    run = run_masked(backbone, policy, begun, seeded())
    first, second = run.kept > 0
    assert not (second & ~first).any()
    assert 0 < second.sum() < first.sum() < first.numel()
    tokens = backbone.begin(images)
    for stage, keep in enumerate((first, second)):
        tokens = backbone.advance(tokens, keep, stage)
    torch.testing.assert_close(run.logits, backbone.finish(tokens), rtol=0, atol=1e-4)
    dense = run_dense(backbone, begun)
    torch.testing.assert_close(dense.logits, backbone.model(images), rtol=0, atol=1e-4)
    features = backbone.model.forward_features(images)[:, backbone.num_prefix :]
    torch.testing.assert_close(dense.patches, features, rtol=0, atol=1e-4)


# --- losses ---


def test_losses_are_the_papers():
    kept = torch.tensor([[[1, 1, 0, 1], [1, 1, 1, 1]], [[1, 0, 0, 0], [0, 1, 0, 0]]]).float()
    teacher_patches, patches = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    patches[0, 0] = torch.tensor([1, 2, 3.0])  # the one that the first image keeps: (1 + 4 + 9) / 3
    logits, teacher_logits = torch.tensor([[2, 0.0], [0, 1.0]]), torch.tensor([[1, 0.0], [0, 3.0]])
    student = Outputs(logits, patches, kept)
    teacher = Outputs(teacher_logits, teacher_patches, kept)
    terms = losses(student, teacher, torch.tensor([0, 0]), (0.5, 0.25), 3.0)
    assert float(terms["tokens"]) == pytest.approx((14 / 3 + 1) / 2)
    # shares kept: 0.75 and 1 instead of 0.5; 0.25 and 0.25
    assert float(terms["ratio"]) == pytest.approx((0.25**2 + 0.5**2) / 4)
    answer = math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))
    assert float(terms["classification"]) == pytest.approx(sum(answer) / 2)
    p, q = teacher_logits.softmax(1), logits.softmax(1)
    assert float(terms["kl"]) == pytest.approx(float((p * (p / q).log()).sum() / 2))
    weighted = {"classification": 1, "kl": 0.5, "tokens": 0.5, "ratio": 3.0}
    total = sum(weight * float(terms[name]) for name, weight in weighted.items())
    assert float(terms["loss"]) == pytest.approx(total)


def test_a_token_is_not_kept_for_its_distance_to_the_dense_model():
    kept = torch.ones(2, 3, 4, requires_grad=True)
    patches = torch.randn(3, 4, 5, generator=seeded(), requires_grad=True)
    student = Outputs(torch.zeros(3, 2), patches, kept)
    teacher = Outputs(torch.zeros(3, 2), torch.zeros(3, 4, 5), kept)
    tokens = losses(student, teacher, torch.zeros(3, dtype=torch.int64), (0.5, 0.25), 2.0)["tokens"]
    by_kept, by_patches = torch.autograd.grad(tokens, (kept, patches), allow_unused=True)
    assert by_kept is None
    assert by_patches.abs().sum() > 0


def test_labels_may_be_mixed_and_smoothed():
    outputs = Outputs(torch.tensor([[2, 0.0, 1]]), torch.zeros(1, 4, 3), torch.ones(2, 1, 4))

    def classification(labels, smoothing=0.0):
        return losses(outputs, outputs, labels, (1, 1), 2.0, smoothing)["classification"]

    smoothed = classification(torch.tensor([0]), 0.3)
    torch.testing.assert_close(smoothed, classification(torch.tensor([[0.8, 0.1, 0.1]])))
    assert smoothed > classification(torch.tensor([0]))


def test_a_training_is_evaluated_on_as_many_images_as_it_says(vit, some_images):
    model = PrunedViT(StagedViT(vit, STAGES), TopK((9, 4)))
    monitor = mask_monitor(model, some_images, 7, batch_size=BATCH)
    expected = evaluate(model, some_images, 7)
    assert expected.accuracy not in (evaluate(model, some_images).accuracy, 0, 1)
    assert monitor.evaluate() == {
        "validation_accuracy": expected.accuracy, "validation_gmacs": expected.gmacs,
    }  # fmt: skip
    assert monitor.progress({"loss": 1.0, "keep_ratio": 0.25}) == "loss 1.000 kept 0.250"
    assert str(BATCH) in monitor.activity()
