"""MAPPO learns PettingZoo games through the code path that the token game takes; that it learns
``simple_spread``, beside its peers, is tested with benchmarks.marl.compare.
"""

from dataclasses import replace

import pytest
import torch

from prunevit.agents.policies.actor_critic import Actor
from prunevit.trainers.common.config import defaults_for
from prunevit.trainers.common.experiments import PettingZooExperiment
from prunevit.trainers.mappo import Trainer

# the least that training must bring, and what it takes: returns of random play are measured here
GAMES = {
    "pettingzoo.sisl.pursuit_v5": (
        {
            "x_size": 8,
            "y_size": 8,
            "n_evaders": 4,
            "n_pursuers": 4,
            "obs_range": 5,
            "max_cycles": 50,
            "surround": False,
        },
        {"iterations": 24},
        1.5,
    ),
    # knights and archers are killed one by one while the others play on
    "pettingzoo.butterfly.knights_archers_zombies_v11": (
        {"spawn_delay": 10, "max_cycles": 300},
        {"iterations": 12, "rollout_steps": 160},
        0.4,
    ),
}


@pytest.mark.learning
@pytest.mark.integration("games")
@pytest.mark.no_cover  # tracing what the games call takes as long as playing them
@pytest.mark.parametrize("game", GAMES)
def test_learns_beyond_random(game):
    env_kwargs, settings, least_gain = GAMES[game]
    config = replace(
        defaults_for(f"pettingzoo:{game}"), env_kwargs=env_kwargs, eval_size=24, **settings
    )
    task = PettingZooExperiment(config)
    untrained = Actor(task.env.observation_space.shape[0], int(task.env.action_space.n), (64, 64))
    for parameter in untrained.parameters():
        torch.nn.init.zeros_(parameter)  # uniform: every action is as likely
    before = task.evaluate(untrained)["validation_sampled_return"]
    torch.manual_seed(config.seed)
    trainer = Trainer(task.env, task.make_actor(), config)
    for _ in range(config.iterations):
        trainer.iterate()
    after = task.evaluate(trainer.learner.actor)["validation_sampled_return"]
    task.env.close()
    assert after - before > least_gain, f"{before:.2f} at random, {after:.2f} after training"
