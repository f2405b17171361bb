"""Names the games for ``gymnasium.make``; imported for that by ``prunevit.envs``."""

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
    # Gymnasium's checker knows one reward a step, this game has one an agent
    disable_env_checker=True,
)
