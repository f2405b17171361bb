"""Draws what a pruned ViT drops of photographs: ``prunevit picture PHOTOS --model MODEL``.

Each row of the picture is a photograph at first and after each stage, with pruned patches faded.
Above it stands what the pruned ViT answers, costs and takes on this machine beside the dense one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from prunevit.agents.viewer.comparison import Comparison, Look, compare
from prunevit.agents.viewer.photographs import open_photograph, samples
from prunevit.agents.viewer.viewed_model import DIGITS, read_model
from prunevit.choices import check_choice
from prunevit.cli import prog
from prunevit.envs.rendering import stage_strip

GAP = 8  # pixels between pictures
FONT = 15  # pixels
LINE = 22  # pixels of a line of text
INK, GREY = (20, 20, 20), (90, 90, 90)


def facts(found: Comparison, look: Look) -> str:
    """What a look says and costs, in a line."""
    return (
        f"{look.answer}, {found.compute(look):.0%} of the compute, "
        f"{milliseconds(look)} ms (dense: {milliseconds(found.dense)} ms)"
    )


def milliseconds(look: Look) -> str:
    """The time of an image, in three digits or whole milliseconds."""
    taken = 1e3 * look.seconds
    return f"{taken:.3g}" if taken < 1000 else f"{taken:.0f}"


def draw(comparisons: Mapping[str, Comparison]) -> Image.Image:
    """Draws each look at each image as a row: the image at first and after each stage, with pruned
    patches faded, below a line of facts.

    Args:
        comparisons: by what the images are called.
    """
    rows = [
        _draw_row(f"{name}, " * bool(name) + f"{look.method}: {facts(found, look)}", found, look)
        for name, found in comparisons.items()
        for look in found.looks
    ]
    size = max(row.width for row in rows), sum(row.height + GAP for row in rows) - GAP
    picture = Image.new("RGB", size, "white")
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height + GAP
    return picture


def _draw_row(title: str, found: Comparison, look: Look) -> Image.Image:
    height, width = found.shown.shape[1:]
    font = ImageFont.load_default(FONT)
    pictures = len(look.alive) * (width + GAP) - GAP
    row = Image.new(
        "RGB", (max(pictures, int(font.getlength(title)) + 1), height + 2 * LINE), "white"
    )
    pen = ImageDraw.Draw(row)
    pen.text((0, 0), title, INK, font)
    for i, (stage, count) in enumerate(zip(found.stages, look.patches, strict=True)):
        left = i * (width + GAP)
        strip = stage_strip(found.shown, look.alive[i : i + 1], found.grid)
        row.paste(Image.fromarray(strip), (left, LINE))
        pen.text((left, LINE + height), f"{stage}: {count}", GREY, font)
    return row


@dataclass
class PictureConfig:
    """What is drawn."""

    photos: tyro.conf.Positional[tuple[str, ...]]
    """Files of photographs, or names of samples: cat, coffee, pagoda, dahlia, digits-0 to
    digits-3."""
    model: str = DIGITS
    """digits; a run, as runs/NAME; a folder of PrunedViT.save_pretrained; or timm's name of a
    ViT."""
    checkpoint: Path | None = None
    """With timm's name: weights of the ViT, in place of those that timm downloads."""
    img_size: int | None = None
    """With timm's name: image size of the ViT, by default timm's own."""
    methods: tuple[str, ...] = ()
    """How it is pruned, a row each: "own policy", "class attention", "class attention, merging",
    "embedding norm", "random". By default the model's own policy, or else class attention."""
    compute: float = 0.6
    """Share of the dense model's compute to take."""
    threads: int | None = None
    """CPU threads. By default torch's own choice."""
    out: Path = Path("pruned.png")
    """Where the picture is written."""


def make_picture(config: PictureConfig) -> Image.Image:
    """Draws what ``config`` asks for.

    Raises:
        ValueError: there is no such model, method or photograph.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = read_model(config.model, config.checkpoint, config.img_size)
    methods = config.methods or model.methods[:1]
    for method in methods:
        check_choice("method", method, model.methods)
    known = samples()
    found = {}
    for name in config.photos:
        image = known[name] if name in known else open_photograph(Path(name), name)
        found[Path(name).stem] = compare(model, image, methods, config.compute)
    for remark in dict.fromkeys(remark for each in found.values() for remark in each.remarks):
        print(remark, file=sys.stderr)
    return draw(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """``prunevit picture``."""
    try:
        config = tyro.cli(PictureConfig, args=arguments, description=__doc__, prog=prog())
        make_picture(config).save(config.out)
        print(config.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
