"""Which of timm's models can be pruned, as a Markdown table: ``python -m benchmarks.backbones``.

Every model that timm lists is built, without memory for its weights, and asked. That takes some
minutes; with patterns (``"*dinov3*"``) only the models whose names fit are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import timm
import torch
import tyro

from prunevit.benchmarks.markdown import markdown_table
from prunevit.envs.vit.timm_models.supported import SUPPORTED, why_unsupported
from prunevit.progress import progress_bar

# Titles of rows and patterns of names; the first that fits, and the last for all others of the
# classes that are supported.
TITLES = (
    ("DeiT, distilled", "deit_*distilled*"),
    ("DeiT", "deit_*"),
    ("DeiT-3", "deit3_*"),
    ("DINOv2, with and without registers", "*dinov2*"),
    ("DINOv3", "*dinov3*"),
    ("EVA-02", "eva02_*"),
    ("EVA", "eva_*"),
    ("Perception Encoder", "vit_pe_*"),
    ("Sapiens2", "*sapiens2*"),
    ("LingBot-Vision", "*lingbot*"),
    ("ViT with rotary positions", "*_rope_*"),
    ("SigLIP", "*siglip*"),
    ("CLIP", "*clip*"),
    ("AIMv2", "aimv2_*"),
    ("BEiT-3", "beit3_*"),
    ("RADIO", "*radio*"),
    ("TIPSv2", "*tipsv2*"),
    ("FlexiViT", "flexivit_*"),
    ("ViTamin", "vitamin_*"),
    ("ViT behind a convolutional stem", "vit_*_r*_s[13]*"),
    ("ViT behind a convolutional stem", "vit_*resnet*"),
    ("ViT behind a convolutional stem", "vit_*_mci_*"),
    ("ViT, AugReg and others", "*"),
)
OTHERS = "all else"
EXAMPLES = 2
CLASSES_SHOWN = 8


class Answer(NamedTuple):
    """One of timm's models.

    Attributes:
        name: its name.
        model: its class.
        reason: why it is refused; None if it is supported.
        has_head: whether it has a classifier as timm builds it.
    """

    name: str
    model: str
    reason: str | None
    has_head: bool = True

    @property
    def title(self) -> str:
        """Of the row that it stands in."""
        if self.model not in {cls.__name__ for ops in SUPPORTED for cls in ops.models}:
            return OTHERS
        return next(title for title, pattern in TITLES if fnmatchcase(self.name, pattern))


def ask(names: Iterable[str]) -> Iterator[Answer]:
    """Builds each model as timm does by default, and asks whether it can be staged."""
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        has_head = getattr(model, "num_classes", 1) > 0
        yield Answer(name, type(model).__name__, why_unsupported(model), has_head)


def table(answers: Sequence[Answer]) -> str:
    """Markdown: a row for each family, those whose classes are supported first."""
    groups = [[a for a in answers if a.title == title] for title in dict(TITLES)]
    others = [answer for answer in answers if answer.title == OTHERS]
    # a row for each reason, that of most models last
    reasons = reversed(Counter(answer.reason for answer in others).most_common())
    groups += [[a for a in others if a.reason == reason] for reason, _ in reasons]
    header = ["Family", "timm class", "Examples", "Supported", "Refused, and why"]
    rows = markdown_table(header, [row(models) for models in groups if models])
    fit = sum(answer.reason is None for answer in answers)
    bare = sum(answer.reason is None and not answer.has_head for answer in answers)
    return (
        f"{rows}\n\n{fit} of timm {timm.__version__}'s {len(answers)} models are supported. {bare} "
        "of them have no classifier as timm builds them: they give features and embeddings, and "
        "logits if built with `num_classes`."
    )


def row(models: Sequence[Answer]) -> list[str]:
    """A family's title, classes, examples, how many are supported, and why the others are not."""
    classes = [f"`{name}`" for name, _ in Counter(a.model for a in models).most_common()]
    shown, more = ", ".join(classes[:CLASSES_SHOWN]), len(classes) - CLASSES_SHOWN
    fit = [answer.name for answer in models if answer.reason is None]
    names = fit or [answer.name for answer in models]
    apart = max(1, len(names) // EXAMPLES)  # not two sizes of one model
    reasons = Counter(answer.reason for answer in models if answer.reason is not None)
    return [
        models[0].title,
        shown + (f" and {more} other classes" if more > 0 else ""),
        ", ".join(f"`{name}`" for name in names[::apart][:EXAMPLES]),
        str(len(fit)),
        "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common()) or "0",
    ]


@dataclass
class BackbonesConfig:
    """Which models."""

    patterns: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of names, as timm.list_models takes them; all where there is none."""


def main() -> None:
    """The command line."""
    config = tyro.cli(BackbonesConfig, description=__doc__)
    names = timm.list_models(list(config.patterns) or "")
    if not names:
        sys.exit(f"error: timm has no model like {' or '.join(config.patterns)}")
    print(table(list(ask(progress_bar(len(names), "models", items=names)))))


if __name__ == "__main__":
    main()
