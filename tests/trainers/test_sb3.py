"""Stable-Baselines3's algorithms learn the game, and what they learned prunes."""

import io
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from prunevit.envs.adapters.sb3 import TokenDQN, TokenVecEnv
from prunevit.envs.data import cluttered_digits
from prunevit.trainers.common import integrations
from prunevit.trainers.sb3 import Sb3Config, actor_of, main, make_algorithm, train

PATCHES, STAGES = 16, (1, 3)
MASKABLE = pytest.param("maskable-ppo", marks=pytest.mark.integration("sb3"))


@pytest.fixture
def env(vit, some_images):
    return TokenVecEnv(4, backbone=vit, dataset=some_images, prune_before=STAGES, device="cpu")


def config(algo):
    return Sb3Config(algo=algo, images=4, iterations=4, hidden=(8,))


@pytest.mark.parametrize("algo", ["ppo", "a2c", "dqn", MASKABLE])
def test_the_actor_decides_as_the_model_does(env, tmp_path, algo):
    model = make_algorithm(config(algo), env, len(STAGES), tmp_path)
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(4 * len(STAGES) * env.num_envs)
    assert any((p != old).any() for p, old in zip(model.policy.parameters(), before, strict=True))
    seen = env.reset()
    with torch.no_grad():
        scores = actor_of(model).eval()(torch.as_tensor(seen))
    chosen, _ = model.predict(seen, deterministic=True)
    np.testing.assert_array_equal(scores.argmax(1), chosen)
    assert scores.shape == (env.num_envs, 2)


def test_tokens_explore_each_for_itself(env, tmp_path):
    model = make_algorithm(config("dqn"), env, len(STAGES), tmp_path)
    assert isinstance(model, TokenDQN)
    seen = env.reset()
    greedy, _ = model.predict(seen, deterministic=True)
    model.exploration_rate = 0.5
    shares = [(model.predict(seen)[0] != greedy).mean() for _ in range(40)]
    assert 0.2 < np.mean(shares) < 0.3
    assert 0 < min(shares) < max(shares) < 0.6
    model.exploration_rate = 0.0
    np.testing.assert_array_equal(model.predict(seen)[0], greedy)


def test_a_training_that_is_stopped_leaves_its_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    monkeypatch.setitem(cluttered_digits.DEFAULT_SIZES, "train", 20)
    seen, step = [], TokenVecEnv.step_wait

    def stop(env):
        seen.append(0)
        if len(seen) == 5:  # in the third iteration
            os.kill(os.getpid(), signal.SIGTERM)
        return step(env)

    monkeypatch.setattr(TokenVecEnv, "step_wait", stop)
    with pytest.raises(SystemExit) as ended:
        main(["--images", "2", "--iterations", "9", "--run-name", "one", "--device", "cpu"])
    assert ended.value.code == 128 + signal.SIGTERM
    saved = tmp_path / "one" / "model.zip"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped by SIGTERM; {saved} holds the model at that point"
    model = PPO.load(saved, device="cpu")
    assert model.num_timesteps == 2 * 2 * 64 * len(STAGES)
    assert len(seen) == 5


def test_a_terminal_shows_how_far_a_training_is(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    monkeypatch.setitem(cluttered_digits.DEFAULT_SIZES, "train", 20)
    monkeypatch.setattr(integrations.LibraryRun, "conclude", lambda *_: {})
    monkeypatch.setattr(sys, "stderr", Terminal())
    train(Sb3Config(images=2, iterations=3, run_name="one", device="cpu"))
    assert f"{3 * len(STAGES)}/{3 * len(STAGES)} [" in sys.stderr.getvalue()


@pytest.mark.learning
def test_ppo_learns_to_prune_the_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    main(["--images", "32", "--iterations", "20", "--run-name", "one", "--device", "cpu"])
    report = json.loads((tmp_path / "one" / "report.json").read_text())["policies"]
    assert (tmp_path / "one" / "model.zip").is_file()
    assert report["ppo"]["gmacs"] < 0.8 * report["dense"]["gmacs"]
    assert report["ppo"]["accuracy"] > report["dense"]["accuracy"] - 0.1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split()[:2] == ["ppo", f"{100 * report['ppo']['accuracy']:.2f}%"]
