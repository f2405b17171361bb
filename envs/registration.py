"""Names the games for ``gymnasium.make``; imported for that by ``tokenprune.envs``."""

from gymnasium.envs.registration import register

_ADAPTERS = "tokenprune.envs.adapters"

register(
    id="tokenprune/TokenPrune-v0",
    entry_point=f"{_ADAPTERS}.gymnasium:TokenPruneGym",
    vector_entry_point=f"{_ADAPTERS}.gymnasium:TokenPruneVector",
)
