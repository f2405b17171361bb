"""What holds of the game whatever its configuration and whoever is pruned."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from prunevit.envs.fields import FIELDS
from prunevit.envs.game import TokenGame
from prunevit.envs.rewards import (
    LARGEST_NUMBER,
    MarkovGameReward,
    ReleasedCodeReward,
    Reward,
    TeamReward,
)
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import StagedViT

VIT, EVA = "vit_tiny_patch16_224", "eva02_tiny_patch14_224"
# what a model's tokens, positions and head can be like
KINDS = {
    "class token": (VIT, {}),
    "registers": (VIT, {"reg_tokens": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "no prefix": (VIT, {"class_token": False, "global_pool": "avg"}),
    "average": (VIT, {"global_pool": "avg"}),
    "maximum, scaled": (VIT, {"global_pool": "max", "init_values": 0.5, "qk_norm": True}),
    "attention pool": (VIT, {"global_pool": "map", "class_token": False}),
    "one block": (VIT, {"depth": 1}),
    "oblong": (VIT, {"img_size": (16, 24)}),
    "rotary": (EVA, {}),
    "rotary, no class token": (EVA, {"class_token": False}),
}
DEPTH = 3
MOST_IMAGES = 4
CLASSES = 5
RATIOS = (0.0, 0.3, 0.7, 0.95, 1.0)


@dataclass(frozen=True)
class Case:
    """A legal configuration, and how one batch is played in it.

    Attributes:
        kind: of ``KINDS``.
        stages: prune_before.
        reward: who is paid what.
        rollouts: episodes of each image.
        fields: of an observation.
        prices: of compute, one an image; the reward's own where None.
        ratios: share of patches that is kept, [stage][episode].
        seed: of images, labels and which patches are kept.
    """

    kind: str
    stages: tuple[int, ...]
    reward: Reward
    rollouts: int
    fields: tuple[str, ...]
    prices: tuple[float, ...] | None
    ratios: tuple[tuple[float, ...], ...]
    seed: int


def rewards(most):
    """Rewards of every kind, their numbers between 0 and ``most``."""
    number = st.floats(0, most)
    accuracy = st.sampled_from(["correct", "confidence", "agreement", "kl"])
    return st.one_of(
        st.builds(TeamReward, number, number, accuracy),
        st.builds(MarkovGameReward, number, number, accuracy),
        st.builds(ReleasedCodeReward, pot=number, keep=st.floats(0, 1, exclude_min=True)),
    )


@st.composite
def cases(draw, kinds=tuple(KINDS), most=10.0, most_images=MOST_IMAGES, most_rollouts=3):
    kind = draw(st.sampled_from(kinds))
    depth = KINDS[kind][1].get("depth", DEPTH)
    blocks = st.sets(st.integers(0, depth - 1), min_size=1, max_size=depth)
    stages = tuple(sorted(draw(blocks)))
    images = draw(st.integers(1, most_images))
    rollouts = draw(st.integers(1, most_rollouts))
    fields = draw(st.permutations(FIELDS))[: draw(st.integers(1, len(FIELDS)))]
    prices = st.lists(st.floats(0, most), min_size=images, max_size=images)
    ratio = st.sampled_from(RATIOS)
    return Case(
        kind,
        stages,
        draw(rewards(most)),
        rollouts,
        tuple(fields),
        draw(st.none() | prices.map(tuple)),
        tuple(tuple(draw(ratio) for _ in range(images * rollouts)) for _ in stages),
        draw(st.integers(0, 2**31)),
    )


@pytest.fixture(scope="session")
def models(make_vit):
    return {
        kind: make_vit(name, **{"depth": DEPTH} | kwargs) for kind, (name, kwargs) in KINDS.items()
    }


def draw_batch(case, backbone):
    """Images, labels, prices, and joint actions [T, B, N]."""
    generator = torch.Generator().manual_seed(case.seed)
    ratios = torch.tensor(case.ratios)
    count = ratios.shape[1] // case.rollouts
    images = torch.randn(count, *backbone.image_shape, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    prices = None if case.prices is None else torch.tensor(case.prices)
    drawn = torch.rand(*ratios.shape, backbone.num_patches, generator=generator)
    return images, labels, prices, drawn < ratios[..., None]


def play(game, images, labels, prices, keep):
    """Every stage of an episode."""
    return [game.reset(images, labels, prices), *(game.step(decision) for decision in keep)]


def shown(stages, fields):
    """All that an episode tells, one entry an episode of the batch along the first axis."""
    told = {}
    for t, stage in enumerate(stages):
        told |= {f"alive {t}": stage.alive, f"reward {t}": stage.reward}
        if stage.view is not None:
            told[f"observation {t}"] = stage.view.scatter(stage.view.living(fields))
            told[f"state {t}"] = stage.view.state()
    ended = vars(stages[-1].outcome).items()
    return told | {name: value for name, value in ended if value is not None}


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, ours in one.items():
        torch.testing.assert_close(
            ours, other[name], rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@given(case=cases(most=LARGEST_NUMBER))
def test_the_living_only_get_fewer_and_everything_is_finite(models, case):
    backbone = StagedViT(models[case.kind], case.stages)
    images, labels, prices, keep = draw_batch(case, backbone)
    stages = play(TokenGame(backbone, case.reward, case.rollouts), images, labels, prices, keep)
    assert stages[0].alive.all()
    for before, after, decision in zip(stages[:-1], stages[1:], keep, strict=True):
        kept = before.alive & decision
        if backbone.keeps_last_patch:
            nobody = ~kept.any(1)
            assert torch.equal(after.alive[~nobody], kept[~nobody])
            assert (after.alive[nobody].sum(1) == 1).all()
            assert not (after.alive & ~before.alive).any()
        else:
            assert torch.equal(after.alive, kept)
        assert after.reward.isfinite().all()
    for stage in stages[:-1]:
        seen = stage.view.scatter(stage.view.living(case.fields))
        assert seen.isfinite().all()
        assert not seen[~stage.alive].any()
        assert stage.view.state().isfinite().all()
    assert stages[-1].outcome.logits.isfinite().all()


@given(case=cases())
def test_packed_is_masked(models, case):
    told = []
    for execution in ("packed", "masked"):
        backbone = StagedViT(models[case.kind], case.stages, execution)
        game = TokenGame(backbone, case.reward, case.rollouts)
        told.append(shown(play(game, *draw_batch(case, backbone)), case.fields))
    assert_close(*told)


@given(case=cases(), data=st.data())
def test_a_batch_is_the_sum_of_its_parts(models, case, data):
    backbone = StagedViT(models[case.kind], case.stages)
    game = TokenGame(backbone, case.reward, case.rollouts)
    images, labels, prices, keep = draw_batch(case, backbone)
    together = shown(play(game, images, labels, prices, keep), case.fields)
    cut = data.draw(st.integers(0, len(images)))
    parts = []
    for part in (slice(cut), slice(cut, None)):
        alpha = None if prices is None else prices[part]
        episodes = keep.unflatten(1, (-1, case.rollouts))[:, part].flatten(1, 2)
        parts.append(shown(play(game, images[part], labels[part], alpha, episodes), case.fields))
    assert_close({name: torch.cat([part[name] for part in parts]) for name in together}, together)


@given(case=cases(), data=st.data())
def test_other_order_of_images_same_results(models, case, data):
    backbone = StagedViT(models[case.kind], case.stages)
    game = TokenGame(backbone, case.reward, case.rollouts)
    images, labels, prices, keep = draw_batch(case, backbone)
    order = torch.tensor(data.draw(st.permutations(range(len(images)))))
    episodes = torch.arange(keep.shape[1]).view(-1, case.rollouts)[order].flatten()
    straight = shown(play(game, images, labels, prices, keep), case.fields)
    alpha = None if prices is None else prices[order]
    shuffled = play(game, images[order], labels[order], alpha, keep[:, episodes])
    assert_close(
        shown(shuffled, case.fields), {name: told[episodes] for name, told in straight.items()}
    )


# attention pooling needs a graph to be counted, and the game makes none: test_backbone does it
COUNTABLE = tuple(kind for kind in KINDS if kind != "attention pool")


@given(case=cases(COUNTABLE, most_images=1, most_rollouts=1))
def test_gmacs_are_those_counted(models, case):
    """The counter sees products of matrices; the observed row is made of products of elements."""
    backbone = StagedViT(models[case.kind], case.stages)
    game = TokenGame(backbone, ReleasedCodeReward())  # dense logits cost a pass of their own
    batch = draw_batch(case, backbone)
    with FlopCounterMode(display=False) as counter:
        stages = play(game, *batch)
    attn = backbone.model.blocks[0].attn
    starts = (0, *case.stages)
    rows = sum(
        (backbone.num_prefix + int(stage.alive.sum())) * attn.num_heads * attn.head_dim
        for stage, start, stop in zip(stages, starts, case.stages, strict=False)
        if start < stop
    )
    counted = counter.get_total_flops() // 2 + rows
    assert float(stages[-1].outcome.gmacs) == pytest.approx(counted / 1e9, rel=1e-6)


@given(case=cases(most_images=2, most_rollouts=1))
def test_leaving_is_staying(models, make_images, case):
    """Each agent is told and paid the same in every mode, where nothing is owed to the pruned."""
    model = models[case.kind]
    backbone = StagedViT(model, case.stages)
    dataset = make_images(MOST_IMAGES, backbone.image_shape, case.seed)
    *_, keep = draw_batch(case, backbone)
    indices = list(range(keep.shape[1]))

    def make(**mode):
        return TokenPruneEnv(
            model,
            dataset,
            prune_before=case.stages,
            reward=case.reward,
            observation=case.fields,
            device="cpu",
            **mode,
        )

    batched, staying = make(num_envs=len(indices)), make()
    leaving = None if case.reward.pays_pruned else make(pruned_agents="leave")
    everything = run(batched, indices, keep)
    for i in indices:
        stayed = run(staying, [i], keep[:, i])
        for ours, whole in zip(stayed, everything, strict=True):
            for mine, theirs in zip(ours[:2], whole[:2], strict=True):
                for agent, value in mine.items():
                    np.testing.assert_allclose(value, theirs[agent][i], rtol=1e-3, atol=1e-3)
        if leaving is None:
            continue
        left = run(leaving, [i], keep[:, i])
        over = left[-1]
        for ours, theirs in zip(left[:-1], stayed, strict=False):
            for agent, observation in ours[0].items():
                np.testing.assert_allclose(observation, theirs[0][agent], rtol=1e-6, atol=1e-6)
        due, paid = (
            np.array(
                [
                    sum(step[1].get(agent, 0.0) for step in passed)
                    for agent in leaving.possible_agents
                ]
            )
            for passed in (stayed, left)
        )
        (info, *_) = over[2].values()
        np.testing.assert_allclose(paid, due, rtol=1e-4, atol=1e-4)
        (last, *_) = stayed[-1][2].values()
        np.testing.assert_allclose(info["logits"], last["logits"], rtol=1e-4, atol=1e-4)
        assert info["gmacs"] == pytest.approx(last["gmacs"])


def run(env, indices, keep):
    """Observations, rewards and infos from reset to the end; ``keep`` [T, N], or [T, B, N]."""
    observations, infos = env.reset(options={"indices": indices})
    passed = [(observations, {}, infos)]
    place = {agent: i for i, agent in enumerate(env.possible_agents)}
    for decision in keep.long():
        if env.agents:
            actions = {agent: decision[..., place[agent]] for agent in env.agents}
            observations, rewards, _, _, infos = env.step(actions)
            passed.append((observations, rewards, infos))
    assert not env.agents
    return passed
