"""A learner that knows nothing of us: a PPO of one page on the default environment, through
SuperSuit, as many begin with a PettingZoo environment.
"""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

from prunevit.envs.token_prune import TokenPruneEnv

COPIES, UPDATES, EPOCHS, MINIBATCH = 8, 120, 4, 1024


def network(inputs, initial_outputs):
    """Every row is ``initial_outputs`` before training."""
    last = nn.Linear(64, len(initial_outputs))
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor(initial_outputs)
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, 64), nn.Tanh(), last)


def collect_rollout(env, seen, stages, actor):
    """One episode of all copies: what was seen [T, R, D], chosen, its log-probability, paid."""
    observations, actions, log_probs, rewards = [], [], [], []
    for _ in range(stages):
        observations.append(torch.tensor(seen))
        with torch.no_grad():
            policy = Categorical(logits=actor(observations[-1]))
        actions.append(policy.sample())
        log_probs.append(policy.log_prob(actions[-1]))
        seen, paid, *_ = env.step(actions[-1].numpy())
        rewards.append(torch.tensor(paid))
    return seen, *map(torch.stack, (observations, actions, log_probs, rewards))


def train(env, stages):
    size = env.observation_space.shape[-1]
    # begins by keeping 95% at each stage
    actor, critic = network(size, [0.0, 3.0]), network(size, [0.0])
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], 1e-3, eps=1e-5)
    seen, _ = env.reset(seed=0)
    for _ in range(UPDATES):
        seen, observations, actions, log_probs, rewards = collect_rollout(env, seen, stages, actor)
        returns = rewards.flip(0).cumsum(0).flip(0)
        observations, actions, log_probs, returns = (
            values.flatten(0, 1) for values in (observations, actions, log_probs, returns)
        )
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(actions)).split(MINIBATCH):
                policy = Categorical(logits=actor(observations[rows]))
                value = critic(observations[rows]).squeeze(1)
                advantage = returns[rows] - value.detach()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                ratio = (policy.log_prob(actions[rows]) - log_probs[rows]).exp()
                clipped = ratio.clamp(0.8, 1.2)
                loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                loss = loss + 0.5 * (value - returns[rows]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([*actor.parameters(), *critic.parameters()], 0.5)
                optimizer.step()
    return actor


def judge(actor):
    """Accuracy and share of the dense compute of the sampling policy on test digits."""
    env = TokenPruneEnv(num_envs=200, split="test", device="cpu").batched
    observed, generator = env.reset(seed=0), torch.Generator().manual_seed(0)
    while env.outcome is None:
        with torch.no_grad():
            keep = actor(observed.observation).softmax(-1)[..., 1]
        chosen = torch.rand(keep.shape, generator=generator) < keep
        observed = env.step(chosen.long()).observations
    dense = env.game.backbone.dense_macs / 1e9
    return env.outcome.correct.float().mean().item(), (env.outcome.gmacs / dense).mean().item()


@pytest.mark.learning
@pytest.mark.integration("marl-peers")
def test_ppo_on_the_default_environment_keeps_what_matters():
    """With agents that left, it had pruned everything after 60 updates: 16.7% right."""
    from supersuit import concat_vec_envs_v1, pettingzoo_env_to_vec_env_v1

    torch.manual_seed(0)
    one = TokenPruneEnv(device="cpu")
    stages = one.batched.game.num_stages
    env = pettingzoo_env_to_vec_env_v1(one)
    env = concat_vec_envs_v1(env, COPIES, num_cpus=0, base_class="gymnasium")
    size = env.observation_space.shape[-1]
    before = judge(network(size, [0.0, 3.0]))
    accuracy, compute = judge(train(env, stages))
    assert accuracy > 0.85
    assert 0.3 < compute < before[1] - 0.03
