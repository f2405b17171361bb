"""Registers the environments for ``gymnasium.make``; ``prunevit.envs`` imports it."""

from gymnasium.envs.registration import register

_ADAPTERS = "prunevit.envs.adapters"

register(
    id="prunevit/TokenPrune-v0",
    entry_point=f"{_ADAPTERS}.gymnasium:TokenPruneGym",
    vector_entry_point=f"{_ADAPTERS}.gymnasium:TokenPruneVector",
)
register(
    id="prunevit/TokenPruneAgents-v0",
    entry_point=f"{_ADAPTERS}.epymarl:TokenPruneAgents",
    # Gymnasium's checker expects one reward a step, this environment returns one for each agent
    disable_env_checker=True,
)
