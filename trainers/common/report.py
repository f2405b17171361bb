"""The report of a token-pruning run: a table of policies, and pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from prunevit.agents.policies.heuristics import KeepAll, Score, TopK
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs.data.image_set import ImageSet
from prunevit.envs.data_config import model_data_config
from prunevit.envs.measures import Measure
from prunevit.envs.rendering import denormalise, stage_strip
from prunevit.extras import needs
from prunevit.progress import progress_bar
from prunevit.trainers.common.checkpoint import write_atomically
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.evaluation import best_topk, evaluate
from prunevit.trainers.common.timing import images_per_second

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPEED_BATCH = 64
SPEED_IMAGES = 512
PICTURES = 6


def report_pruning(
    learned: PrunedViT, config: MappoConfig, validation: ImageSet, test: ImageSet, folder: Path
) -> dict[str, Any]:
    """Compares the learned policy with dense, random and attention top-k on the test images, and
    draws the pictures of the run in ``folder``.

    The top-k policies have at least the learned policy's GMACs. Their tokens are spread over the
    stages in the way that is best on validation.
    """
    backbone, size = learned.backbone, config.eval_size
    target = evaluate(learned, validation, size)
    models = {"dense": PrunedViT(backbone, KeepAll()), "learned": learned}
    results = {}
    rivals: tuple[Score, ...] = ("random", "attention")
    with progress_bar(2 * len(rivals) + len(models) + 1, "steps", title="report") as bar:
        for score in rivals:
            tokens = best_topk(backbone, validation, target.gmacs, target.kept, score, size)
            models[score] = PrunedViT(backbone, TopK(tokens, score, config.seed))
            bar.update()
        for name, model in models.items():
            results[name] = evaluate(model, test)
            bar.update()
        count = max(min(SPEED_IMAGES, len(test)) // SPEED_BATCH, 1) * SPEED_BATCH
        pixels, _ = test.load([i % len(test) for i in range(count)])
        # timed as timm runs it, not as our runtime with nothing pruned
        timed = models | {"dense": backbone.model}
        speeds = images_per_second(timed, pixels.to(backbone.device, backbone.dtype), SPEED_BATCH)
        bar.update()

    draw_pruned(learned, test, folder / "pruned.png")
    draw_curve(folder)
    return {
        "policies": {
            name: {
                result.measure: result.score,
                "gmacs": backbone.dense_macs / 1e9 if name == "dense" else result.gmacs,
                "kept": list(result.kept),
                "images_per_second": speeds[name],
            }
            for name, result in results.items()
        }
    }


def table(policies: Mapping[str, Mapping[str, Any]], split: str = "test") -> str:
    """Formats results of policies by name as a table, compared with those of "dense".

    Args:
        policies: each has an ``accuracy``, or another ``Measure``, and ``gmacs``, and may have
            ``images_per_second`` and the shares ``kept`` after each stage.
        split: on which it was measured.
    """
    dense = policies["dense"]
    measure = next(name for name in get_args(Measure) if name in dense)
    timed = "images_per_second" in dense
    width = max(map(len, policies)) + 2
    lines = [
        f"{'policy':<{width}}{f'{split} {measure}':>20}{'GMACs':>9}{'of dense':>9}"
        + f"{'images/s':>10}{'speed-up':>9}" * timed
        + "  patches kept, % after each stage"
    ]
    for name, row in policies.items():
        score = row[measure]
        text = f"{score:>20.4f}" if measure == "cosine" else f"{100 * score:>19.2f}%"
        speed = row["images_per_second"] if timed else 0.0
        lines.append(
            f"{name:<{width}}{text}{row['gmacs']:>9.4f}"
            f"{100 * row['gmacs'] / dense['gmacs']:>8.1f}%"
            + (f"{speed:>10.0f}{speed / dense['images_per_second']:>8.2f}x" if timed else "")
            + "  "
            + " ".join(f"{100 * share:.0f}" for share in row.get("kept", ()))
        )
    return "\n".join(line.rstrip() for line in lines)


def format_report(report: dict[str, Any]) -> str:
    """Formats what a run of ``trainers.mappo`` prints at its end."""
    if "dense" in report["policies"]:
        text = table(report["policies"])
    else:
        text = "\n".join(
            f"{name}: " + " ".join(f"{k} {v:.3f}" for k, v in row.items())
            for name, row in report["policies"].items()
        )
    return f"{text}\n{report['seconds']:.0f} s, seed {report['seed']}"


def new_figure(path: Path, size: tuple[float, float]) -> Figure | None:
    """Makes a figure of ``size`` in inches. If matplotlib is missing, says that ``path`` isn't
    written and returns None.
    """
    try:
        with needs("train"):
            from matplotlib.figure import Figure
    except ImportError as error:
        print(f"{path.name} is not drawn: {error}", file=sys.stderr)
        return None
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Figure, path: Path, dpi: int = 80) -> None:
    """Writes ``figure`` as a PNG file, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


@torch.inference_mode()
def draw_pruned(model: PrunedViT, images: ImageSet, path: Path) -> None:
    """Draws a few images stage by stage, pruned patches whited out, with compute, and label and
    prediction where there are any.
    """
    backbone = model.backbone
    indices = np.linspace(0, len(images) - 1, PICTURES).astype(int).tolist()
    pixels, labels = images.load(indices)
    trace = model.trace(pixels.to(backbone.device, backbone.dtype))
    everyone = torch.ones_like(trace.alive[:, :1])
    alive = torch.cat([everyone, trace.alive], dim=1).cpu()
    data_config = model_data_config(backbone.model)
    shown = denormalise(pixels, tuple(data_config["mean"]), tuple(data_config["std"]))
    names = images.class_names
    figure = new_figure(path, (2 * alive.shape[1], 2.2 * PICTURES))
    if figure is None:
        return
    for i, axes in enumerate(figure.subplots(PICTURES, 1, squeeze=False).flat):
        axes.imshow(stage_strip(shown[i], alive[i], backbone.grid_size))
        axes.set_axis_off()
        answer = ""
        if names and backbone.num_classes:
            given = int(trace.logits[i].argmax())
            answer_name = names[given] if given < len(names) else given
            answer = f"{names[int(labels[i])]}, answered {answer_name}: "
        cost = float(trace.macs[i]) / backbone.dense_macs
        kept = " ".join(str(int(n)) for n in alive[i].sum(1))
        axes.set_title(
            f"{answer}{cost:.0%} of the compute, patches {kept}",
            fontsize=9,
        )
    save_figure(figure, path)


def draw_curve(folder: Path) -> None:
    """Draws the training curves of ``metrics.jsonl`` to ``curve.png``."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    wanted = [
        *(
            (name, "sampled, training images", f"validation_{name}", "greedy, validation")
            for name in (*get_args(Measure), "keep_ratio")
        ),
        ("episode_return", "sampled", "validation_episode_return", "greedy"),
        ("reward", "sampled", None, None),
        ("entropy", "policy entropy", None, None),
    ]
    panels = [panel for panel in wanted if any(panel[0] in record for record in records)]
    path = folder / "curve.png"
    figure = new_figure(path, (3.6 * len(panels), 3))
    if figure is None:
        return
    for axes, (name, label, checked, checked_label) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True
    ):
        for key, text, style in ((name, label, "-"), (checked, checked_label, "o-")):
            points = [(r["iteration"], r[key]) for r in records if key in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=text, markersize=3)
        axes.set_xlabel("iteration")
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.legend(fontsize=7)
    save_figure(figure, path)
