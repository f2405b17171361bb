import pytest
import torch

from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.game import TokenGame
from prunevit.envs.rewards import TeamReward
from prunevit.envs.vit.prefix_cache import PrefixCache
from prunevit.envs.vit.staged_vit import StagedViT

FIELDS = ("token", "cls", "stage", "cls_attention")


class Counting:
    """An ``ImageSet`` that tells what was loaded of it."""

    def __init__(self, images):
        self.images, self.loaded = images, []
        self.num_classes, self.class_names = images.num_classes, images.class_names

    def __len__(self):
        return len(self.images)

    def load(self, indices):
        self.loaded += [int(i) for i in indices]
        return self.images.load(indices)


def make_env(
    vit,
    images,
    cache=0.0,
    stages=(1, 3),
    execution="packed",
    accuracy="correct",
    prune_at="block",
    on_prune="drop",
):
    staged = StagedViT(vit, stages, execution, prune_at=prune_at, on_prune=on_prune)
    game = TokenGame(staged, TeamReward(accuracy=accuracy), 2)
    return BatchedTokenPrune(game, images, 8, FIELDS, cache=cache)


def episode(env, **start):
    """All that is seen and paid when every third token goes."""
    observed, told = env.reset(**start), []
    for stage in range(env.episode_length):
        told += [observed.living(), observed.state, observed.alive]
        actions = (torch.arange(env.num_agents) % 3 != stage).long().expand(env.num_envs, -1)
        transition = env.step(actions.contiguous())
        observed = transition.observations
        told.append(transition.reward)
    told += [env.outcome.logits, env.outcome.gmacs, env.labels, env.indices]
    return told


@pytest.mark.parametrize(
    ("execution", "on_prune"), [("packed", "drop"), ("masked", "drop"), ("packed", "merge")]
)
@pytest.mark.parametrize(
    ("stages", "prune_at"), [((1, 3), "block"), ((0, 2), "block"), ((0, 2), "mlp")]
)
@pytest.mark.parametrize("accuracy", ["correct", "kl"])
def test_the_game_is_the_same_from_memory(
    vit, some_images, execution, on_prune, stages, prune_at, accuracy
):
    options = {
        "stages": stages, "execution": execution, "accuracy": accuracy, "prune_at": prune_at,
        "on_prune": on_prune,
    }  # fmt: skip
    plain = make_env(vit, some_images, **options)
    counting = Counting(some_images)
    cached = make_env(vit, counting, 1e9, **options)
    # nothing there; half of it; all of it, in another order
    for indices in ([3, 1, 4, 0], [1, 5, 9, 4], [5, 0, 3, 9]):
        expected, found = (episode(env, indices=indices) for env in (plain, cached))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sorted(counting.loaded) == [0, 1, 3, 4, 5, 9]


def test_rotary_positions_too(make_vit, some_images):
    vit = make_vit("eva02_tiny_patch14_224", patch_size=8)
    plain, cached = make_env(vit, some_images), make_env(vit, some_images, 1e9)
    for indices in ([3, 1, 4, 0], [4, 3, 2, 1]):
        expected, found = (episode(env, indices=indices) for env in (plain, cached))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_memory_is_bounded_and_hits_are_told(vit, some_images):
    counting = Counting(some_images)
    slots = 17
    image = (slots * (vit.embed_dim + 1)) * 4 + 8  # rows, their attention, the label
    env = make_env(vit, counting, 3.9 * image)
    hits = []
    for indices in ([0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 4, 5], [3, 6, 7, 8]):
        env.reset(indices=indices)
        for _ in range(2):
            transition = env.step(torch.ones(8, 16, dtype=torch.int64))
        assert transition.metrics["cache_hits"].unique().numel() == 1
        hits.append(float(transition.metrics["cache_hits"][0]))
    assert hits == [0, 0.75, 0.25, 0]
    assert counting.loaded == [0, 1, 2, 3, 3, 3, 4, 5, 3, 6, 7, 8]


def test_an_image_that_is_asked_for_twice_is_run_once(vit, some_images):
    backbone, asked = StagedViT(vit, (2,)), []

    def run(indices):
        asked.extend(indices.tolist())
        images, labels = some_images.load(indices)
        return backbone.begin(images), {"labels": labels}

    with torch.no_grad():
        tokens, tensors = PrefixCache(backbone, run, 10, 1e9).load(torch.tensor([7, 2, 7]))
    assert sorted(asked) == [2, 7]
    assert tensors["labels"].tolist() == some_images.labels[[7, 2, 7]].tolist()
    first, _, third = tokens.x.unflatten(0, (3, -1))
    assert torch.equal(first, third)


def make_cache(backbone, images):
    """A cache, and the indices of what was computed for it."""
    asked = []

    def run(indices):
        asked.extend(indices.tolist())
        return backbone.begin(images.load(indices)[0].to(backbone.dtype)), {}

    return PrefixCache(backbone, run, len(images), 1e9), asked


@torch.no_grad()
def test_a_backbone_that_moves_takes_its_images_along(make_vit, some_images):
    """ "meta" stands for a GPU."""
    backbone = StagedViT(make_vit("eva02_tiny_patch14_224", patch_size=8), (2,))
    cache, asked = make_cache(backbone, some_images)
    indices = torch.tensor([7, 2])
    cache.load(indices)
    backbone.to("meta")
    tokens, _ = cache.load(indices)
    parts = (tokens.x, tokens.alive, tokens.rotary.slot, tokens.rotary.rows())
    assert {part.device.type for part in parts} == {"meta"}
    assert asked == [2, 7]


@torch.no_grad()
def test_what_was_computed_in_another_type_is_computed_again(make_vit, some_images):
    backbone = StagedViT(make_vit("eva02_tiny_patch14_224", patch_size=8), (2,))
    cache, asked = make_cache(backbone, some_images)
    indices = torch.tensor([7, 2])
    cache.load(indices)
    backbone.double()
    for _ in range(2):
        tokens, _ = cache.load(indices)
        expected = backbone.begin(some_images.load(indices)[0].double())
        torch.testing.assert_close(tokens.x, expected.x, rtol=1e-9, atol=1e-9)
    assert asked == [2, 7, 2, 7]
