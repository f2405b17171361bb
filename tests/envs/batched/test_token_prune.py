"""BatchedTokenPrune: the game with its images behind it, as trainers drive it."""

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prunevit.envs.batched import token_prune
from prunevit.envs.batched.lazy_observations import action_mask
from prunevit.envs.batched.protocol import BatchedEnv, Observations
from prunevit.envs.batched.token_prune import BatchedTokenPrune, draw_distinct
from prunevit.envs.data.cluttered_digits import ClutteredDigits
from prunevit.envs.fields import DEFAULT_FIELDS, FIELDS, field_slices
from prunevit.envs.game import GameError, TokenGame
from prunevit.envs.rewards import ReleasedCodeReward
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT

PATCHES, STAGES = 16, (1, 3)
PARTS = ("observation", "state", "alive", "action_mask")


@pytest.fixture
def make_env(vit, some_images):
    def make(
        num_envs=6,
        rollouts=1,
        images=some_images,
        observation=DEFAULT_FIELDS,
        reward=None,
        **options,
    ):
        game = TokenGame(StagedViT(vit, STAGES), reward, rollouts)
        return BatchedTokenPrune(game, images, num_envs, observation, **options)

    return make


def drawn(env, times=1, **kwargs):
    """Images of so many resets in a row, [times, B]."""
    indices = []
    for _ in range(times):
        env.reset(**kwargs)
        indices.append(env.indices)
    return torch.stack(indices)


# --- the protocol ---


def test_it_is_a_batched_env(make_env):
    env = make_env(rollouts=3)
    assert isinstance(env, BatchedEnv)
    assert (env.num_envs, env.num_agents) == (6, PATCHES)
    assert (env.episode_length, env.rollouts_per_start) == (len(STAGES), 3)
    assert env.action_space.n == 2
    assert env.device == torch.device("cpu")
    assert make_env().rollouts_per_start == 1


@pytest.mark.parametrize("fields", [DEFAULT_FIELDS, FIELDS, ("alpha",)])
@pytest.mark.parametrize("rollouts", [1, 3])
def test_an_episode_is_the_games(make_env, some_images, keeps, fields, rollouts):
    env = make_env(rollouts=rollouts, observation=fields)
    assert env.field_slices == field_slices(env.game.backbone, fields)
    reference = TokenGame(env.game.backbone, rollouts_per_image=rollouts)
    keep = keeps(6, len(STAGES), PATCHES)
    observed = env.reset(seed=0)
    chosen = env.indices[::rollouts]
    assert torch.equal(env.indices, chosen.repeat_interleave(rollouts))
    assert torch.equal(env.labels, some_images.labels[env.indices])
    assert torch.equal(env.pixels, some_images.images[chosen])
    stage = reference.reset(*some_images.load(chosen))
    for step, decision in enumerate(keep):
        for part, shape in zip(
            PARTS,
            (
                (6, PATCHES, *env.observation_space.shape),
                (6, *env.state_space.shape),
                (6, PATCHES),
                (6, PATCHES, 2),
            ),
            strict=True,
        ):
            assert getattr(observed, part).shape == shape, part
        living = stage.view.living(fields)
        assert torch.equal(observed.alive, stage.alive)
        assert torch.equal(observed.living(), living)
        assert torch.equal(observed.observation, stage.view.scatter(living))
        assert torch.equal(Observations.living(observed), living)
        rows, seen = observed.distinct()
        torch.testing.assert_close(rows[seen], living, rtol=0, atol=1e-6)
        assert torch.equal(observed.state, stage.view.state())
        states, state_of = observed.distinct_states()
        own_state = observed.state[observed.alive.nonzero()[:, 0]]
        torch.testing.assert_close(states[state_of][seen], own_state, rtol=0, atol=1e-6)
        assert observed.action_mask[..., 0].all()
        assert torch.equal(observed.action_mask[..., 1], stage.alive)
        transition = env.step(decision.long())
        stage = reference.step(decision)
        observed = transition.observations
        over = step + 1 == len(STAGES)
        assert torch.equal(transition.reward, stage.reward)
        assert transition.terminated.tolist() == [over] * 6
        assert not transition.truncated.any()
        assert transition.final is None
        assert torch.equal(env.survivors, stage.alive)
        assert (env.outcome is not None) == over
        assert bool(transition.metrics) == over

    outcome = stage.outcome
    assert torch.equal(env.outcome.logits, outcome.logits)
    assert transition.metrics.keys() == {"accuracy", "gmacs", "keep_ratio"}
    assert torch.equal(transition.metrics["accuracy"], outcome.correct.float())
    assert torch.equal(transition.metrics["gmacs"], outcome.gmacs)
    torch.testing.assert_close(
        transition.metrics["keep_ratio"], outcome.kept.float().mean(1) / PATCHES
    )
    # nothing is seen after the end
    assert not observed.alive.any()
    assert not observed.observation.any()
    assert not observed.state.any()
    assert observed.observation.shape == (6, PATCHES, *env.observation_space.shape)
    assert observed.state.shape == (6, *env.state_space.shape)
    assert observed.action_mask.tolist() == [[[True, False]] * PATCHES] * 6
    env.reset()
    assert env.outcome is None


def test_who_changes_what_was_observed_changes_nothing_else(make_env):
    env = make_env()
    observed = env.reset(seed=0)
    observed.alive[:] = False
    assert observed.action_mask.all()
    assert observed.observation.any(-1).all()
    assert env.step(torch.ones(6, PATCHES, dtype=torch.int64)).observations.alive.all()


def test_action_masks():
    """Everybody may prune, the living may keep."""
    assert action_mask(torch.tensor([[True, False]])).tolist() == [[[True, True], [True, False]]]


# --- alpha ---


def test_each_image_is_played_under_a_price_of_its_own(make_env):
    env = make_env(36, rollouts=3, observation=("alpha",), alpha_range=(0.01, 0.1))
    alphas = env.reset(seed=0).view.alpha
    assert torch.equal(alphas, alphas[::3].repeat_interleave(3))
    assert len(alphas.unique()) == 12
    assert alphas.min() >= 0.01
    assert alphas.max() <= 0.1
    assert torch.equal(env.reset(seed=0).view.alpha, alphas)
    assert not torch.equal(env.reset(seed=1).view.alpha, alphas)
    # as many between 0.01 and 0.03 as between 0.03 and 0.1
    drawn = torch.cat([env.reset().view.alpha[::3] for _ in range(50)])
    assert abs((drawn < 10**-1.5).float().mean() - 0.5) < 0.1


@pytest.mark.parametrize("alphas", [(0.0, 1.0), (0.2, 0.1), (0.1, float("inf")), (0.1, 1e13)])
def test_a_range_of_alphas_is_positive_and_ascending(make_env, alphas):
    with pytest.raises(ValueError, match=r"two positive numbers of at most 1e\+12, the lower one"):
        make_env(alpha_range=alphas)


def test_a_range_of_alphas_needs_a_reward_that_has_one(make_env):
    with pytest.raises(ValueError, match="ReleasedCodeReward, which has no alpha"):
        make_env(observation=("alpha",), reward=ReleasedCodeReward(), alpha_range=(0.01, 0.1))


# --- seeds ---


def test_the_same_seed_begins_the_same_episodes(make_env):
    one, other = make_env(), make_env()
    other.reset(seed=1)
    for env in (one, other):
        env.reset(seed=7)
    torch.manual_seed(0)  # the global generator plays no part
    assert torch.equal(drawn(one, 5), drawn(other, 5))
    state = torch.get_rng_state()
    one.reset()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [2**32, 2**40 + 1, 2**63 - 1])
def test_large_seeds_do_not_repeat_small_ones(make_env, seed):
    env = make_env()
    large = drawn(env, seed=seed)
    assert torch.equal(large, drawn(env, seed=seed))
    assert not torch.equal(large, drawn(env, seed=seed % 2**32))


def test_episodes_differ_between_seeds_resets_and_environments(make_env):
    env = make_env()
    assert not torch.equal(drawn(env, seed=0), drawn(env, seed=1))
    first, second = drawn(env, 2)
    assert not torch.equal(first, second)
    assert not torch.equal(drawn(make_env(), 3), drawn(make_env(), 3))


@pytest.mark.parametrize(("num_envs", "rollouts"), [(12, 1), (36, 3)])
def test_images_are_drawn_without_repeats(make_env, some_images, num_envs, rollouts):
    (indices,) = drawn(make_env(num_envs, rollouts))
    assert indices[::rollouts].sort().values.tolist() == list(range(len(some_images)))


@pytest.mark.parametrize("permuted_size", [0, 1 << 16])
def test_shards_draw_what_one_environment_would(make_env, monkeypatch, permuted_size):
    monkeypatch.setattr(token_prune, "PERMUTED_SIZE", permuted_size)
    whole = drawn(make_env(4), 3, seed=5)
    parts = [drawn(make_env(2, shard=(i, 2)), 3, seed=5) for i in range(2)]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("permuted_size", [0, 1 << 16])
def test_draws_of_different_numbers_are_all_as_likely(monkeypatch, permuted_size):
    monkeypatch.setattr(token_prune, "PERMUTED_SIZE", permuted_size)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_distinct(3, 7, generator) for _ in range(6_300)])
    assert draws.dtype == torch.int64
    assert (draws.sort(1).values.diff(dim=1) > 0).all()
    expected = 6_300 / (7 * 6)
    for first, second in ((0, 1), (2, 0), (1, 2)):
        counts = (draws[:, first] * 7 + draws[:, second]).bincount(minlength=49).double()
        assert (counts > 0).sum() == 7 * 6
        # the 1e-5 quantile of chi square with 41 degrees of freedom
        assert (counts[counts > 0] - expected).square().sum() / expected < 90


@pytest.mark.parametrize("count", [0, 1, 50, 51, 99, 100])
def test_as_many_different_numbers_as_there_are_can_be_drawn(monkeypatch, count):
    monkeypatch.setattr(token_prune, "PERMUTED_SIZE", 0)
    drawn = draw_distinct(count, 100, torch.Generator().manual_seed(0)).tolist()
    assert len(set(drawn)) == len(drawn) == count
    assert set(drawn) <= set(range(100))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_a_draw_takes_no_memory_for_the_data_set(make_env, some_images):
    class Many(type(some_images)):
        def __len__(self):
            return 10**9

        def load(self, indices):
            assert indices.unique().shape == (6,)
            assert indices.max() > 1_000
            return super().load(indices % len(some_images))

    env = make_env(images=Many())
    env.reset(seed=0)
    with Largest() as largest:
        env._draw_images(torch.Generator().manual_seed(0))
    assert largest.elements <= 6


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_images_can_be_named(make_env, some_images, kind):
    env = make_env(4, rollouts=2)
    env.reset(indices=kind([5, 3]))
    assert env.indices.tolist() == [5, 5, 3, 3]
    assert torch.equal(env.pixels, some_images.images[[5, 3]])


def test_named_images_do_not_use_the_seed_up(make_env):
    one, other = make_env(), make_env()
    for env in (one, other):
        env.reset(seed=3)
    one.reset(indices=range(6))
    assert torch.equal(drawn(one), drawn(other))


# --- what is refused ---


def test_fewer_images_than_asked(make_env, some_images):
    class Lossy:
        num_classes = some_images.num_classes

        def __len__(self):
            return len(some_images)

        def load(self, indices):
            return tuple(each[1:] for each in some_images.load(indices))

    with pytest.raises(ValueError, match="returned 5 images where 6 were asked"):
        make_env(images=Lossy()).reset(seed=0)


@pytest.mark.parametrize(("num_envs", "rollouts"), [(0, 1), (-3, 1), (0, 4), (6, 4), (3, 4)])
def test_environments_come_in_multiples_of_the_rollouts(make_env, num_envs, rollouts):
    message = f"num_envs={num_envs} must be a positive multiple of rollouts_per_image={rollouts}"
    with pytest.raises(ValueError, match=message):
        make_env(num_envs, rollouts)


def test_more_images_than_there_are_can_not_be_drawn(make_env):
    make_env(24, rollouts=2)
    with pytest.raises(ValueError, match="needs 13 different images, the dataset has 12"):
        make_env(26, rollouts=2)


@pytest.mark.parametrize("classes", [4, 6])
def test_other_classes_than_the_backbones(make_env, make_images, classes):
    images = make_images()
    images.num_classes = classes
    with pytest.raises(ValueError, match=rf"has {classes} classes \(.*\), the backbone .* 5"):
        make_env(images=images)


@pytest.mark.parametrize("fields", [("token", "smell"), (), ("cls", "cls")])
def test_wrong_fields(make_env, fields):
    with pytest.raises(ValueError, match="name one or more of token"):
        make_env(observation=fields)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1, 2, 3], r"2 image indices are needed: got \[3\]"),
        ([[1, 2]], r"2 image indices are needed: got \[1, 2\]"),
        ([0, 12], r"\[0, 12\]: the dataset has 0\.\.11"),
        ([0, -1], r"\[0, -1\]: the dataset has 0\.\.11"),
        ([0, 1.5], "whole numbers"),
        ([True, False], "whole numbers"),
        ("ab", "whole numbers"),
    ],
)
def test_wrong_indices(make_env, indices, message):
    with pytest.raises(ValueError, match=message):
        make_env(4, rollouts=2).reset(indices=indices)


ONES = torch.ones(6, PATCHES, dtype=torch.int64)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (ONES[:, 1:], r"int64 \[6, 16\]: got torch.int64 \[6, 15\]"),
        (ONES[1:], r"int64 \[6, 16\]: got torch.int64 \[5, 16\]"),
        (ONES[..., None], r"int64 \[6, 16\]: got torch.int64 \[6, 16, 1\]"),
        (ONES.bool(), r"int64 \[6, 16\]: got torch.bool"),
        (ONES.float(), r"int64 \[6, 16\]: got torch.float32"),
        (ONES * 2, r"0 \(prune\) or 1 \(keep\)"),
        (-ONES, r"0 \(prune\) or 1 \(keep\)"),
    ],
)
def test_wrong_actions_are_refused_and_nothing_is_lost(make_env, actions, message):
    env = make_env()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    assert not env.step(ONES).terminated.any()


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU. What is copied from it without waiting holds zeros until
    ``arrive`` is called.
    """

    under_way: ClassVar = []

    @property
    def device(self):
        return torch.device("cuda")

    def to(self, device, non_blocking=False):
        plain = self.as_subclass(torch.Tensor)
        if not non_blocking:
            return plain
        copied = torch.zeros_like(plain)
        self.under_way.append((copied, plain))
        return copied

    @classmethod
    def arrive(cls):
        while cls.under_way:
            copied, value = cls.under_way.pop()
            copied.copy_(value)


@pytest.mark.parametrize("actions", [ONES * 2, -ONES])
def test_wrong_actions_on_a_gpu_are_refused_when_the_game_has_waited(
    make_env, monkeypatch, actions
):
    env = make_env()
    step = env.game.step

    def waiting_step(keep):
        stage = step(keep)
        OnGPU.arrive()
        return stage

    monkeypatch.setattr(env.game, "step", waiting_step)
    env.reset(seed=0)
    env.step(ONES.as_subclass(OnGPU))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"0 \(prune\) or 1 \(keep\): call reset"):
        env.step(actions.as_subclass(OnGPU))
    monkeypatch.undo()
    with pytest.raises(GameError, match="reset"):
        env.step(ONES)
    env.game.backbone.execution = "masked"  # never waits, so the check does, before the step
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"1 \(keep\)$"):
        env.step(actions.as_subclass(OnGPU))
    assert not env.step(ONES).terminated.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("num_envs", [1, 6])
def test_wrong_actions_are_refused_on_cuda(make_env, num_envs):
    env = make_env(num_envs).to("cuda")
    wrong = torch.ones(num_envs, PATCHES, dtype=torch.int64, device="cuda")
    wrong[-1, -1] = 2
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"0 \(prune\) or 1 \(keep\)"):
        env.step(wrong)
    with pytest.raises(GameError, match="reset"):
        env.step(wrong.clamp(max=1))


def test_steps_out_of_turn(make_env):
    env = make_env()
    with pytest.raises(GameError, match="reset"):
        env.step(ONES)
    env.reset(seed=0)
    for _ in STAGES:
        env.step(ONES)
    with pytest.raises(GameError, match="reset"):
        env.step(ONES)
    env.reset(seed=0)
    env.close()
    with pytest.raises(GameError, match="reset"):
        env.step(ONES)


def test_a_seed_repeats_the_augmentation_too():
    game = TokenGame(StagedViT(create_backbone(untrained=True)))
    env = BatchedTokenPrune(game, ClutteredDigits("train", 40, augment=True), 8)
    env.reset(seed=5)
    first = env.pixels
    env.reset(seed=6)
    other = env.pixels
    env.reset(seed=5)
    assert torch.equal(env.pixels, first)
    assert not torch.equal(other, first)
