"""Rivals against outputs of their authors' code, see tests/fixtures/originals/README.md."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from prunevit.agents import DynamicViTPolicy, PrunedViT
from prunevit.benchmarks.baselines import diffrate, evit, tome
from prunevit.benchmarks.baselines.ats import ATS
from prunevit.benchmarks.baselines.ltmp import LTMPViT, masked_pass
from prunevit.benchmarks.baselines.pitome import PiToMeViT, share_merges
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common import masked_vit

FIXTURES = Path(__file__).parents[1] / "fixtures" / "originals"
SIZES = {
    "img_size": 56, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2, "mlp_ratio": 2.0,
    "num_classes": 10,
}  # fmt: skip
BOUND = {"rtol": 0, "atol": 1e-4}


def fixed_weights(module, seed):
    """Random weights that anyone can draw again; attention is sharp, and norms are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in sorted(module.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1 and name.endswith("weight"):
            drawn *= 1.5 * drawn[0].numel() ** -0.5
        elif name.endswith("weight"):
            drawn = 1 + 0.1 * drawn
        elif name.endswith("bias"):
            drawn *= 0.1
        weights[name] = drawn
    return weights


def fixed_model(kind=VisionTransformer):
    model = kind(**SIZES).double().eval().requires_grad_(False)
    model.load_state_dict(fixed_weights(model, 0))
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 56, 56, generator=generator, dtype=torch.float64)


def original(method, case):
    """What the authors' code did."""
    return json.loads((FIXTURES / f"{method}.json").read_text(encoding="utf-8"))[case]


def assert_same_logits(logits, recorded):
    expected = torch.tensor(recorded, dtype=torch.float64)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, **BOUND)


@pytest.mark.parametrize("schedule", ["even", "uneven"])
@pytest.mark.parametrize("kind", [VisionTransformer, VisionTransformerDistilled])
def test_tome_merges_the_originals_tokens(images, monkeypatch, kind, schedule):
    name = "class token" if kind is VisionTransformer else "distilled"
    theirs = original("tome", f"{name}, {schedule}")
    model = fixed_model(kind)
    prefix = model.num_prefix_tokens
    # where each patch is in the end, followed through every merge
    place = torch.arange(196).expand(3, -1)
    merge = tome.merge

    def followed(x, size, num_prefix, matching):
        nonlocal place
        staying, count = matching.stays.shape[1], x.shape[1]
        sources, targets = tome.split(torch.arange(count)[None], num_prefix)
        moved = torch.empty(3, count, dtype=torch.int64)
        moved[:, targets[0]] = staying + torch.arange(targets.shape[1])
        for image in range(3):
            moved[image, sources[0, matching.stays[image]]] = torch.arange(staying)
            moved[image, sources[0, matching.merges[image]]] = staying + matching.into[image]
        place = moved.gather(1, place)
        return merge(x, size, num_prefix, matching)

    monkeypatch.setattr(tome, "merge", followed)
    logits = tome.ToMeViT(model, theirs["merges"])(images)
    assert (place + prefix).tolist() == [image[prefix:] for image in theirs["place"]]
    assert_same_logits(logits, theirs["logits"])


class FollowedPiToMe(PiToMeViT):
    """Knows which of the 196 patches each token holds."""

    def _merge(self, index, keys, patches, size, count):
        held = self.held if index else torch.eye(196, dtype=patches.dtype).expand(3, -1, -1)
        joined = torch.cat([patches, held], dim=2)
        merged, size = super()._merge(index, keys, joined, size, count)
        width = patches.shape[2]
        self.held = (merged[..., width:] > 0).to(patches.dtype)
        return merged[..., :width], size


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_pitome_merges_the_originals_tokens(images, share):
    theirs = original("pitome", f"share {share}")
    # their image classifier doesn't know how many patches a token stands for
    model = FollowedPiToMe(fixed_model(), share_merges(196, share, 6), proportional=False)
    logits = model(images)
    token = model.held.argmax(1)  # that holds each patch
    group = (token[:, :, None] == token[:, None]).byte().argmax(2)  # the first patch in it
    assert group.tolist() == theirs["group"]
    assert_same_logits(logits, theirs["logits"])


@pytest.mark.parametrize("case", ["fused", "unfused"])
def test_evit_keeps_the_originals_tokens(images, monkeypatch, case):
    theirs = original("evit", case)
    stages = [i + 1 for i, rate in enumerate(theirs["keep_rates"]) if rate < 1]
    tokens = [len(kept[0]) for kept in theirs["kept"]]
    reorganise = evit.reorganise
    # which patch each is; fused ones are numbered from 196 on
    numbers, kept = torch.arange(196).expand(3, -1), []

    def followed(patches, attention, count, with_fused):
        nonlocal numbers
        stage = len(kept)
        numbers = numbers.gather(1, attention.topk(count).indices.sort(1).values)
        kept.append(numbers.tolist())
        if with_fused:
            numbers = torch.cat([numbers, torch.full((3, 1), 196 + stage)], dim=1)
        return reorganise(patches, attention, count, with_fused)

    monkeypatch.setattr(evit, "reorganise", followed)
    logits = evit.EViT(fixed_model(), stages, tokens, case == "fused")(images)
    assert kept == theirs["kept"]
    assert_same_logits(logits, theirs["logits"])


@pytest.mark.parametrize("samples", [60, 196, 400])
def test_ats_samples_the_originals_tokens(images, samples):
    theirs = original("ats", f"{samples} samples")
    trace = ATS(StagedViT(fixed_model(), (2, 4, 5)), (samples,) * 3).trace(images)
    kept = [[stage.nonzero()[:, 0].tolist() for stage in image] for image in trace.alive]
    assert kept == theirs["kept"]
    assert_same_logits(trace.logits, theirs["logits"])


def test_ltmp_keeps_as_many_tokens_as_the_original(images):
    theirs = original("ltmp", "inference")
    backbone = StagedViT(fixed_model(), (1, 2, 3, 4, 5))
    trace = LTMPViT(backbone, theirs["merge"], theirs["prune"]).trace(images)
    # behind the last block are no stages, but logits
    assert (trace.alive.sum(2) + 1).tolist() == [image[:-1] for image in theirs["tokens"]]
    assert_same_logits(trace.logits, theirs["logits"])


def test_ltmp_has_the_originals_masks_and_gradients(images):
    """The loss is theirs: it doesn't count what an image costs outside of the blocks."""
    thresholds, theirs = original("ltmp", "inference"), original("ltmp", "training")
    merge, prune = (
        torch.tensor(thresholds[name], dtype=torch.float64, requires_grad=True)
        for name in ("merge", "prune")
    )
    logits, history = masked_pass(StagedViT(fixed_model(), (1, 3)), images, merge, prune)
    kept = [[image.nonzero()[:, 0].tolist() for image in alive] for alive in history]
    assert kept == theirs["alive"]
    assert_same_logits(logits.detach(), theirs["logits"])
    before, after = (197 * torch.stack([alive.mean() for alive in part]) for part in (
        (torch.ones(3, 197), *history[:-1]), history))  # fmt: skip
    spent = (2 * before * 32**2 + before**2 * 32 + 4 * after * 32**2).mean()
    share = spent / (6 * 197 * 32**2 + 197**2 * 32)
    labels = torch.tensor(theirs["labels"])
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1) + 10 * (share - 0.75) ** 2
    loss.backward()
    assert loss.item() == pytest.approx(theirs["loss"], abs=1e-4)
    assert merge.grad.tolist() == pytest.approx(theirs["gradients"]["merge"], abs=1e-4)
    assert prune.grad.tolist() == pytest.approx(theirs["gradients"]["prune"], abs=1e-4)


def test_diffrate_has_the_originals_logits(images):
    theirs = original("diffrate", "inference")
    logits = diffrate.DiffRateViT(fixed_model(), theirs["schedule"])(images)
    assert_same_logits(logits, theirs["logits"])


def test_diffrate_has_the_originals_counts_and_gradients(images):
    """The loss is theirs: it counts GFLOPs, and leaves out LayerScale's and pooling's."""
    theirs = original("diffrate", "training")
    candidates = torch.arange(196, 0, -4, dtype=torch.float64)
    rates = torch.zeros(6, 2, len(candidates), dtype=torch.float64)
    rates[1:] = -(((candidates - torch.tensor(theirs["centres"])[..., None]) / 20) ** 2)
    rates.requires_grad_()
    backbone = StagedViT(fixed_model(), (1, 3))
    logits, history = diffrate.masked_pass(backbone, images, rates, candidates)
    assert [[int(kept) for kept in block] for block in history] == theirs["kept"]
    assert_same_logits(logits.detach(), theirs["logits"])
    counts = diffrate.expected_counts(backbone, history)
    flops = 197 * 32 * 48 + 32 * 10 + sum(
        4 * before * 32**2 + 2 * before**2 * 32 + 8 * after * 32**2
        for before, after in pairwise(counts)
    )  # fmt: skip
    labels = torch.tensor(theirs["labels"])
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1) + 5 * (flops / 1e7 - 0.5) ** 2
    loss.backward()
    assert loss.item() == pytest.approx(theirs["loss"], abs=1e-4)
    for block, both in zip(rates.grad[1:], theirs["gradients"], strict=True):
        for gradient, (norm, first, last) in zip(block, both, strict=True):
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4)
            assert float(gradient[0]) == pytest.approx(first, abs=1e-4 * norm)
            assert float(gradient[-1]) == pytest.approx(last, abs=1e-4 * norm)


def dynamic_vit(dtype):
    """The fixed model, staged, and DynamicViT's policy with fixed predictors."""
    backbone = StagedViT(fixed_model(), (1, 3, 4))
    policy = DynamicViTPolicy(backbone.width, 3, 0.7)
    weights = fixed_weights(policy, 2)
    for name, parameter in policy.named_parameters():
        parameter.data = weights[name].to(dtype)
    return backbone, policy


def test_dynamic_vit_keeps_the_originals_tokens(images):
    theirs = original("dynamic_vit", "inference")
    backbone, policy = dynamic_vit(torch.float32)
    logits, alive = PrunedViT(backbone, policy)(images, return_keep=True)
    kept = [[image.nonzero()[:, 0].tolist() for image in stage] for stage in alive.unbind(1)]
    assert kept == theirs["kept"]
    assert_same_logits(logits, theirs["logits"])


def test_dynamic_vit_has_the_originals_losses_and_gradients(images, monkeypatch):
    monkeypatch.setattr(masked_vit, "MAX_MASK_GRAD", float("inf"))  # it is ours alone
    theirs = original("dynamic_vit", "training")
    backbone, policy = dynamic_vit(torch.float64)
    begun = backbone.begin(images, with_attention=False, execution="masked")
    teacher = masked_vit.run_dense(backbone, begun)
    student = masked_vit.run_masked(backbone, policy, begun, torch.Generator().manual_seed(3))
    labels = torch.tensor(theirs["labels"])
    terms = masked_vit.losses(student, teacher, labels, policy.shares(), 2.0)
    terms["loss"].backward()
    kept = [[image.nonzero()[:, 0].tolist() for image in stage] for stage in student.kept]
    assert kept == theirs["kept"]
    assert_same_logits(student.logits, theirs["logits"])
    for name, value in theirs["losses"].items():
        assert terms[name].item() == pytest.approx(value, abs=1e-4), name
    for name, parameter in policy.named_parameters():
        norm, first = theirs["gradients"][name]
        assert float(parameter.grad.norm()) == pytest.approx(norm, rel=1e-4), name
        assert float(parameter.grad.flatten()[0]) == pytest.approx(first, abs=1e-4 * norm), name
