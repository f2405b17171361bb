"""The recipe for ImageNet, every step of it, where there is no ImageNet: 1,000 classes of a few
tiny JPEGs made on the spot, and a small DeiT of random weights.
"""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config

from prunevit.agents import PrunedViT
from prunevit.benchmarks import compare, figures, method_speed
from prunevit.benchmarks.speed import throughput
from prunevit.benchmarks.tasks import TASKS
from prunevit.envs.data.datasets import open_images
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers import finetune, mappo
from prunevit.trainers.common import report
from prunevit.trainers.common.evaluation import evaluate

CLASSES = 1_000
TRAIN, VALIDATION = 3, 1  # images a class
DEIT = "deit_small_patch16_224"
SMALL = {"img_size": 64, "embed_dim": 32, "num_heads": 2}  # 12 blocks, as the stages ask for

pytestmark = pytest.mark.learning


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders as ImageNet is unpacked: PATH/train/CLASS, PATH/validation/CLASS."""
    root = tmp_path_factory.mktemp("imagenet")
    noise = np.random.RandomState(0)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        for name in range(CLASSES):
            folder = root / split / f"n{name:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                coarse = noise.randint(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((48, 40)).save(folder / f"{i}.JPEG")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """What ``--pretrained`` would download."""
    path = tmp_path_factory.mktemp("weights") / "deit.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_backbone(DEIT, untrained=True, **SMALL)
    write_weights(path, model.state_dict(), DEIT, CLASSES, SMALL)
    return path


def run(main, command):
    """Runs ``main`` as the command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", shlex.split(command))
        main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images, weights):
    """Where training and fine-tuning have left runs/deit and runs/deit-finetuned."""
    folder = tmp_path_factory.mktemp("work")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(report, "SPEED_IMAGES", report.SPEED_BATCH)
        run(
            mappo.main,
            f"mappo --backbone {DEIT} --checkpoint {weights} --dataset {images} "
            "--prune-before 3 6 9 --alpha 0.5 --iterations 2 --num-envs 32 --rollouts-per-image 4 "
            "--eval-size 64 --device cpu --threads 1 --run-name deit",
        )
        run(
            finetune.main,
            "finetune --run runs/deit --epochs 1 --epoch-size 96 --batch-size 32 "
            "--validation-size 64 --device cpu --threads 1",
        )
    yield folder
    torch.set_num_threads(threads)


def read(file):
    return json.loads(file.read_text())


def test_the_policy_is_judged_on_all_validation_images(folder, images):
    policies = read(folder / "runs/deit/report.json")["policies"]
    assert set(policies) == {"dense", "learned", "random", "attention"}
    model = PrunedViT.from_run(folder / "runs/deit")
    assert model.backbone.prune_before == (3, 6, 9)
    data_config = resolve_model_data_config(model.backbone.model)
    # of two splits the one that is not for training is what results are reported on
    held_out = open_images(images, "test", data_config)
    assert len(held_out) == held_out.num_classes == model.num_classes == CLASSES
    result = evaluate(model, held_out)
    assert (result.accuracy, result.gmacs) == (
        policies["learned"]["accuracy"],
        policies["learned"]["gmacs"],
    )


def test_the_fine_tuned_model_is_judged_like_it(folder, images):
    reported = read(folder / "runs/deit-finetuned/report.json")
    assert reported["validation_images"] == 64  # out of the training images
    tuned = PrunedViT.from_pretrained(folder / "runs/deit-finetuned/model")
    start = PrunedViT.from_run(folder / "runs/deit")
    for name, before in start.state_dict().items():
        learned = name.startswith(("backbone.model.blocks.3.mlp.fc1", "backbone.model.head"))
        frozen = name.startswith(("policy.", "backbone.model.blocks.2.", "backbone.model.patch"))
        if learned or frozen:
            assert torch.equal(before, tuned.state_dict()[name]) == frozen, name
    held_out = open_images(images, "test", resolve_model_data_config(tuned.backbone.model))
    result = evaluate(tuned, held_out, size=250)
    assert 0 < result.gmacs < 1.1 * tuned.backbone.dense_macs / 1e9
    assert 0 <= result.accuracy <= 1


def test_the_run_is_timed(folder):
    run(
        throughput.main,
        f"throughput --run {folder}/runs/deit --batch-sizes 8 --images 16 --rounds 2 "
        f"--variants dense packed uniform --no-memory --threads 1 --out {folder}/speed.json",
    )
    records = read(folder / "speed.json")
    assert [record["variant"] for record in records] == ["dense", "packed", "uniform"]
    assert all(record["images_per_second"] > 0 for record in records)


def test_the_comparison_runs(folder, images, weights, monkeypatch):
    """Training, fine-tuning, evaluation, timing and figures, as the README has them."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(method_speed, "SPEED_ROUNDS", 1)
    short = replace(TASKS["imagenet"], fine_tuning={"epochs": 1, "epoch_size": 256})
    monkeypatch.setitem(TASKS, "imagenet", short)
    call = (
        f"compare --task imagenet --data {images} --checkpoint {weights} --iterations 2 --seeds 1 "
        "--points 0.7 --eval-size 128 --test-size 128 --device cpu --threads 1 --out results"
    )
    run(
        compare.main,
        f"{call} --methods attention random mappo released-threshold dynamic-vit --no-speed",
    )
    records = Path("results/records.jsonl")
    reached = [line for line in records.read_text().splitlines(True) if "mappo" not in line]
    records.write_text("".join(reached))
    # two iterations teach ours too little to tell patches and prices apart
    file = Path("results/runs/mappo-0/policy.safetensors")
    learned = load_file(file)
    for name, value in {"prior_weight": 0.1, "keep_bias": -0.3, "alpha_weight": -0.1}.items():
        learned[name].fill_(value)
    save_file(learned, file)
    everyone = [
        "attention", "random", "released-threshold", "dynamic-vit", "mappo", "mappo-fine-tuned",
    ]  # fmt: skip
    run(compare.main, f"{call} --methods {' '.join(everyone)}")
    lines = records.read_text().splitlines()
    records = {record["method"]: record for record in map(json.loads, lines)}
    dense = records.pop("dense")
    assert dense["accuracy"] == dense["dense_accuracy"]
    assert set(records) == set(everyone)
    for record in records.values():
        assert record["task"] == "imagenet"
        assert 0 <= record["accuracy"] <= 1
        assert record["speedup"] > 0
        # validation is within 1% of the point
        assert record["matched"]
        assert record["gmacs"] == pytest.approx(0.7 * record["dense_gmacs"], rel=0.05)
    run(figures.main, "figures results")
    assert Path("results/tradeoff.png").is_file()
