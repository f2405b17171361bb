"""The game: token pruning as a Markov game, for any RL code to drive."""

from tokenprune.envs import registration  # noqa: F401 - gymnasium.make knows the names from here on
from tokenprune.envs.backbone import StagedViT, UnsupportedBackboneError
from tokenprune.envs.batched import BatchedEnv, Observed, Transition
from tokenprune.envs.batched_pettingzoo import BatchedPettingZoo
from tokenprune.envs.batched_tokens import BatchedTokenPrune
from tokenprune.envs.game import TokenGame
from tokenprune.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward
from tokenprune.envs.token_prune import TokenPruneEnv

__all__ = [
    "BatchedEnv",
    "BatchedPettingZoo",
    "BatchedTokenPrune",
    "MarkovGameReward",
    "Observed",
    "ReleasedCodeReward",
    "StagedViT",
    "TeamReward",
    "TokenGame",
    "TokenPruneEnv",
    "Transition",
    "UnsupportedBackboneError",
]
