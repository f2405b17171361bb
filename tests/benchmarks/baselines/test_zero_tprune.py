"""Zero-TPrune against timm, and against slow, plain votes."""

import pytest
import torch

from prunevit.agents import PrunedViT
from prunevit.benchmarks.baselines import zero_tprune
from prunevit.benchmarks.baselines.zero_tprune import (
    ZeroTPrune,
    aggregate,
    choose,
    macs_counter,
    page_rank,
    without_similar,
)
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

STAGES = (1, 3)


def some_attention(heads, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(2, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    return scores.softmax(-1)


# --- votes ---


def test_votes_weigh_as_much_as_who_votes():
    attention = some_attention(2, 5)
    for rounds in (1, 2, 5):
        found = page_rank(attention, rounds)
        for image, head in ((0, 0), (1, 1)):
            votes = attention[image, head]
            scores = [1.0] * 5
            for _ in range(rounds):
                scores = [sum(scores[j] * float(votes[j, i]) for j in range(5)) for i in range(5)]
            assert found[image, head].tolist() == pytest.approx(scores)
    settled = page_rank(attention, 200)[..., None, :]
    torch.testing.assert_close(settled @ attention, settled)


def test_heads_that_tell_too_little_or_too_much_do_not_count():
    flat, some, other = [1.0, 1.01, 0.99], [0.5, 1.0, 1.5], [1.4, 0.8, 0.8]
    steep = [3.0, 0.0, 0.0]
    scores = torch.tensor([[flat, some, other, steep], [flat, steep, steep, flat]])
    found = aggregate(scores)
    expected = [((a**2 + b**2) / 2) ** 0.5 for a, b in zip(some, other, strict=True)]
    assert found[0].tolist() == pytest.approx(expected)
    # none is left of the second image's, so all count
    expected = [((2 * a**2 + 2 * b**2) / 4) ** 0.5 for a, b in zip(flat, steep, strict=True)]
    assert found[1].tolist() == pytest.approx(expected)


def test_of_alike_patches_the_less_important_goes():
    importance = torch.tensor([[0.1, 0.9, 0.8, 0.2, 0.3, 0.7]])
    keys = torch.tensor([[[0, 1.0], [1, 0], [-1, -1], [2, 0.1], [-1, 1], [1, -1]]])
    assert without_similar(importance, keys, 1).tolist() == [[0, 1, 2, 4, 5]]
    # 4 is unlike all of the upper half, 0 less so
    assert without_similar(importance, keys, 2).tolist() == [[1, 2, 4, 5]]
    assert without_similar(importance, keys, 0).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("count", [0, 3, 8, 11])
def test_both_steps_choose_who_stays(prefix, count):
    attention = some_attention(4, prefix + 12)
    keys = torch.randn(2, prefix + 12, 6, generator=torch.Generator().manual_seed(1)).double()
    found = choose(attention, keys, prefix, count, 5)
    similar = min((12 - count) // 2, 6)
    for image in range(2):
        graph = attention[image]
        first = aggregate(page_rank(graph[None], 1))[:, prefix:]
        left = without_similar(first, keys[image : image + 1, prefix:], similar)[0]
        assert len(left) == 12 - similar
        rows = [*range(prefix), *(prefix + left).tolist()]
        among = graph[:, rows][:, :, rows]
        importance = aggregate(page_rank((among / among.sum(2, keepdim=True))[None], 5))[0, prefix:]
        best = sorted(range(len(left)), key=lambda i, s=importance: -float(s[i]))[:count]
        assert found[image].tolist() == sorted(int(left[i]) for i in best)


# --- the model ---


@torch.no_grad()
def test_where_nothing_goes_it_is_timms_model(make_vit, images, kwargs):
    model = make_vit(**kwargs)
    rival = ZeroTPrune(model, STAGES, (16, 16))
    torch.testing.assert_close(rival(images), model(images), rtol=0, atol=1e-5)


@torch.no_grad()
def test_it_is_a_pass_with_the_chosen_patches_alone(make_vit, images, kwargs, monkeypatch):
    model = make_vit(**kwargs)
    staged, alive = StagedViT(model, STAGES), []

    def followed(*arguments):
        stay = choose(*arguments)
        before = alive[-1] if alive else torch.ones(3, 16, dtype=torch.bool)
        places = before.nonzero()[:, 1].view(3, -1).gather(1, stay)
        alive.append(torch.zeros(3, 16, dtype=torch.bool).scatter(1, places, True))
        return stay

    monkeypatch.setattr(zero_tprune, "choose", followed)
    logits = ZeroTPrune(model, STAGES, (11, 4))(images)
    assert [stage.sum(1).tolist() for stage in alive] == [[11] * 3, [4] * 3]
    stages = iter(alive)
    pruned = PrunedViT(staged, lambda view: next(stages))(images)
    torch.testing.assert_close(logits, pruned, rtol=0, atol=1e-5)


def test_its_cost_is_what_is_computed(make_vit, kwargs):
    model = make_vit(**kwargs)
    staged, prefix = StagedViT(model, STAGES), model.num_prefix_tokens
    count, heads, width = macs_counter(model, (3, 32, 32), STAGES), 2, 32
    assert count((16, 16)) == staged.dense_macs
    # the second block of four is among the first three blocks, and so is the third
    votes = similar = 0
    for patches, stay in ((16, 11), (11, 4)):
        left = patches - (patches - stay) // 2
        votes += heads * ((prefix + patches) ** 2 + 30 * (prefix + left) ** 2)
        similar += (patches // 2) * (patches - patches // 2) * width
    assert count((11, 4)) == staged.uniform_macs((11, 4), False) + votes + similar


def test_what_it_can_not_do_is_refused(make_vit, vit):
    for kwargs in ({"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}):
        with pytest.raises(UnsupportedBackboneError, match="needs a class token"):
            ZeroTPrune(make_vit(**kwargs), STAGES, (9, 4))
    for stages in ((0, 1), (1, 4), (3, 1)):
        with pytest.raises(ValueError, match=r"must ascend within 1\.\.3"):
            ZeroTPrune(vit, stages, (9, 4))
    with pytest.raises(ValueError, match="2 stages need a number each"):
        ZeroTPrune(vit, STAGES, (9, -1))
