"""The game on a backbone without a classifier, which is paid by its embeddings."""

import pytest
import torch

from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.game import TokenGame
from prunevit.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import StagedViT

EMBEDDING = TeamReward(accuracy="embedding")


@pytest.fixture(scope="module")
def headless(make_vit):
    return make_vit(num_classes=0)


def play(game, images, keep, labels=None):
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    stage, paid = game.reset(images, labels), 0
    while stage.outcome is None:
        stage = game.step(keep[stage.index])
        paid = paid + stage.reward
    return stage.outcome, paid


@pytest.mark.parametrize("pooled", ["token", "avg", "map"])
def test_pay_is_the_cosine_to_the_dense_embedding(make_vit, some_images, keeps, pooled):
    """The embedding is what goes into the classifier that the same model could have."""
    vit = make_vit(global_pool=pooled, num_classes=5)
    pixels = some_images.images[:6]
    dense = vit.forward_head(vit.forward_features(pixels), pre_logits=True).detach()
    vit.reset_classifier(0)
    game = TokenGame(StagedViT(vit), TeamReward(alpha=0.0, accuracy="embedding"))
    outcome, paid = play(game, pixels, keeps(6, game.num_stages, game.num_agents))
    torch.testing.assert_close(outcome.dense_logits, dense)
    norms = outcome.logits.norm(dim=1) * dense.norm(dim=1)
    cosine = (outcome.logits * dense).sum(1) / norms
    assert cosine.min() < 0.999
    torch.testing.assert_close(paid, cosine[:, None].expand_as(paid))


def test_nothing_pruned_is_paid_in_full(headless, some_images):
    game = TokenGame(StagedViT(headless), EMBEDDING)
    pixels = some_images.images[:4]
    keep = torch.ones(game.num_stages, 4, game.num_agents, dtype=torch.bool)
    outcome, paid = play(game, pixels, keep)
    torch.testing.assert_close(outcome.logits, headless(pixels))
    # all but the first of the four blocks are paid for
    torch.testing.assert_close(paid, torch.full_like(paid, 1 - 0.06 * 0.75), atol=0.01, rtol=0)


def test_labels_are_not_looked_at(headless, some_images):
    game = TokenGame(StagedViT(headless), EMBEDDING)
    keep = torch.ones(game.num_stages, 2, game.num_agents, dtype=torch.bool)
    outcome, _ = play(game, some_images.images[:2], keep, torch.tensor([99, -1]))
    assert outcome.logits.shape == (2, headless.embed_dim)


@pytest.mark.parametrize(
    "reward",
    [
        TeamReward(),
        TeamReward(accuracy="correct"),
        MarkovGameReward(accuracy="agreement"),
        ReleasedCodeReward(),
    ],
)
def test_rewards_that_read_logits_are_refused(headless, reward):
    message = rf"gives embeddings, but {type(reward).__name__} pays by .*accuracy='embedding'"
    with pytest.raises(ValueError, match=message):
        TokenGame(StagedViT(headless), reward)


def test_a_classifier_is_refused_where_embeddings_pay(vit):
    with pytest.raises(ValueError, match=r"has a classifier of 5 classes: build .* num_classes=0"):
        TokenGame(StagedViT(vit), EMBEDDING)


def test_metrics_have_a_cosine_and_no_accuracy(headless, some_images):
    env = BatchedTokenPrune(TokenGame(StagedViT(headless), EMBEDDING), some_images, 4)
    env.reset(seed=0)
    for _ in range(env.episode_length):
        transition = env.step(torch.zeros(4, env.num_agents, dtype=torch.int64))
    assert "accuracy" not in transition.metrics
    assert (transition.metrics["cosine"] < 1).all()
    paid = env.outcome.logits, env.outcome.dense_logits
    torch.testing.assert_close(
        transition.metrics["cosine"], torch.nn.functional.cosine_similarity(*paid)
    )


@pytest.mark.parametrize("num_envs", [None, 3])
def test_infos_have_embeddings_from_the_first_on(headless, some_images, num_envs):
    env = TokenPruneEnv(
        headless, some_images, reward=EMBEDDING, num_envs=num_envs, prune_before=(1,)
    )
    shape = (32,) if num_envs is None else (num_envs, 32)
    _, infos = env.reset(seed=0)
    assert infos["token_0"]["logits"].shape == shape
    action = 1 if num_envs is None else torch.ones(num_envs, dtype=torch.int64)
    *_, infos = env.step(dict.fromkeys(env.agents, action))
    assert infos["token_0"]["logits"].shape == shape
    assert infos["token_0"]["logits"].any()
