"""``LearnedPolicy``: a trained actor as a policy that decides without sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from prunevit.agents.policies.actor_critic import CommunicatingActor, TokenActor, logits_of
from prunevit.agents.policies.calibration import Calibration
from prunevit.agents.policies.dither import with_dither
from prunevit.envs.fields import field_size
from prunevit.envs.observations import View
from prunevit.envs.vit.macs import count_linear_macs
from prunevit.envs.vit.staged_vit import StagedViT


class LearnedPolicy(nn.Module):
    """A trained actor as a ``Policy``: keeps each patch whose probability of keep is high enough.

    ``alpha``, ``threshold`` and ``dither`` can be changed at any time.

    Args:
        actor: observations [R, D_obs] -> logits [R, 2]; or a ``CommunicatingActor``.
        fields: the fields that the actor observes.
        num_prefix: number of prefix tokens of the backbone it was trained with; None if unknown.
        alpha: weight of compute, for an actor that observes it. The higher it is, the fewer patches
            are kept.
        threshold: keep patches with a probability of keep above this.
        dither: vary the threshold over patches and stages, as sampling would, but with the same
            pattern every time, spread evenly over the image. A single threshold keeps or prunes
            similar patches all together; with dither, a share of them is kept that equals their
            probability.

    Attributes:
        calibration: what share of the dense compute the policy costs at which setting, with the
            backbone it was calibrated on; None before ``calibrate``.

    Raises:
        ValueError: ``alpha`` is not positive, missing for an actor that observes it or given for
            one that doesn't, or ``threshold`` is not between 0 and 1.
    """

    def __init__(
        self,
        actor: nn.Module,
        fields: Sequence[str],
        num_prefix: int | None = None,
        alpha: float | None = None,
        threshold: float = 0.5,
        dither: bool = False,
    ) -> None:
        super().__init__()
        self.actor = actor
        self.dither = dither
        self.fields = tuple(fields)
        self.num_prefix = num_prefix
        self.needs_attention = "cls_attention" in self.fields
        self.compares_patches = "redundancy" in self.fields
        self.macs_per_decision = count_linear_macs(actor)
        self.macs_per_pair = (
            actor.among_agents.macs_per_pair if isinstance(actor, CommunicatingActor) else 0
        )
        self.alpha = alpha
        self.threshold = threshold
        self.calibration: Calibration | None = None

    @property
    def threshold(self) -> float:
        return self._threshold

    @threshold.setter
    def threshold(self, probability: float) -> None:
        if not 0 < probability < 1:
            raise ValueError(f"threshold={probability}: a probability between 0 and 1")
        self._threshold = probability

    @property
    def alpha(self) -> float | None:
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float | None) -> None:
        if "alpha" not in self.fields:
            if alpha is not None:
                raise ValueError(
                    f"alpha={alpha}: the policy was trained for one alpha, it observes "
                    f"{', '.join(self.fields)}"
                )
        elif alpha is None or not 0 < alpha < math.inf:
            raise ValueError(f"alpha={alpha}: the policy needs a positive alpha")
        self._alpha = alpha

    def check_fits(self, backbone: StagedViT) -> None:
        """Checks that the policy can run on ``backbone``.

        Raises:
            ValueError: observations of the backbone have another size than the actor's, or it has
                another number of prefix tokens than the backbone of the training.
        """
        if self.num_prefix not in (None, backbone.num_prefix):
            raise ValueError(
                f"the policy was made for a backbone with {self.num_prefix} prefix tokens, "
                f"this one has {backbone.num_prefix}"
            )
        shown = {name: field_size(backbone, name) for name in self.fields}
        first: Any = next(layer for layer in self.actor.modules() if hasattr(layer, "in_features"))
        if first.in_features != sum(shown.values()):
            raise ValueError(
                f"the policy reads {first.in_features} numbers an agent, the backbone of width "
                f"{backbone.width} with {backbone.num_stages} stages shows {sum(shown.values())}: "
                f"{shown}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedPolicy:
        """Follows moves to another device but not to another dtype.

        The policy is tiny, and rounding would change its decisions.
        """
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def under_own_alpha(self, view: View) -> View:
        """``view`` with the policy's own alpha, if it has one."""
        return view if self.alpha is None else view.at_alpha(self.alpha)

    def forward(self, view: View) -> Tensor:
        view = self.under_own_alpha(view)
        actor, rows = self.actor, None
        if isinstance(actor, TokenActor) and actor.is_untouched():
            rows = view.rows(self.fields)
        if rows is None:
            logits = self.logits(view)
            margin = logits[:, 1] - logits[:, 0]
        else:
            assert isinstance(actor, TokenActor)
            margin = actor.margins(rows)
        # a sum is finite only if all its terms are, and a GPU is waited for only once
        if not math.isfinite(margin.sum()):
            raise ValueError("the policy's logits are not finite: check its weights and the images")
        return self.keep(view, view.scatter(margin) if rows is None else view.at_patches(margin))

    def keep(self, view: View, margin: Tensor) -> Tensor:
        """Decides which patches stay.

        Args:
            view: the patches.
            margin: logit of keep minus that of prune, float [B, N]; ignored for dead patches.

        Returns:
            bool [B, N].
        """
        if self.dither:
            margin = with_dither(view, margin)
        return (margin > math.log(self.threshold / (1 - self.threshold))) & view.alive

    def logits(self, view: View) -> Tensor:
        """Computes the actor's logits for the living patches, [R, 2]."""
        # nothing is padded for one image
        image = view.image if len(view.alive) != 1 else None
        return logits_of(self.actor, view.living(self.fields), image)
