"""RLlib's PPO learns the game, and what it learned prunes."""

import json
import os
import signal

import pytest
import torch

from prunevit.envs.game import GameError
from prunevit.trainers.common import integrations

PATCHES, STAGES = 16, (1, 3)
pytestmark = pytest.mark.integration("rllib")


@pytest.fixture
def rllib():
    from prunevit.trainers import rllib

    return rllib


@pytest.fixture
def one_core():
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_round_plays_new_images_to_the_end_and_moves_the_policy(
    one_core, rllib, vit, some_images
):
    game = {"backbone": vit, "dataset": some_images, "prune_before": STAGES, "device": "cpu"}
    config = rllib.RllibConfig(images=4, hidden=(8,))
    algorithm = rllib.make_algorithm(config, game, PATCHES, len(STAGES))
    policy = algorithm.get_module(rllib.POLICY)
    # hardly anybody stays
    with torch.no_grad():
        policy.actor.net[-1].bias[0] = 3.0
    env = algorithm.env_runner.env
    before = [p.clone() for p in policy.actor.parameters()]
    played = []
    for _ in range(2):
        results = algorithm.train()["env_runners"]
        played.append(env._images.held.env.indices.tolist())
    # one seed, but not the same images for ever; and no more rounds than there were
    assert played[0] != played[1]
    assert len(played[0]) == 4
    assert env._images.held.env.game.num_stages == len(STAGES)
    assert results["num_episodes_lifetime"] == 2 * 4
    after = algorithm.get_module(rllib.POLICY).actor.parameters()
    assert any((now != old).any() for now, old in zip(after, before, strict=True))
    # a runner that is given another environment lets go of the one it had
    algorithm.env_runner.make_env()
    with pytest.raises(GameError, match="closed"):
        env.reset()
    algorithm.stop()


def test_a_run_leaves_its_record_and_a_checkpoint(one_core, rllib, tmp_path, monkeypatch, capsys):
    from ray.rllib.algorithms.ppo import PPO

    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    rllib.main(["--images", "8", "--iterations", "2", "--run-name", "one", "--device", "cpu"])
    folder = tmp_path / "one"
    report = json.loads((folder / "report.json").read_text())["policies"]
    assert report["dense"]["accuracy"] > 0.9
    assert 0 < report["ppo"]["gmacs"] < 1.1 * report["dense"]["gmacs"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["episodes"] for row in rows] == [8, 16]
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split()[:2] == ["ppo", f"{100 * report['ppo']['accuracy']:.2f}%"]
    restored = PPO.from_checkpoint(str(folder / "checkpoint"))
    policy = restored.get_module(rllib.POLICY)
    seen = torch.randn(3, *policy.observation_space.shape)
    assert policy.forward_inference({"obs": seen})
    restored.stop()


def test_a_training_that_is_stopped_leaves_a_checkpoint(rllib, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    done = []

    class Algorithm:
        def train(self):
            os.kill(os.getpid(), signal.SIGTERM)

        def save_to_path(self, path):
            done.append(path)

        def stop(self):
            done.append("stopped")

    monkeypatch.setattr(rllib, "make_algorithm", lambda *_: Algorithm())
    with pytest.raises(SystemExit) as ended:
        rllib.main(["--run-name", "one", "--device", "cpu"])
    assert ended.value.code == 128 + signal.SIGTERM
    checkpoint = tmp_path / "one" / "checkpoint"
    assert done == [checkpoint, "stopped"]
    said = f"stopped by SIGTERM; {checkpoint} holds the model at that point"
    assert said in capsys.readouterr().err
