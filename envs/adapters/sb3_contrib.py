"""sb3-contrib's ``MaskablePPO`` on ``TokenVecEnv``: the masks stop pruned tokens from keeping."""

from __future__ import annotations

from prunevit.envs.adapters.sb3 import LivingRollouts
from prunevit.extras import needs

with needs("sb3"):
    from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer


class LivingMaskedRollouts(LivingRollouts, MaskableRolloutBuffer):
    """``LivingRollouts`` for ``MaskablePPO``."""

    arrays = (*LivingRollouts.arrays, "action_masks")
