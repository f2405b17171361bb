"""The oracle removes what does the least harm, as a slow, plain search does."""

import pytest
import torch

from prunevit.agents import PrunedViT, TopK
from prunevit.agents.policies.oracle import Oracle
from prunevit.envs.vit.staged_vit import StagedViT

BATCH, PATCHES, STAGES = 4, 16, (1, 3)
BACKBONES = {"class token": {}, "mean": {"class_token": False, "global_pool": "avg"}}


@pytest.fixture
def images(some_images):
    return some_images.load(range(BATCH))[0]


@pytest.fixture
def labels(vit, images):
    """Not what the model answers."""
    return vit(images).argmin(1)


def masked(backbone, image, keeps):
    """Log-probabilities of one image with the given survivors of each stage, in the reference's
    execution.
    """
    tokens = backbone.begin(image[None], execution="masked")
    for stage, keep in enumerate(keeps):
        tokens = backbone.advance(tokens, keep[None], stage)
    return backbone.finish(tokens).log_softmax(-1)[0]


def plain_search(backbone, image, label, wanted):
    """One patch at a time, with a pass for each that could go."""
    everyone = torch.ones(PATCHES, dtype=torch.bool)
    dense = masked(backbone, image, [everyone] * backbone.num_stages)
    chosen = []
    alive = everyone
    for count in wanted:
        while int(alive.sum()) > count:
            harm = {}
            for patch in alive.nonzero().flatten().tolist():
                without = alive.clone()
                without[patch] = False
                later = [without] * (backbone.num_stages - len(chosen))
                answer = masked(backbone, image, chosen + later)
                kl = float((dense.exp() * (dense - answer)).sum())
                harm[patch] = kl if label is None else -float(answer[label])
            alive = alive.clone()
            alive[min(harm, key=harm.get)] = False
        chosen.append(alive)
    return torch.stack(chosen)


@pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("knows_labels", [True, False])
@torch.no_grad()
def test_it_is_a_plain_greedy_search(make_vit, images, labels, kwargs, knows_labels):
    # harms are close to each other: in single precision both searches round to other orders
    backbone, images = StagedViT(make_vit(**kwargs).double(), STAGES), images.double()
    known = labels if knows_labels else None
    keep = Oracle(backbone, (12, 8), share=0).keep(images[:2], None if known is None else known[:2])
    for i in range(2):
        label = None if known is None else int(known[i])
        assert torch.equal(keep[i], plain_search(backbone, images[i], label, (12, 8)))


@pytest.mark.parametrize("tokens", [(9, 4), (16, 0), (5, 5), (20, 3), (1, 1)])
def test_as_many_are_kept_as_wanted(vit, images, labels, tokens, monkeypatch):
    oracle = Oracle(StagedViT(vit, STAGES), tokens)
    trace = oracle.trace(images, labels)
    first = min(tokens[0], PATCHES)
    left = [first, min(tokens[1], first)]
    assert trace.alive.sum(2).tolist() == [left] * BATCH
    assert not (trace.alive[:, 1] & ~trace.alive[:, 0]).any()
    assert trace.macs.tolist() == [oracle.backbone.uniform_macs(left, False)] * BATCH
    # however many images are searched at once
    monkeypatch.setattr("prunevit.agents.policies.oracle.BATCH_SIZE", PATCHES)
    assert torch.equal(oracle.keep(images, labels), trace.alive)


@torch.no_grad()
def test_it_beats_a_rule(vit, some_images):
    """The true class is likelier than with attention, or the answer nearer to the dense model's."""
    images, labels = some_images.load(range(12))
    backbone, tokens = StagedViT(vit, STAGES), (8, 4)
    rule = PrunedViT(backbone, TopK(tokens))(images).log_softmax(-1)
    dense = vit(images).log_softmax(-1)
    oracle = Oracle(backbone, tokens)
    with_labels = oracle.trace(images, labels).logits.log_softmax(-1)
    without = oracle.trace(images).logits.log_softmax(-1)

    def of_labels(answers):
        return answers.gather(1, labels[:, None]).mean()

    def divergence(answers):
        return (dense.exp() * (dense - answers)).sum(1).mean()

    assert of_labels(with_labels) > max(of_labels(rule), of_labels(dense), of_labels(without))
    assert divergence(without) < 0.5 * divergence(rule)


def test_what_is_refused(staged):
    with pytest.raises(ValueError, match=r"tokens=\(4, 2\): 3 stages need a number each"):
        Oracle(staged, (4, 2))
    with pytest.raises(ValueError, match="share=1 must be at least 0 and below 1"):
        Oracle(staged, (4, 2, 1), share=1)
