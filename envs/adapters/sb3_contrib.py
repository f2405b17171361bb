"""sb3-contrib: the rollout buffer for ``MaskablePPO`` on ``TokenVecEnv``."""

from __future__ import annotations

from prunevit.envs.adapters.sb3 import TokenRolloutBuffer
from prunevit.extras import needs

with needs("sb3"):
    from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer


class MaskableTokenRolloutBuffer(TokenRolloutBuffer, MaskableRolloutBuffer):
    """``TokenRolloutBuffer`` for ``MaskablePPO``."""

    arrays = (*TokenRolloutBuffer.arrays, "action_masks")
