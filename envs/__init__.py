"""The environment: token pruning in Vision Transformers as a Markov game."""

from prunevit.envs import registration  # noqa: F401 - registers the environments
from prunevit.envs.batched.pettingzoo import BatchedPettingZoo
from prunevit.envs.batched.protocol import BatchedEnv, Observations, Transition
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.game import TokenGame
from prunevit.envs.rewards import MarkovGameReward, ReleasedCodeReward, TeamReward
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

__all__ = [
    "BatchedEnv",
    "BatchedPettingZoo",
    "BatchedTokenPrune",
    "MarkovGameReward",
    "Observations",
    "ReleasedCodeReward",
    "StagedViT",
    "TeamReward",
    "TokenGame",
    "TokenPruneEnv",
    "Transition",
    "UnsupportedBackboneError",
]
