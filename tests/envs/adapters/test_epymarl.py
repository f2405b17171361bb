"""EPyMARL: the form that ``gymma`` asks of an environment."""

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

import prunevit.envs  # noqa: F401 - registers

PATCHES, STAGES = 16, (0, 1, 3)


@pytest.mark.filterwarnings("error")
def test_its_form_is_that_of_gymma(vit, some_images):
    """As gymma goes about it: by name, behind a time limit, with lists of actions."""
    made = gymnasium.make(
        "prunevit.envs:prunevit/TokenPruneAgents-v0",
        backbone=vit,
        dataset=some_images,
        prune_before=STAGES,
        device="cpu",
    )
    env = TimeLimit(made, max_episode_steps=len(STAGES))
    assert env.unwrapped.n_agents == len(env.action_space) == len(env.observation_space) == PATCHES
    assert max(env.action_space, key=lambda space: space.n).n == 2
    sizes = {space.shape for space in env.observation_space}
    assert len(sizes) == 1
    seen, infos = env.reset(seed=1)
    assert seen in env.observation_space
    for stage in range(len(STAGES)):
        # whoever is pruned at once is still asked
        seen, rewards, done, _, infos = env.step(
            [i % 2 if stage == 0 else 1 for i in range(PATCHES)]
        )
        assert seen in env.observation_space
        assert len(rewards) == PATCHES
        assert all(type(reward) is float for reward in rewards)
        assert done == (stage + 1 == len(STAGES))
        assert done or (np.stack(seen).any(1) == (np.arange(PATCHES) % 2 == 1)).all()
    assert all(rewards)
    assert infos["gmacs"] > 0
    assert {type(value) for value in infos.values()} == {float}
