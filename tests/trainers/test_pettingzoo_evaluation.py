"""What an evaluation on a PettingZoo game counts."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from pettingzoo import ParallelEnv

from prunevit.trainers.common import experiments
from prunevit.trainers.common.config import defaults_for
from prunevit.trainers.mappo import Learner

SEEN = np.zeros(1, np.float32)


class Paid(ParallelEnv):
    """One of two agents is paid 1 a step; it leaves after two steps, the other after ``length``,
    if ever.
    """

    metadata = {"name": "paid"}  # noqa: RUF012
    possible_agents = ["a", "b"]  # noqa: RUF012

    def __init__(self, length):
        self.length = length

    def observation_space(self, agent):
        return gymnasium.spaces.Box(-1, 1, (1,))

    def action_space(self, agent):
        return gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.agents, self.steps = ["a", "b"], 0
        return dict.fromkeys(self.agents, SEEN), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.steps += 1
        acting = self.agents
        gone = {
            "a": self.steps == 2 or self.steps == self.length,
            "b": self.steps == self.length,
        }
        self.agents = [agent for agent in acting if not gone[agent]]
        return (
            dict.fromkeys(acting, SEEN),
            {agent: float(agent == "a") for agent in acting},
            {agent: gone[agent] for agent in acting},
            dict.fromkeys(acting, False),
            {agent: {} for agent in acting},
        )


@pytest.mark.parametrize(
    ("length", "longest", "expected"),
    [
        (4, 10, 1.0),  # the mean over both: 2 and nothing
        (1, 10, 0.5),
        (None, 5, 0.5),  # it never ends: stretches in which 2, then nothing is paid, mean of both
        (4, 3, 0.5),  # the third step's end is none of the game's
    ],
)
def test_episodes_count_to_their_end_or_to_the_longest(length, longest, expected, monkeypatch):
    monkeypatch.setattr(experiments, "make_pettingzoo", lambda name, **kwargs: lambda: Paid(length))
    monkeypatch.setattr(experiments, "LONGEST_EPISODE", longest)
    config = replace(defaults_for("pettingzoo:paid"), num_envs=3, eval_size=6)
    task = experiments.PettingZooExperiment(config)
    found = task.evaluate(task.make_actor())
    assert found == {
        "validation_episode_return": expected,
        "validation_sampled_return": expected,
    }


@pytest.mark.parametrize("hidden_layers", ["gelu", "relu-norm"])
def test_actor_and_critic_have_the_layers_that_are_asked_for(hidden_layers, monkeypatch):
    monkeypatch.setattr(experiments, "make_pettingzoo", lambda name, **kwargs: lambda: Paid(4))
    config = replace(defaults_for("pettingzoo:paid"), num_envs=3, hidden_layers=hidden_layers)
    task = experiments.PettingZooExperiment(config)
    learner = Learner(task.make_actor(), task.env, config)
    between = ["GELU"] if hidden_layers == "gelu" else ["ReLU", "LayerNorm"]
    layers = [*2 * ["Linear", *between], "Linear"]
    assert [type(layer).__name__ for layer in learner.actor.net] == ["LayerNorm", *layers]
    assert [type(layer).__name__ for layer in learner.critic.net] == layers
