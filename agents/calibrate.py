"""``calibrate``: measures a pruned ViT's compute at many settings of its policy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from prunevit.agents.policies.calibration import Calibration, Knob
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.data.image_set import ImageSet

IMAGES = 256  # enough for a mean compute that is off by about 0.5% of the dense model's
POINTS = 13  # settings that are measured
BATCH_SIZE = 64
ODDS = (1e-4, 1e4)  # of keep, between which thresholds are measured
BEYOND = 100.0  # alphas are measured from that much below the policy's own to that much above
LEAST_STEP = 1e-4  # compute that differs by less counts as the same


class CalibrationError(ValueError):
    """A model's compute doesn't follow a setting of its policy; the message says why."""


def calibrate(
    model: PrunedViT, images: ImageSet | Tensor, size: int = IMAGES, points: int = POINTS
) -> Calibration:
    """Measures what share of the dense compute the model takes at each setting of its policy, and
    gives the policy the result: from then on ``model.compute = 0.6`` sets it.

    Settings are measured where the compute between two of them is farthest apart. The policy keeps
    the setting that it has, and whether it dithers.

    Args:
        model: the pruned ViT, in evaluation mode.
        images: what is typical of those that it will see; labels are not looked at.
        size: how many of them, evenly spread; all if there are fewer.
        points: number of settings to measure.

    Raises:
        CalibrationError: the policy is no ``LearnedPolicy``, its compute is the same at all
            settings, or there are no images.
    """
    policy = model.policy
    if not isinstance(policy, LearnedPolicy):
        raise CalibrationError(
            f"a {type(policy).__name__} has no setting that compute follows: only a LearnedPolicy "
            "can be calibrated"
        )
    knob: Knob = "threshold" if policy.alpha is None else "alpha"
    before = getattr(policy, knob)
    low, high = ODDS if policy.alpha is None else (policy.alpha / BEYOND, policy.alpha * BEYOND)
    batches = list(_batches(model, images, size))

    def value_of(scaled: float) -> float:
        """Odds as a threshold; alphas are themselves."""
        return scaled / (1 + scaled) if knob == "threshold" else scaled

    def measure(scaled: float) -> float:
        setattr(policy, knob, value_of(scaled))
        return _mean_compute(model, batches)

    try:
        measured = {low: measure(low), high: measure(high)}
        while len(measured) < points:
            known = sorted(measured)
            steps = pairwise(known)
            left, right = max(steps, key=lambda step: abs(measured[step[0]] - measured[step[1]]))
            measured[math.sqrt(left * right)] = measure(math.sqrt(left * right))
    finally:
        setattr(policy, knob, before)
    policy.calibration = Calibration(
        knob, *_falling([(value_of(at), measured[at]) for at in sorted(measured)]), policy.dither
    )
    return policy.calibration


def _falling(pairs: list[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The values, and their compute, without those that don't cost less than all before them."""
    kept = pairs[:1]
    for value, compute in pairs[1:]:
        if compute < kept[-1][1] - LEAST_STEP:
            kept.append((value, compute))
    if len(kept) < 2:
        raise CalibrationError(
            f"the policy takes {kept[0][1]:.3f} of the dense compute at its lowest setting, and no "
            "less at a higher one: it can't be calibrated"
        )
    return tuple(value for value, _ in kept), tuple(compute for _, compute in kept)


def _batches(model: PrunedViT, images: ImageSet | Tensor, size: int) -> Iterator[Tensor]:
    """``size`` of the images, evenly spread, on the model's device."""
    count = min(size, len(images))
    if not count:
        raise CalibrationError("no images to calibrate on")
    chosen = [i * len(images) // count for i in range(count)]
    backbone = model.backbone
    for start in range(0, count, BATCH_SIZE):
        some = chosen[start : start + BATCH_SIZE]
        pixels = images[some] if isinstance(images, Tensor) else images.load(some)[0]
        yield pixels.to(backbone.device, backbone.dtype)


@torch.inference_mode()
def _mean_compute(model: PrunedViT, batches: list[Tensor]) -> float:
    macs = sum(int(model.trace(pixels).macs.sum()) for pixels in batches)
    return macs / sum(map(len, batches)) / model.backbone.dense_macs
