"""How a finished run ends: where its files are, and what can be done with them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

# of a run's files and folders, what each holds
HELD = {
    "policy.safetensors": "the policy",
    "backbone.safetensors": "the backbone",
    "model": "the pruned ViT, for PrunedViT.from_pretrained",
    "report.json": "these results",
    "pruned.png": "what is pruned of some images",
    "curve.png": "training curves",
    "metrics.jsonl": "their numbers",
}
AFTER_RUN = ("prunevit viewer --model FOLDER", "prunevit export FOLDER --out model.onnx")


def say_where_and_what_next(folder: Path, *commands: str) -> None:
    """Says on the standard error output which files a finished run left, how to look at its
    TensorBoard log where there is one, and what can be done with the run.

    Args:
        folder: the run's.
        commands: that can be run next, with FOLDER for the run's folder.
    """
    quoted = shlex.quote(str(folder))
    found = [f"{name} ({what})" for name, what in HELD.items() if (folder / name).exists()]
    lines = [f"in {folder}: {', '.join(found)}"]
    if any(folder.glob("events.out.tfevents.*")):
        lines.append(f"curves: tensorboard --logdir {quoted}")
    lines += [f"next: {command.replace('FOLDER', quoted)}" for command in commands]
    print("\n".join(lines), file=sys.stderr)
