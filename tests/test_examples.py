"""The examples run as they stand, and what they train moves."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the checkout")


@pytest.fixture
def ppo():
    spec = importlib.util.spec_from_file_location("ppo", EXAMPLES / "ppo_single_file.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ppo_in_one_file_begins_dense_and_moves(ppo, monkeypatch, capsys):
    actors, make_policy = [], ppo.LearnedPolicy

    def watched(actor, fields):
        actors.extend([actor, copy.deepcopy(actor)])
        return make_policy(actor, fields)

    monkeypatch.setattr(ppo, "LearnedPolicy", watched)
    ppo.main(ppo.Args(images=8, iterations=2, test_images=50, device="cpu"))
    shown = capsys.readouterr().out
    rows = re.findall(r"iteration +(\d+): accuracy ([\d.]+)%, ([\d.]+) GMACs, ([\d.]+)%", shown)
    assert [row[0] for row in rows] == ["0", "2"]
    # nothing is pruned at first, and the policy has its price
    assert float(rows[0][1]) > 85
    assert 100 < float(rows[0][3]) < 105
    for now, before in zip(*(actor.parameters() for actor in actors), strict=True):
        assert now.isfinite().all()
        assert (now != before).any()


def test_its_rollouts_hold_what_the_living_are_paid(ppo):
    env = ppo.TokenPruneEnv(num_envs=4, prune_before=(1, 3), device="cpu").batched
    actor = ppo.network(*env.observation_space.shape, [0.0, 0.0])
    paid, alive, step = [], [], env.step

    def watched(actions):
        transition = step(actions)
        paid.append(transition.reward)
        alive.append(transition.observations.alive)
        return transition

    env.step = watched
    seen, acted, log_probs, returns = ppo.collect_rollout(env, actor)
    first = env.num_envs * env.num_agents
    assert len(seen) == len(acted) == len(log_probs) == first + int(alive[0].sum())
    torch.testing.assert_close(returns[:first], (paid[0] + paid[1]).flatten())
    torch.testing.assert_close(returns[first:], paid[1][alive[0]])
    torch.testing.assert_close(log_probs.exp(), torch.full_like(log_probs, 0.5))
    assert torch.equal(acted[:first].bool(), alive[0].flatten())


def test_ppo_in_one_file_is_short():
    assert len((EXAMPLES / "ppo_single_file.py").read_text().splitlines()) < 120
