"""The straw does what our trainer does: from the same actions it learns the same."""

import copy

import pytest
import torch

from prunevit.benchmarks.iterations import WatchedTrainer
from prunevit.benchmarks.peers.straw import Straw
from prunevit.trainers.common.config import MappoConfig

TINY = {
    "num_envs": 12, "rollouts_per_image": 4, "prune_before": (1, 3), "hidden": (8,),
    "keep_bias": 0.5, "lr": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"gamma": 0.9, "reward": "markov-game"}, {"max_grad_norm": 0.01, "epochs": 2}]
)
def test_the_same_actions_teach_the_same(vit, some_images, changes):
    watched = WatchedTrainer(MappoConfig(**TINY | changes), vit, some_images)
    learner = copy.deepcopy(watched.trainer.learner)
    first = copy.deepcopy(learner.state_dict())
    watched.iterate()
    # the schedule's rate of the first iteration
    assert learner.optimizer.param_groups[0]["lr"] == TINY["lr"]
    played = watched.played
    alive, waiting = torch.ones_like(played.keeps[0]), []
    for keep in played.keeps:
        waiting.append([kept[living].long() for kept, living in zip(keep, alive, strict=True)])
        alive = alive & keep

    straw = Straw(learner, watched.game, watched.env.fields)
    asked = straw.iterate(
        played.images, played.labels, lambda log_probs, stage: waiting[stage].pop(0)
    )
    assert asked == played.decisions
    assert waiting == [[], []]
    moved = 0.0
    for name, theirs in learner.state_dict().items():
        ours = watched.trainer.learner.state_dict()[name]
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5, msg=name)
        moved = max(moved, float((ours - first[name]).abs().max()))
    assert moved > 1e-3


def test_what_it_can_not_do_is_refused(vit, some_images):
    config = MappoConfig(**TINY | {"critic": "central"})
    watched = WatchedTrainer(config, vit, some_images)
    with pytest.raises(ValueError, match="without a critic"):
        Straw(watched.trainer.learner, watched.game, watched.env.fields)
