"""BenchMARL's algorithms learn the game, and what they learned prunes."""

import json
import pickle
import signal
from typing import get_args

import pytest
import torch

from prunevit.trainers.common import integrations
from prunevit.trainers.common.signals import Stopped

PATCHES, STAGES = 16, (1, 3)
ALGORITHMS = ("mappo", "ippo", "qmix", "vdn", "iql", "masac", "isac")
pytestmark = [
    pytest.mark.integration("benchmarl"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture
def benchmarl():
    from prunevit.trainers import benchmarl

    return benchmarl


@pytest.fixture
def task(vit, some_images):
    from prunevit.envs.adapters.benchmarl import TokenPruneTask

    return TokenPruneTask(config={"backbone": vit, "dataset": some_images, "prune_before": STAGES})


@pytest.fixture
def experiment(benchmarl, task, tmp_path):
    """``experiment(algorithm, ...)``: a tiny one."""

    def make(algorithm, **settings):
        config = benchmarl.BenchmarlConfig(
            algorithm=algorithm, images=4, iterations=2, hidden=(8,), device="cpu", **settings
        )
        return benchmarl.make_experiment(config, task, tmp_path)

    return make


def test_every_algorithm_is_tried(benchmarl):
    assert get_args(benchmarl.Algorithm) == ALGORITHMS


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_and_its_actor_decides_as_its_policy(
    benchmarl, experiment, task, tmp_path, algorithm
):
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    made = experiment(algorithm)
    before = [value.clone() for value in benchmarl.actor_of(made).parameters()]
    benchmarl.run(made)
    actor = benchmarl.actor_of(made)
    assert any((p != old).any() for p, old in zip(actor.parameters(), before, strict=True))
    (folder,) = tmp_path.iterdir()
    assert list(folder.glob("checkpoints/*.pt"))
    assert (folder / folder.name / "scalars" / "collection_accuracy.csv").is_file()

    seen = task.get_env_fun(4, False, 0, "cpu")()
    shown = seen.reset()
    half = torch.arange(PATCHES) % 2
    act = seen.full_action_spec.zero().set(("token", "action"), half.expand(4, -1))
    shown = shown.update(act)
    shown = seen.step(shown)["next"].exclude(("token", "reward"))
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        scores = actor(shown["token", "observation"].flatten(0, 1)).unflatten(0, (4, PATCHES))
        for transform in task.get_env_transforms(seen):
            shown = transform._call(shown)
        chosen = made.policy(shown)["token", "action"]
    living = shown["token", "mask"]
    torch.testing.assert_close(chosen[living], scores.argmax(-1)[living])
    assert not chosen[~living].any()


def test_time_that_is_up_ends_the_training_with_a_checkpoint(benchmarl, experiment, tmp_path):
    made = experiment("ippo", minutes=1e-9)
    benchmarl.run(made)
    assert made.n_iters_performed == 0
    assert list(tmp_path.glob("*/checkpoints/*.pt"))


def test_a_training_that_is_stopped_leaves_a_checkpoint_to_go_on_from(
    benchmarl, experiment, tmp_path
):
    from benchmarl.experiment import Callback, Experiment

    made = experiment("ippo")

    class Stop(Callback):
        def on_train_step(self, batch, group):
            raise Stopped(signal.SIGTERM)

    made.callbacks.append(Stop())
    with pytest.raises(Stopped) as stopped:
        benchmarl.run(made)
    (checkpoint,) = tmp_path.glob("*/checkpoints/*.pt")
    assert stopped.value.__notes__ == [f"{checkpoint} is saved"]
    again = Experiment.reload_from_file(str(checkpoint))
    weights = benchmarl.actor_of(again).state_dict()
    for name, weight in benchmarl.actor_of(made).state_dict().items():
        assert torch.equal(weights[name], weight)


def test_a_task_survives_pickling(task):
    again = pickle.loads(pickle.dumps(task))
    env = again.get_env_fun(2, False, 0, "cpu")()
    assert env.batch_size == (2,)
    assert again.max_steps(env) == len(STAGES)


@pytest.mark.learning
def test_mappo_learns_to_prune_the_digits(benchmarl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integrations, "RUNS", tmp_path)
    benchmarl.main(["--images", "32", "--iterations", "50", "--run-name", "one", "--device", "cpu"])
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    policies = report["policies"]
    assert report["iterations"] == 50
    assert policies["mappo"]["gmacs"] < 0.8 * policies["dense"]["gmacs"]
    assert policies["mappo"]["accuracy"] > policies["dense"]["accuracy"] - 0.15
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split()[:2] == ["mappo", f"{100 * policies['mappo']['accuracy']:.2f}%"]
