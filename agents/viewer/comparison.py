"""``compare``: what ways to prune a ViT make of one image, beside the dense model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from prunevit.agents.viewer.photographs import prepare
from prunevit.agents.viewer.viewed_model import ViewedModel
from prunevit.envs.data_config import model_classes
from prunevit.envs.devices import now

DENSE = "dense"
TIMED_SECONDS = 0.6  # for all timed calls of an image together
LEAST_ROUNDS = 3
TIMED_MACS = 1_500_000_000  # of the dense model on a batch that is timed
MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Look:
    """What one model made of an image.

    Attributes:
        method: how it was pruned, or "dense".
        answer: the class with its probability, or how similar the embedding is to the dense one.
        macs: multiply-accumulates, the policy's included.
        seconds: that an image takes, the median.
        alive: which patches were alive at first and after each stage, bool [1 + T, N].
        remark: what to know about it; mostly empty.
    """

    method: str
    answer: str
    macs: int
    seconds: float
    alive: Tensor
    remark: str = ""

    @property
    def patches(self) -> list[int]:
        """The number of patches alive at first and after each stage."""
        return self.alive.sum(1).tolist()


@dataclass(frozen=True)
class Comparison:
    """What several models made of an image.

    Attributes:
        shown: what the models saw of the image, values 0..1 [C, H, W].
        grid: rows and columns of patches.
        stages: what was done to the patches of each row of ``Look.alive``.
        dense: the dense model's look.
        looks: those of the pruned models.
        at_once: copies of the image in the batches that were timed.
    """

    shown: Tensor
    grid: tuple[int, int]
    stages: tuple[str, ...]
    dense: Look
    looks: tuple[Look, ...]
    at_once: int

    def compute(self, look: Look) -> float:
        """What a look cost, as a share of the dense model."""
        return look.macs / self.dense.macs

    @property
    def remarks(self) -> list[str]:
        """What to know about the looks."""
        return list(dict.fromkeys(look.remark for look in self.looks if look.remark))


@torch.inference_mode()
def compare(
    model: ViewedModel, image: Image.Image, methods: Sequence[str], compute: float
) -> Comparison:
    """Runs an image through a ViT, dense and pruned in some ways.

    Args:
        model: the ViT.
        image: the image.
        methods: some of the model's ``methods``.
        compute: share of the dense multiply-accumulates that each is to take.

    Raises:
        DatasetError: the ViT takes no such images.
        UnsupportedBackboneError: the ViT can't be pruned in one of these ways.
    """
    backbone = model.backbone
    vit = backbone.model
    pixels, shown = prepare(image, backbone)
    batch = pixels[None].to(backbone.device, backbone.dtype)
    pruned = {method: model.pruned(method, compute) for method in dict.fromkeys(methods)}
    traces = {method: each.trace(batch) for method, (each, _) in pruned.items()}
    whole = vit(batch)

    at_once = max(1, min(MOST_AT_ONCE, TIMED_MACS // backbone.dense_macs))
    copies = batch.expand(at_once, -1, -1, -1).contiguous()
    models: dict[str, nn.Module] = {
        DENSE: vit,
        **{name: each for name, (each, _) in pruned.items()},
    }
    calls = {name: partial(each, copies) for name, each in models.items()}
    seconds = median_seconds(calls, backbone.device)

    def look(method: str, output: Tensor, macs: int, alive: Tensor, remark: str = "") -> Look:
        answer = _answer(model, output[0], whole[0])
        return Look(method, answer, macs, seconds[method] / at_once, alive, remark)

    everyone = torch.ones(1, backbone.num_patches, dtype=torch.bool)
    inside = "in" if backbone.prune_at == "mlp" else "before"
    return Comparison(
        shown,
        backbone.grid_size,
        ("all patches", *(f"{inside} block {block}" for block in backbone.prune_before)),
        look(DENSE, whole, backbone.dense_macs, everyone),
        tuple(
            look(
                method,
                trace.logits,
                int(trace.macs),
                torch.cat([everyone, trace.alive[0].cpu()]),
                pruned[method][1],
            )
            for method, trace in traces.items()
        ),
        at_once,
    )


def _answer(model: ViewedModel, output: Tensor, dense: Tensor) -> str:
    """What ``output`` [D] says, beside what the ``dense`` one does."""
    classes = model_classes(model.backbone.model)
    if classes is None:
        return f"cosine {float(F.cosine_similarity(output.float(), dense.float(), dim=0)):.3f}"
    given = int(output.argmax())
    names = classes.vocabularies()
    # of ImageNet's, the last are words of everyday language
    name = names[-1][given] if names else str(given)
    return f"{name} ({float(output.float().softmax(0)[given]):.0%})"


def median_seconds(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float = TIMED_SECONDS,
) -> dict[str, float]:
    """The median time of each call, all made in turns for ``seconds`` but at least thrice."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = now(device) + seconds
    while now(device) < end or len(next(iter(times.values()))) < LEAST_ROUNDS:
        for name, call in calls.items():
            begun = now(device)
            call()
            times[name].append(now(device) - begun)
    return {name: statistics.median(each) for name, each in times.items()}
