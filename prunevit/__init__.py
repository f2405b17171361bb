"""prunevit: token pruning in Vision Transformers as a game for multi-agent reinforcement learning.

The names below are imported when they are first used, so ``import prunevit`` alone is fast and does
not import PyTorch. Everything else lies in ``prunevit.envs``, ``prunevit.agents``,
``prunevit.trainers`` and ``prunevit.benchmarks``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunevit.versions import __version__

if TYPE_CHECKING:
    from prunevit.agents.pruned_vit import PrunedViT
    from prunevit.agents.pruning import prune
    from prunevit.envs.token_prune import TokenPruneEnv

__all__ = ["PrunedViT", "TokenPruneEnv", "__version__", "prune"]

# In a checkout the subpackages lie beside this folder; installed, they lie in it.
if not (Path(__file__).parent / "envs").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

_LAZY = {
    "PrunedViT": "prunevit.agents.pruned_vit",
    "TokenPruneEnv": "prunevit.envs.token_prune",
    "prune": "prunevit.agents.pruning",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
