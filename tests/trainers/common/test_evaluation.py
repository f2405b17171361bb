import itertools

import pytest
import torch
from torch import nn

from prunevit.agents.policies.heuristics import KeepAll, TopK
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common import evaluation
from prunevit.trainers.common.evaluation import (
    Evaluation,
    accuracy,
    best_topk,
    evaluate,
    schedules_at,
)

SCHEDULES = [(1.0, 0.6, 0.3), (0.25, 0.25, 0.25), (0.9, 0.05, 0.0)]  # shares kept, 3 stages


class Bright:
    """Keeps a patch by what it holds, so that images keep different numbers; costs 7 a decision."""

    needs_attention = True
    macs_per_decision = 7

    def __call__(self, view):
        return view.scatter(view.token.mean(1) + view.cls_attention > 0.9)


# --- evaluate ---


@pytest.mark.parametrize(
    ("size", "chosen"), [(None, range(12)), (100, range(12)), (5, [0, 2, 4, 7, 9])]
)
def test_it_equals_a_loop_over_images(staged, some_images, size, chosen, monkeypatch):
    """A part of the images is spread over all of them: folders are sorted by class."""
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 5)
    model = PrunedViT(staged, Bright())
    count = len(chosen)
    right, gmacs, kept = 0, 0.0, torch.zeros(3)
    with torch.no_grad():
        for i in chosen:
            image, label = some_images.load([i])
            trace = model.trace(image)
            right += int(trace.logits.argmax() == label)
            gmacs += int(trace.macs) / 1e9
            kept += trace.alive[0].float().mean(1)
    found = evaluate(model, some_images, size)
    assert found.accuracy == right / count
    assert found.gmacs == pytest.approx(gmacs / count)
    assert found.kept == pytest.approx((kept / count).tolist())
    assert 0 < found.kept[-1] < found.kept[0] < 1


def test_the_policys_own_cost_is_counted(staged, some_images):
    free = Bright()
    free.macs_per_decision = 0
    costs, free_costs = (
        evaluate(PrunedViT(staged, policy), some_images) for policy in (Bright(), free)
    )
    asked = staged.num_patches * (1 + costs.kept[0] + costs.kept[1])
    assert costs.gmacs - free_costs.gmacs == pytest.approx(7 * asked / 1e9)


def test_dense_costs_what_the_model_costs(staged, some_images):
    found = evaluate(PrunedViT(staged, KeepAll()), some_images)
    assert found.gmacs == pytest.approx(staged.dense_macs / 1e9)
    assert found.kept == (1, 1, 1)


def test_what_can_not_be_judged_is_refused(staged, some_images):
    class Other:
        num_classes, class_names = some_images.num_classes, some_images.class_names

        def __init__(self, change):
            self.change = change

        def __len__(self):
            return len(some_images)

        def load(self, indices):
            return self.change(*some_images.load(indices))

    model = PrunedViT(staged, KeepAll())
    for change, message in [
        (lambda images, labels: (images, labels[:, None]), r"need int64 labels \[12\]"),
        (lambda images, labels: (images, labels.float()), r"need int64 labels \[12\]"),
        (lambda images, labels: (images.byte(), labels), "floating point images"),
        (lambda images, labels: (images * torch.nan, labels), "NaN"),
        (lambda images, labels: (images, labels + 1), "outside the backbone's 5 classes"),
        (lambda images, labels: (images[1:], labels[1:]), "11 images where 12 were asked"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(model, Other(change))
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"size={size} must be at least 1"):
            evaluate(model, some_images, size)


def test_logits_that_are_no_numbers_are_not_class_zero(make_vit, some_images):
    vit = make_vit()
    vit.head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        evaluate(PrunedViT(StagedViT(vit, (1, 3)), KeepAll()), some_images)


def test_training_mode_is_not_evaluated(make_vit, some_images):
    model = PrunedViT(StagedViT(make_vit(drop_path_rate=0.5).train(), (1, 3)), KeepAll())
    with pytest.raises(ValueError, match="in training mode"):
        evaluate(model, some_images)


# --- schedules that cost as much ---


def ways(staged, kept):
    """All schedules of each kind, from a scan that misses no step of a share."""
    patches, stages = staged.num_patches, staged.num_stages
    scales = [i / 5_000 for i in range(5_001)]
    most = 1 / max(min(kept), 1 / patches)
    kinds = [
        [[min(1.0, share * scale * most) for share in kept] for scale in scales],
        [[scale ** (stage + 1) for stage in range(stages)] for scale in scales],
        *(
            [[1.0 if stage < first else scale for stage in range(stages)] for scale in scales]
            for first in range(stages)
        ),
    ]
    for kind in kinds:
        yield {tuple(round(share * patches) for share in shares) for shares in kind}


@pytest.mark.parametrize("kept", SCHEDULES)
@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
@pytest.mark.parametrize("with_attention", [True, False])
def test_schedules_are_the_cheapest_of_their_kind_that_cost_enough(
    staged, kept, share, with_attention
):
    gmacs = share * staged.dense_macs / 1e9
    expected = []
    for kind in ways(staged, kept):
        costs = {staged.uniform_macs(tokens, with_attention) for tokens in kind}
        # a kind that costs more whatever it keeps, or never as much, is no match
        if min(costs) < gmacs * 1e9 <= max(costs):
            expected.append(min(cost for cost in costs if cost >= gmacs * 1e9))
    found = schedules_at(staged, gmacs, kept, with_attention)
    assert all(len(tokens) == staged.num_stages for tokens in found)
    assert all(a >= b for tokens in found for a, b in itertools.pairwise(tokens))
    assert len(expected) > 1
    assert {staged.uniform_macs(tokens, with_attention) for tokens in found} == set(expected)


def test_a_large_grid_is_matched_to_the_token(make_vit):
    """More patches than a scan of the scale in even steps would tell apart."""
    staged = StagedViT(make_vit(img_size=256, patch_size=8, embed_dim=8))
    assert staged.num_patches == 1024
    for wanted in (700, 701, 702):
        gmacs = staged.uniform_macs([wanted] * 3) / 1e9
        assert [wanted] * 3 in schedules_at(staged, gmacs, (0.9, 0.01, 0.0))


def test_what_the_dense_model_can_not_cost_is_matched_by_no_pruning(staged):
    assert schedules_at(staged, 2 * staged.dense_macs / 1e9, (1.0, 1.0, 1.0)) == [[16, 16, 16]]


@pytest.mark.parametrize("score", ["attention", "random"])
def test_the_best_way_is_the_most_accurate_one_and_costs_enough(
    staged, some_images, score, monkeypatch
):
    gmacs, kept = 0.5 * staged.dense_macs / 1e9, (0.6, 0.5, 0.2)
    candidates = schedules_at(staged, gmacs, kept, with_attention=score == "attention")
    assert len(candidates) >= 3
    seen = []

    def rehearse(model, images, size):
        assert (images, size, model.policy.score) == (some_images, 9, score)
        seen.append(list(model.policy.tokens))
        return Evaluation(score=float(seen[-1] == best), gmacs=0.0, kept=(), left=())

    monkeypatch.setattr(evaluation, "evaluate", rehearse)
    for best in candidates:
        assert best_topk(staged, some_images, gmacs, kept, score, size=9) == best
        assert evaluate(PrunedViT(staged, TopK(best, score)), some_images).gmacs >= gmacs
    assert seen == candidates * len(candidates)


# --- accuracy ---


class Numbers:
    num_classes = 10
    class_names = tuple("0123456789")

    def __len__(self):
        return 605

    def load(self, indices):
        index = torch.as_tensor(indices)
        return index[:, None].float(), index % 10


def test_accuracy_counts_every_image_once():
    class SaysSeven(nn.Module):
        def forward(self, images):
            answers = torch.where(images[:, 0] < 600, images[:, 0].long() % 10, 9)
            return torch.nn.functional.one_hot(answers, 10).float()

    assert accuracy(SaysSeven(), Numbers(), torch.device("cpu")) == 600 / 605
