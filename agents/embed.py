"""Embeds all photographs of a folder with a pruned ViT: ``prunevit embed PHOTOS --policy RUN``.

It writes the embeddings, float32 [photographs, D], as a NumPy file, and beside it a JSON file with
the name of each row's photograph, the files that can't be read, and the compute that was spent.
Stopped, it goes on where it was when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from prunevit.agents import saving
from prunevit.agents.policy_file import read_backbone_name
from prunevit.agents.policy_library import find_policy, policy_names
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.cli import prog
from prunevit.envs.data.image_dataset import ImageDataset
from prunevit.envs.data.image_sources import DatasetError, PhotoSource
from prunevit.envs.data_config import model_data_config
from prunevit.envs.devices import pick_device
from prunevit.envs.vit.create import check_described, create_backbone
from prunevit.progress import progress_bar

PART_SIZE = 1024  # photographs in a part: the most that is computed again after a stop


@dataclass
class EmbedConfig:
    """Which photographs are embedded by which model."""

    photos: tyro.conf.Positional[Path]
    """Any tree of images."""
    policy: Path
    """A finished run of trainers.mappo, as runs/NAME, a folder of PrunedViT.save_pretrained, a file
    of PrunedViT.save_policy, or the name of one that comes with the package. A classifier is left
    away."""
    backbone: str | None = None
    """timm's name of the model that a policy from a file prunes, by default the one it was trained
    for; or the run's --backbone, if it is on a hub (hf-hub:OWNER/NAME): a folder can't choose
    that."""
    checkpoint: Path | None = None
    """With a policy from a file: weights of the backbone, in place of those that timm downloads."""
    img_size: int | None = None
    """With a policy from a file: image size of the backbone, by default timm's own."""
    compute: float | None = None
    """Share of the dense model's compute to take on average, as 0.6. By default the policy's own
    setting."""
    out: Path = Path("embeddings.npy")
    """Where the embeddings are written. Names of photographs are written to the same path with
    .json."""
    batch_size: int = 64
    """Photographs that are computed together."""
    compare_dense: int = 0
    """Time the dense model too, on so many photographs, and compare the embeddings."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: int | None = None
    """CPU threads. By default torch's own choice."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        if self.out.suffix != ".npy":
            raise ValueError(f"out={self.out}: a NumPy file ends with .npy")

    @property
    def names_file(self) -> Path:
        """Where names are written."""
        return self.out.with_suffix(".json")

    @property
    def parts(self) -> Path:
        """The folder of what is done so far."""
        return self.out.with_name(self.out.name + ".parts")


def load_model(config: EmbedConfig) -> PrunedViT:
    """The pruned ViT, without a classifier, at the compute that was asked for.

    Raises:
        ValueError: the folder holds no model, or the compute can't be reached.
    """
    is_named = str(config.policy) in policy_names() and not config.policy.exists()
    if config.policy.is_file() or is_named:
        file = find_policy(config.policy)
        model = PrunedViT.from_policy(_backbone_for(config, file), file)
    elif config.checkpoint is not None or config.img_size is not None:
        raise ValueError(
            f"{config.policy} is no file of PrunedViT.save_policy, and has a backbone of its own: "
            "leave out --checkpoint and --img-size"
        )
    elif (config.policy / saving.WEIGHTS).is_file():
        model = PrunedViT.from_pretrained(config.policy)
    else:
        model = PrunedViT.from_run(config.policy, config.backbone)
    if config.compute is not None:
        model.compute = config.compute
    if model.num_classes:
        model.reset_classifier(0)
    return model.to(pick_device(config.device)).to(memory_format=torch.channels_last)


def _backbone_for(config: EmbedConfig, policy: Path) -> nn.Module:
    """The backbone of a policy from a file, which can't name one on a hub by itself."""
    name = config.backbone
    if name is None:
        name = read_backbone_name(policy)
        check_described(name, {})
    kwargs: dict[str, Any] = {} if config.img_size is None else {"img_size": config.img_size}
    pretrained = config.checkpoint is None
    return create_backbone(name, pretrained, config.checkpoint, num_classes=0, **kwargs)


class Photographs:
    """Photographs as a model takes them, of which some may be damaged.

    Args:
        folder: a tree of images.
        model: the model.

    Attributes:
        files: their paths.
    """

    def __init__(self, folder: Path, model: PrunedViT) -> None:
        source = PhotoSource(str(folder))
        self.files = source.files
        self._model = model
        data_config = model_data_config(model.backbone.model)
        self._images = ImageDataset(source, np.arange(len(source)), data_config)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        """Reads photographs.

        Returns:
            those that can be read, float [n, C, H, W] on the model's device, and what is wrong with
            the others, by index.
        """
        damaged: dict[int, str] = {}
        try:
            pixels = self._images.load(indices)[0]
        except DatasetError:
            # one at a time, to find out which
            good = []
            for i in indices:
                try:
                    good.append(self._images.load([i])[0])
                except DatasetError as error:
                    damaged[i] = str(error)
            shape = self._model.backbone.image_shape
            pixels = torch.cat(good) if good else torch.empty(0, *shape)
        backbone = self._model.backbone
        return pixels.to(backbone.device, backbone.dtype), damaged


@torch.inference_mode()
def embed_part(
    model: PrunedViT, photographs: Photographs, part: range, batch_size: int, bar: tqdm
) -> tuple[Tensor, int, dict[int, str]]:
    """Embeds the photographs with these indices.

    Returns:
        embeddings float32 [n, D] of those that can be read, the multiply-accumulates of all of
        them, and what is wrong with the others, by index.
    """
    embeddings = [torch.empty(0, model.num_features)]
    macs = 0
    damaged: dict[int, str] = {}
    for start in range(part.start, part.stop, batch_size):
        indices = range(start, min(start + batch_size, part.stop))
        pixels, bad = photographs.load(indices)
        damaged |= bad
        if len(pixels):
            trace = model.trace(pixels)
            embeddings.append(trace.logits.float().cpu())
            macs += int(trace.macs.sum())
        bar.update(len(indices))
    return torch.cat(embeddings), macs, damaged


@torch.inference_mode()
def compare_with_dense(
    model: PrunedViT, photographs: Photographs, count: int, batch_size: int
) -> dict[str, float]:
    """Photographs a second of the pruned and of timm's dense model, without reading the files, and
    the mean cosine similarity of their embeddings.
    """
    dense, device = model.backbone.model, model.backbone.device
    seconds = {"pruned": 0.0, "dense": 0.0}
    similarity, done = 0.0, 0
    first = True
    for start in range(0, min(count, len(photographs.files)), batch_size):
        indices = range(start, min(start + batch_size, count, len(photographs.files)))
        pixels, _ = photographs.load(indices)
        if not len(pixels):
            continue
        if first:  # the first call of each is slower than all others
            model(pixels), dense(pixels)
            first = False
        outputs = {}
        turns: list[tuple[str, nn.Module]] = [("pruned", model), ("dense", dense)]
        if start // batch_size % 2:
            turns.reverse()
        for name, run in turns:
            begun = _now(device)
            outputs[name] = run(pixels)
            seconds[name] += _now(device) - begun
        pruned, whole = (outputs[name].float() for name in ("pruned", "dense"))
        similarity += float(F.cosine_similarity(pruned, whole).sum())
        done += len(pixels)
    if not done:
        raise ValueError("none of the photographs to compare on can be read")
    speeds = {f"{name}_per_second": done / time for name, time in seconds.items()}
    return {"photographs": done, "cosine": similarity / done, **speeds}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def embed(config: EmbedConfig) -> dict[str, Any]:
    """Embeds the photographs; returns what the JSON file holds.

    Raises:
        ValueError: there are no photographs, the model can't be loaded or can't take this compute,
            or what was begun was begun otherwise.
        OSError: the disk is full or not writable; what is done stays.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_model(config)
    photographs = Photographs(config.photos, model)
    files = photographs.files
    _begin(config, files)
    parts = [range(i, min(i + PART_SIZE, len(files))) for i in range(0, len(files), PART_SIZE)]
    with progress_bar(len(files), "photographs") as bar:
        for part in parts:
            file = _part_file(config, part)
            if file.is_file():
                bar.update(len(part))
                continue
            embeddings, macs, damaged = embed_part(model, photographs, part, config.batch_size, bar)
            _write_atomically(
                file,
                embeddings=embeddings.numpy(),
                macs=np.int64(macs),
                damaged=np.array(json.dumps({str(i): why for i, why in damaged.items()})),
            )
    facts = _join(config, files, parts, model.backbone.dense_macs)
    if config.compare_dense:
        facts["compared"] = compare_with_dense(
            model, photographs, config.compare_dense, config.batch_size
        )
    config.names_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(config.parts)
    return facts


def _begin(config: EmbedConfig, files: Sequence[str]) -> None:
    """Makes the folder of parts, or checks that it was made for the same photographs and model."""
    begun = {
        "photographs": hashlib.sha256("\0".join(files).encode()).hexdigest(),
        "policy": str(config.policy.resolve()),
        "compute": config.compute,
    }
    file = config.parts / "begun.json"
    if not file.is_file():
        config.parts.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(begun), encoding="utf-8")
        temporary.replace(file)
    before = json.loads(file.read_text(encoding="utf-8"))
    if before != begun:
        changed = ", ".join(name for name, value in begun.items() if before.get(name) != value)
        raise ValueError(
            f"{config.parts} holds embeddings that were begun with other settings ({changed}): "
            "give another --out, or delete it"
        )


def _part_file(config: EmbedConfig, part: range) -> Path:
    return config.parts / f"{part.start}.npz"


def _write_atomically(file: Path, **arrays: Any) -> None:
    temporary = file.with_name(f".{file.name}")  # savez adds .npz to other names
    np.savez(temporary, **arrays)
    temporary.replace(file)


def _join(
    config: EmbedConfig, files: Sequence[str], parts: Sequence[range], dense_macs: int
) -> dict[str, Any]:
    """Writes the embeddings of all parts as one file, and returns what is known of them."""
    damaged: dict[int, str] = {}
    rows, macs = [], 0
    for stored in _stored(config, parts):
        rows.append(stored["embeddings"])
        macs += int(stored["macs"])
        damaged |= {int(i): why for i, why in json.loads(str(stored["damaged"])).items()}
    embeddings = np.concatenate(rows)
    if not len(embeddings):
        raise ValueError(f"none of {len(files)} photographs can be read: {damaged[0]}")
    temporary = config.parts / "all.npy"
    np.save(temporary, embeddings)
    temporary.replace(config.out)
    return {
        "compute": macs / len(embeddings) / dense_macs,
        "files": [file for i, file in enumerate(files) if i not in damaged],
        "damaged": list(damaged.values()),
    }


def _stored(config: EmbedConfig, parts: Sequence[range]) -> Iterator[dict[str, Any]]:
    for part in parts:
        with np.load(_part_file(config, part), allow_pickle=False) as stored:
            yield dict(stored)


def summary(config: EmbedConfig, facts: dict[str, Any]) -> str:
    """What the command prints at its end."""
    lines = [
        f"{len(facts['files'])} photographs embedded in {config.out}, with {facts['compute']:.1%} "
        "of the dense compute"
    ]
    if facts["damaged"]:
        lines += [f"{len(facts['damaged'])} files can't be read:", *facts["damaged"]]
    if "compared" in facts:
        found = facts["compared"]
        pruned, dense = found["pruned_per_second"], found["dense_per_second"]
        lines.append(
            f"on {found['photographs']} photographs: {pruned:.1f} a second, the dense model "
            f"{dense:.1f} ({pruned / dense:.2f}x); mean cosine similarity {found['cosine']:.4f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """``prunevit embed``."""
    try:
        config = tyro.cli(EmbedConfig, args=arguments, description=__doc__, prog=prog())
        print(summary(config, embed(config)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here")


if __name__ == "__main__":
    main()
