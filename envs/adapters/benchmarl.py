"""BenchMARL: the game as a task, on the native TorchRL environment.

The task declares action masks, so BenchMARL passes them to policies: a pruned token can only prune,
and contributes no gradient to a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from prunevit.extras import needs

with needs("benchmarl"):
    from benchmarl.environments import TaskClass
    from tensordict import TensorDictBase
    from torchrl.data import Composite
    from torchrl.envs import EnvBase, Transform

    # inside, so that what is missing is named with this extra, which has TorchRL too
    from prunevit.envs.adapters.torchrl import GROUP, TokenPruneTorchRL


class LayerNormObservations(Transform):
    """Normalises observations and states to mean 0 and variance 1 over their features.

    The embeddings of a ViT are far from unit scale. Zeros stay zeros.
    """

    def __init__(self) -> None:
        keys = [(GROUP, "observation"), "state"]
        super().__init__(in_keys=keys, out_keys=keys)

    def _apply_transform(self, obs: Tensor) -> Tensor:
        return F.layer_norm(obs, obs.shape[-1:])

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> Any:
        return self._call(tensordict_reset)


class TokenPruneTask(TaskClass):
    """Token pruning as a task for ``benchmarl.experiment.Experiment``.

    Args:
        name: name of the task in BenchMARL's logs.
        config: arguments of ``TokenPruneEnv``, except for the device, which is the experiment's.
    """

    def __init__(self, name: str = "token_prune", config: dict[str, Any] | None = None) -> None:
        super().__init__(name, config or {})

    @staticmethod
    def env_name() -> str:
        return "prunevit"

    @staticmethod
    def log_info(batch: TensorDictBase) -> dict[str, float]:
        """Accuracy, and GMACs without the policy, of the episodes that ended."""
        ended = batch.get(("next", "done"))
        facts = batch.get(("next", "info"))
        return {
            "collection/accuracy": facts.get("correct")[ended].float().mean().item(),
            "collection/gmacs": facts.get("gmacs")[ended].mean().item(),
        }

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: Any
    ) -> Callable[[], EnvBase]:
        def make() -> EnvBase:
            env = TokenPruneTorchRL(num_envs, device=device, **self.config)
            env.set_seed(seed)
            return env

        return make

    def supports_continuous_actions(self) -> bool:
        return False

    def supports_discrete_actions(self) -> bool:
        return True

    def max_steps(self, env: EnvBase) -> int:
        return env.num_stages

    def has_render(self, env: EnvBase) -> bool:
        return False

    def group_map(self, env: EnvBase) -> dict[str, list[str]]:
        return env.group_map

    def observation_spec(self, env: EnvBase) -> Composite:
        return _only(env.full_observation_spec_unbatched, GROUP, "observation")

    def action_mask_spec(self, env: EnvBase) -> Composite:
        return _only(env.full_observation_spec_unbatched, GROUP, "action_mask")

    def state_spec(self, env: EnvBase) -> Composite:
        return _only(env.full_observation_spec_unbatched, "state")

    def info_spec(self, env: EnvBase) -> None:
        return None

    def action_spec(self, env: EnvBase) -> Composite:
        return env.full_action_spec_unbatched

    def get_env_transforms(self, env: EnvBase) -> list[Transform]:
        return [LayerNormObservations()]


def _only(spec: Composite, name: str, *below: str) -> Composite:
    """``spec`` reduced to one of its leaves."""
    kept = _only(spec[name], *below) if below else spec[name].clone()
    return Composite({name: kept}, shape=spec.shape, device=spec.device)
