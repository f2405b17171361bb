"""Training a policy for embeddings: no labels, and a backbone without a classifier."""

import json
import warnings

import pytest
import torch

from prunevit.agents import PrunedViT
from prunevit.agents.policies.calibration import Calibration
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data_config import model_data_config
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers import mappo
from prunevit.trainers.common.evaluation import evaluate

TINY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "global_pool": "avg",
}
VIT = "vit_tiny_patch16_224"


@pytest.fixture(params=[0, 5], ids=["headless", "with a head"])
def weights(request, tmp_path):
    """Weights of a random ViT, with a head or without."""
    path = tmp_path / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_backbone(VIT, num_classes=request.param, untrained=True, **TINY)
        for block in model.blocks:  # as built, they change nothing
            torch.nn.init.normal_(block.mlp.fc2.weight, std=0.3)
            torch.nn.init.normal_(block.attn.proj.weight, std=0.3)
    write_weights(path, model.state_dict(), VIT, request.param, TINY)
    return path


FLAGS = (
    "--accuracy embedding --prune-before 1 2 --keep-bias 0 --iterations 2 --num-envs 16 "
    "--rollouts-per-image 4 --eval-every 1 --device cpu --run-name e"
)


def test_mappo_learns_a_policy_for_embeddings(
    weights, make_photographs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    photos = make_photographs(train=15).replace("folder:", "photos:")
    where = ["--backbone", VIT, "--checkpoint", str(weights), "--dataset", photos]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # none about random weights, or a missing head
        mappo.main([*where, *FLAGS.split()])
    printed = capsys.readouterr().out
    assert "test cosine" in printed
    folder = tmp_path / "runs/e"
    files = [folder / "metrics.jsonl", folder / "report.json"]
    assert "accuracy" not in printed + "".join(file.read_text() for file in files)
    records = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert all(0 < record["validation_cosine"] < 1 for record in records)
    assert all(0 < record["cosine"] < 1 for record in records)
    policies = json.loads(files[1].read_text())["policies"]
    assert policies["dense"]["cosine"] == pytest.approx(1, abs=1e-5)

    model = PrunedViT.from_run(folder)
    known = Calibration.from_json(json.loads((folder / "calibration.json").read_text()))
    assert model.policy.calibration == known
    images = open_images(photos, "test", model_data_config(model.backbone.model))
    result = evaluate(model, images)
    assert result.score == pytest.approx(policies["learned"]["cosine"], abs=1e-5)
    assert result.score < 1

    # what users of timm's models call
    pixels, _ = images.load(range(len(images)))
    with torch.no_grad():
        embeddings = model(pixels)
        features = model.forward_features(pixels)
        assert model.num_classes == 0
        assert embeddings.shape == (len(images), model.num_features)
        for head in (model.forward_head(features), model.forward_head(features, pre_logits=True)):
            torch.testing.assert_close(head, embeddings)
        model.save_pretrained(tmp_path / "saved")
        again = PrunedViT.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(again(pixels), embeddings)
