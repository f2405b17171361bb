"""``model.compute``: a learned policy set to a share of the dense compute."""

import math

import pytest
import torch

from prunevit.agents import (
    CalibrationError,
    KeepAll,
    LearnedPolicy,
    PrunedViT,
    TokenActor,
    calibrate,
    prune,
)
from prunevit.agents.policies.calibration import Calibration
from prunevit.agents.policies.serialization import SavedModelError, make_policy
from prunevit.envs.fields import field_slices
from prunevit.envs.vit.staged_vit import StagedViT

SHAPE = {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 8}  # not to be seen on a model
FIELDS = {"threshold": ("token", "stage"), "alpha": ("token", "stage", "alpha")}


def make_model(vit, knob, dither=False):
    """A model whose random policy prunes more with a higher ``alpha`` or ``threshold``."""
    backbone = StagedViT(vit, (1, 3))
    slices = field_slices(backbone, FIELDS[knob])
    size = max(columns.stop for columns in slices.values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        alpha = slices["alpha"].start if knob == "alpha" else None
        actor = TokenActor(size, (8,), None, keep_bias=0.0, alpha=alpha)
        for parameter in actor.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    policy = LearnedPolicy(
        actor, FIELDS[knob], alpha=0.1 if knob == "alpha" else None, dither=dither
    )
    return PrunedViT(backbone, policy.requires_grad_(False), SHAPE).eval()


@torch.no_grad()
def compute_of(model, images):
    return float(model.trace(images).macs.float().mean()) / model.backbone.dense_macs


@pytest.fixture
def images(make_images):
    return make_images(48).images


@pytest.mark.parametrize("dither", [False, True])
def test_the_model_takes_the_compute_that_was_set(vit, images, dither):
    model = make_model(vit, "threshold", dither)
    calibration = calibrate(model, images)
    low, high = calibration.lowest, calibration.highest
    assert high - low > 0.3
    for share in (low, 0.7 * low + 0.3 * high, 0.4 * low + 0.6 * high, high):
        model.compute = share
        assert model.compute == pytest.approx(share, abs=1e-9)
        assert compute_of(model, images) == pytest.approx(share, abs=0.03)


def test_calibrating_changes_no_setting(vit, some_images):
    model = make_model(vit, "threshold")
    model.policy.threshold = 0.3
    calibrate(model, some_images, points=5)
    assert model.policy.threshold == 0.3
    assert len(model.policy.calibration.values) <= 5
    # what it costs now, without being measured again
    assert model.compute == pytest.approx(compute_of(model, some_images.images), abs=0.1)


def test_a_setting_that_was_not_measured_has_no_known_compute(vit, some_images):
    model = make_model(vit, "threshold")
    assert model.compute is None
    calibrate(model, some_images, points=4)
    model.policy.threshold = 1e-9
    assert model.compute is None
    model.compute = 0.9 * model.policy.calibration.highest
    assert model.compute is not None
    model.policy.dither = True
    assert model.compute is None
    model.compute = 0.9 * model.policy.calibration.highest
    assert not model.policy.dither


def test_a_policy_for_a_range_of_alphas_is_set_by_alpha(vit, images):
    model = make_model(vit, "alpha")
    model.policy.actor.alpha_weight.fill_(-0.3)  # a higher alpha prunes more
    calibration = calibrate(model, images)
    assert calibration.knob == "alpha"
    model.compute = share = (calibration.lowest + calibration.highest) / 2
    assert model.policy.threshold == 0.5
    assert compute_of(model, images) == pytest.approx(share, abs=0.03)


def test_the_calibration_is_saved_with_the_model(vit, some_images, tmp_path):
    model = make_model(vit, "threshold")
    calibration = calibrate(model, some_images, points=6)
    model.save_pretrained(tmp_path)
    again = PrunedViT.from_pretrained(tmp_path)
    assert again.policy.calibration == calibration
    again.compute = model.compute = calibration.highest - 0.1
    assert again.policy.threshold == model.policy.threshold


# --- bad input ---


def test_what_the_policy_can_not_cost_says_the_range(vit, some_images):
    model = make_model(vit, "threshold")
    with pytest.raises(ValueError, match=r"compute=0\.5: the model's LearnedPolicy was not calib"):
        model.compute = 0.5
    known = calibrate(model, some_images, points=4)
    for share in (0.0, known.lowest - 0.01, known.highest + 0.01, 60, math.nan):
        with pytest.raises(ValueError, match=rf"takes {known.lowest:.3f} to {known.highest:.3f} "):
            model.compute = share


def test_other_policies_have_no_such_knob(vit, some_images):
    model = prune(vit, KeepAll(), (1,))
    with pytest.raises(CalibrationError, match="a KeepAll has no setting that compute follows"):
        calibrate(model, some_images)
    with pytest.raises(ValueError, match="KeepAll was not calibrated"):
        model.compute = 0.5
    assert model.compute is None


def test_a_policy_that_always_costs_the_same_is_not_calibrated(vit, some_images):
    model = make_model(vit, "threshold")
    for parameter in model.policy.actor.parameters():
        parameter.zero_()
    model.policy.actor.net[-1].bias[1] = 50.0  # keeps all, whatever the threshold
    with pytest.raises(CalibrationError, match="at its lowest setting, and no less"):
        calibrate(model, some_images, points=3)
    with pytest.raises(CalibrationError, match="no images"):
        calibrate(model, some_images.images[:0])


GOOD = {"knob": "threshold", "values": [0.1, 0.5], "compute": [0.8, 0.3], "dither": False}


@pytest.mark.parametrize(
    "damage",
    [
        {"knob": "keep"},
        {"values": [0.5, 0.1]},
        {"values": [0.1]},
        {"values": [0.1, 1.5]},
        {"values": ["a", "b"]},
        {"values": 3},
        {"compute": [0.3, 0.8]},
        {"compute": [0.8, math.nan]},
        {"compute": [0.8, 0.3, 0.1]},
        {
            "values": [i / 999 for i in range(1, 200)],
            "compute": [1 - i / 999 for i in range(199)],
        },
    ],
)
def test_damaged_files_are_refused(vit, damage):
    described = {
        "kind": "learned",
        "observation": ["token", "stage"],
        "hidden": [8],
        "attention_prior": False,
    }
    backbone = StagedViT(vit, (1, 3))
    known = make_policy(described | {"calibration": GOOD}, backbone).calibration
    assert known == Calibration.from_json(GOOD)
    with pytest.raises(SavedModelError, match="is no calibration"):
        make_policy(described | {"calibration": GOOD | damage}, backbone)
    assert make_policy(described, backbone).calibration is None  # models of before
