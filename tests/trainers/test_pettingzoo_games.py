"""MAPPO learns PettingZoo games through the code path that the token game takes; that it learns
``simple_spread``, beside its peers, is tested with benchmarks.marl_peers.
"""

from dataclasses import replace

import pytest
import torch

from tokenprune.trainers.config import defaults_for
from tokenprune.trainers.mappo import Trainer
from tokenprune.trainers.tasks import PettingZooTask

# the least that training must bring to an episode's return, and what it takes
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
        {"iterations": 14},
        1.0,
    ),
    # knights and archers are killed one by one while the others play on
    "pettingzoo.butterfly.knights_archers_zombies_v11": (
        {"spawn_delay": 10, "max_cycles": 300},
        {"iterations": 12, "num_envs": 8, "rollout_steps": 160},
        0.4,
    ),
}


@pytest.mark.slow
@pytest.mark.no_cover  # tracing what the games call takes longer than playing them
@pytest.mark.parametrize("game", GAMES)
def test_learns_beyond_random(game):
    env_kwargs, settings, least_gain = GAMES[game]
    config = replace(defaults_for(f"pettingzoo:{game}"), env_kwargs=env_kwargs, **settings)
    task = PettingZooTask(config)
    torch.manual_seed(config.seed)
    trainer = Trainer(task.env, task.make_actor(), config)
    # a fresh actor's actions are about as likely: the first iterations are played at random
    returns = [trainer.iterate()["episode_return"] for _ in range(config.iterations)]
    task.env.close()
    before, after = sum(returns[:3]) / 3, sum(returns[-3:]) / 3
    assert after - before > least_gain, returns
