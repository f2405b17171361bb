"""A small PettingZoo game that needs no other library: agents walk along a line to landmarks of
their own, and are paid minus the distance. It resets by seed and ends after ``max_cycles`` steps.
"""

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

STEP = 0.1


class Walk(ParallelEnv):
    metadata = {"name": "walk_v0", "render_modes": []}  # noqa: RUF012

    def __init__(self, N=3, max_cycles=25):
        self.possible_agents = [f"agent_{i}" for i in range(N)]
        self.max_cycles = max_cycles
        self.random = np.random.default_rng()

    def observation_space(self, agent):
        return Box(-np.inf, np.inf, (2,), np.float32)

    def action_space(self, agent):
        return Discrete(3)

    def observations(self):
        pairs = np.stack([self.places, self.landmarks], axis=1).astype(np.float32)
        return dict(zip(self.possible_agents, pairs, strict=True))

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents, self.t = self.possible_agents[:], 0
        self.places, self.landmarks = self.random.uniform(-1, 1, (2, len(self.agents)))
        return self.observations(), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.t += 1
        moves = [actions[agent] - 1 for agent in self.possible_agents]  # left, stay, right
        self.places = self.places + STEP * np.array(moves)
        distances = np.abs(self.places - self.landmarks)
        agents, over = self.agents, self.t == self.max_cycles
        self.agents = [] if over else agents
        return (
            self.observations(),
            {agent: -float(far) for agent, far in zip(agents, distances, strict=True)},
            dict.fromkeys(agents, False),
            dict.fromkeys(agents, over),
            {agent: {} for agent in agents},
        )


parallel_env = Walk
