"""PPO in one file, with one policy for all tokens: ``python examples/ppo_single_file.py``."""

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical

from prunevit.agents import PrunedViT
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.envs import BatchedTokenPrune, TokenPruneEnv
from prunevit.trainers.common.evaluation import evaluate

EPOCHS, MINIBATCH, CLIP, ENTROPY, MAX_GRAD_NORM = 4, 2048, 0.2, 0.003, 0.5


@dataclass
class Args:
    """PPO on the token-pruning game."""

    seed: int = 0
    """Seed of weights, images and actions."""
    images: int = 128
    """Images played at once."""
    iterations: int = 120
    """Rollouts, each followed by an update."""
    lr: float = 1e-3
    """Adam's learning rate at the start; it falls linearly to zero."""
    prune_before: tuple[int, ...] = (1, 3)
    """0-based blocks before which tokens can be pruned."""
    test_images: int = 2000
    """Test images of each evaluation."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def network(inputs: int, initial_outputs: list[float]) -> nn.Sequential:
    """[R, inputs] -> [R, outputs]; before training, every row is ``initial_outputs``."""
    last = nn.Linear(64, len(initial_outputs))
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor(initial_outputs)
    # the LayerNorm is needed: a ViT's embeddings are far from unit size
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, 64), nn.Tanh(), last)


@torch.no_grad()
def collect_rollout(env: BatchedTokenPrune, actor: nn.Module) -> tuple[Tensor, ...]:
    """Plays one episode of every image.

    Returns:
        For the R decisions of living tokens: observations [R, D_obs], actions [R],
        log-probabilities [R], and returns [R] (gamma = 1).
    """
    observed = env.reset()
    observations, actions, log_probs, alive, rewards = [], [], [], [], []
    for _ in range(env.game.num_stages):
        alive.append(observed.alive)  # [B, N]
        observations.append(observed.living())  # [living, D_obs]
        policy = Categorical(logits=actor(observations[-1]))
        actions.append(policy.sample())
        log_probs.append(policy.log_prob(actions[-1]))
        keep = torch.zeros(observed.alive.shape, dtype=torch.int64, device=env.device)
        keep[observed.alive] = actions[-1]
        transition = env.step(keep)
        rewards.append(transition.reward)  # [B, N]
        observed = transition.observations
    # A token is still paid after it was pruned. That belongs to the decision that pruned it.
    returns = torch.stack(rewards).flip(0).cumsum(0).flip(0)[torch.stack(alive)]
    return torch.cat(observations), torch.cat(actions), torch.cat(log_probs), returns


def main(args: Args) -> None:
    """Trains, and prints accuracy and compute of the greedy policy on test images."""
    torch.manual_seed(args.seed)
    game = {"prune_before": args.prune_before, "device": args.device}
    env = TokenPruneEnv(num_envs=args.images, **game).batched
    test = TokenPruneEnv(num_envs=1, split="test", **game).batched.images
    (size,) = env.observation_space.shape
    actor = network(size, [0.0, 1.0])  # logits of prune, keep: starts by keeping 73%
    critic = network(size, [0.0])
    actor_critic = nn.ModuleList([actor, critic]).to(env.device)
    optimizer = torch.optim.Adam(actor_critic.parameters(), args.lr, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.iterations)
    model = PrunedViT(env.game.backbone, LearnedPolicy(actor, env.fields))

    def report(iteration: int) -> None:
        result = evaluate(model, test, args.test_images)
        compute = result.gmacs * 1e9 / model.backbone.dense_macs
        cost = f"{result.gmacs:.4f} GMACs, {compute:.1%} of dense"
        print(f"iteration {iteration:>4}: accuracy {result.accuracy:.2%}, {cost}")

    env.reset(args.seed)  # seeds the images of all rollouts
    report(0)
    for iteration in range(1, args.iterations + 1):
        observations, actions, old_log_probs, returns = collect_rollout(env, actor)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(actions), device=env.device).split(MINIBATCH):
                policy = Categorical(logits=actor(observations[rows]))
                value = critic(observations[rows]).squeeze(1)
                advantage = returns[rows] - value.detach()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                ratio = (policy.log_prob(actions[rows]) - old_log_probs[rows]).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                value_loss = (value - returns[rows]).square().mean()
                loss = policy_loss + 0.5 * value_loss - ENTROPY * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(actor_critic.parameters(), MAX_GRAD_NORM)
                optimizer.step()
        schedule.step()
        if iteration % 50 == 0 or iteration == args.iterations:
            report(iteration)


if __name__ == "__main__":
    main(tyro.cli(Args))
