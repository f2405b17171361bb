"""PPO with one policy and one critic for all tokens: ``python examples/ppo_single_file.py``."""

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical

from prunevit.agents import PrunedViT
from prunevit.agents.policies.actor_critic import LearnedPolicy
from prunevit.envs import BatchedTokenPrune, TokenPruneEnv
from prunevit.trainers.common.evaluation import evaluate

EPOCHS, MINIBATCH, CLIP, ENTROPY, MAX_GRAD_NORM = 4, 2048, 0.2, 0.003, 0.5


@dataclass
class Args:
    """PPO on the token-pruning game."""

    seed: int = 0
    """Seeds weights, images and actions."""
    images: int = 128
    """Images that are played at once."""
    iterations: int = 120
    """Rounds in which all images are played to the end."""
    lr: float = 1e-3
    """Adam's learning rate at the start; it falls to zero."""
    prune_before: tuple[int, ...] = (1, 3)
    """Blocks, 0-based, before which tokens can be pruned."""
    test_images: int = 2000
    """Images on which the policy is judged before and after."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def network(inputs: int, start: list[float]) -> nn.Sequential:
    """[R, inputs] -> [R, outputs], whose first values are ``start``."""
    last = nn.Linear(64, len(start))
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor(start)
    # the embeddings of a ViT are far from unit size
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, 64), nn.Tanh(), last)


@torch.no_grad()
def rollout(env: BatchedTokenPrune, actor: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plays all images to the end.

    Returns:
        Of the R decisions of living tokens: what was seen [R, D_obs], and [R] each: the actions,
        their log-probabilities, and all that the token was paid from then on.
    """
    observed, seen, acted, log_probs, alive, rewards = env.reset(), [], [], [], [], []
    for _ in range(env.game.num_stages):
        seen.append(observed.living())
        alive.append(observed.alive)
        choice = Categorical(logits=actor(seen[-1]))
        acted.append(choice.sample())
        log_probs.append(choice.log_prob(acted[-1]))
        actions = torch.zeros(observed.alive.shape, dtype=torch.int64, device=env.device)
        actions[observed.alive] = acted[-1]
        transition = env.step(actions)
        rewards.append(transition.reward)
        observed = transition.observations
    # what a token is paid after it was pruned, it owes to its last decision; [T, B, N]
    returns = torch.stack(rewards).flip(0).cumsum(0).flip(0)
    return torch.cat(seen), torch.cat(acted), torch.cat(log_probs), returns[torch.stack(alive)]


def main(args: Args) -> None:
    """Trains, and prints accuracy and cost of the policy that prunes for good."""
    torch.manual_seed(args.seed)
    game = {"prune_before": args.prune_before, "device": args.device}
    env = TokenPruneEnv(num_envs=args.images, **game).batched
    test = TokenPruneEnv(num_envs=1, split="test", **game).batched.images
    (size,) = env.observation_space.shape
    # begins by keeping three tokens of four
    actor, critic = network(size, [0.0, 1.0]), network(size, [0.0])
    both = nn.ModuleList([actor, critic]).to(env.device)
    optimizer = torch.optim.Adam(both.parameters(), args.lr, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.iterations)
    model = PrunedViT(env.game.backbone, LearnedPolicy(actor, env.fields))

    def judge(iteration: int) -> None:
        done = evaluate(model, test, args.test_images)
        share = done.gmacs * 1e9 / model.backbone.dense_macs
        cost = f"{done.gmacs:.4f} GMACs, {share:.1%} of dense"
        print(f"iteration {iteration:>4}: accuracy {done.accuracy:.2%}, {cost}")

    env.reset(args.seed)  # rollouts go on from here
    judge(0)
    for iteration in range(1, args.iterations + 1):
        seen, acted, log_probs, returns = rollout(env, actor)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(seen), device=env.device).split(MINIBATCH):
                choice = Categorical(logits=actor(seen[rows]))
                value = critic(seen[rows]).squeeze(1)
                advantage = returns[rows] - value.detach()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                ratio = (choice.log_prob(acted[rows]) - log_probs[rows]).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                gain = torch.min(ratio * advantage, clipped * advantage).mean()
                error = (value - returns[rows]).square().mean()
                loss = 0.5 * error - gain - ENTROPY * choice.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(both.parameters(), MAX_GRAD_NORM)
                optimizer.step()
        schedule.step()
        if iteration % 50 == 0 or iteration == args.iterations:
            judge(iteration)


if __name__ == "__main__":
    main(tyro.cli(Args))
