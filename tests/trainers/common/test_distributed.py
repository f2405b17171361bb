"""Two processes on the CPU learn what one does; they begin once, and all is checked in them."""

import copy
import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from gymnasium.spaces import Box, Discrete

from prunevit.agents import PrunedViT
from prunevit.agents.policies.actor_critic import Actor
from prunevit.agents.policies.heuristics import TopK
from prunevit.envs.batched.protocol import Observations
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers import mappo
from prunevit.trainers.backbone import BackboneConfig, CrossEntropy
from prunevit.trainers.common.classification import Learner
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.distributed import ALONE, RanksError, join_ranks
from prunevit.trainers.common.evaluation import accuracy
from prunevit.trainers.common.experiments import TokenPruneExperiment
from prunevit.trainers.common.signals import Stopped
from prunevit.trainers.finetune import Distillation, FinetuneConfig, freeze

RANKS = 2
TOLERANCE = 1e-5
TIMEOUT = 120  # seconds
VIT = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 2,
}
TINY = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}


# --- what the processes are given, and how they are begun ---


@pytest.fixture(scope="module")
def folder(make_photographs):
    """Images, and a random ViT of 16 patches."""
    root = Path(make_photographs().removeprefix("folder:"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = create_backbone(num_classes=2, untrained=True, **TINY).state_dict()
    # far from its initialisation, in which the class token looks everywhere alike
    weights = {name: 10 * w if "qkv" in name else w for name, w in weights.items()}
    write_weights(root / "tiny.safetensors", weights, "digits_vit", 2, TINY)
    return root


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def begin(rank, port, folder):
    """Rank ``rank``, as torchrun would begin it; its output goes to a file."""
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with (folder / f"rank{rank}.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.integration("distributed")
@pytest.mark.timeout(2 * TIMEOUT)
def test_two_ranks_learn_what_one_does(folder):
    port = free_port()
    processes = [begin(rank, port, folder) for rank in range(RANKS)]
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [(folder / f"rank{rank}.txt").read_text() for rank in range(RANKS)]
    assert codes == [0] * RANKS, "\n".join(said)
    assert len(list((folder / "runs").iterdir())) == 2
    assert said[0].count("where an iteration goes") == 1
    assert said[1].count("where an iteration goes") == 0
    boards = list((folder / "runs" / "stopped").glob("events*"))
    assert len(boards) == 2  # one before it was stopped, one after


def test_a_process_without_torchrun_is_alone_and_needs_no_fabric(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert join_ranks("cpu") is ALONE
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_ranks("cpu") is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RanksError, match=r"pip install -e '\.\[distributed\]'"):
        join_ranks("cpu")


# --- what the processes do ---


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def mine(ranks, rows):
    """This rank's part of the first dimension."""
    return rows[ranks.rank * len(rows) // ranks.count :][: len(rows) // ranks.count]


class Sizes:
    """Of a game that nobody plays."""

    observation_space, state_space, action_space = Box(-9, 9, (3,)), Box(-9, 9, (2,)), Discrete(2)
    rollouts_per_start = 2
    device = torch.device("cpu")


def played(ranks, alive):
    """A rollout of made up numbers, alive [T, B, N] as given; this rank's part of it."""
    steps, batch, agents = alive.shape
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    rollout = mappo.Rollout()
    for t in range(steps):
        shown, state = draw(batch, agents, 3), draw(batch, 2)
        parts = (shown * alive[t, ..., None], state, alive[t], torch.ones(batch, agents, 2).bool())
        rollout.observations.append(Observations(*(mine(ranks, part) for part in parts)))
        live, action, log_prob = mine(ranks, alive[t]), draw(batch, agents), draw(batch, agents)
        rollout.action.append((mine(ranks, action) > 0).long()[live])
        rollout.log_prob.append(-mine(ranks, log_prob).abs()[live])
        rollout.value.append(mine(ranks, draw(batch, agents)) * live)
        rollout.next_value.append(mine(ranks, draw(batch, agents)))
        last = t + 1 == steps
        rollout.next_alive.append(mine(ranks, alive[t] & (not last) & alive[min(t + 1, steps - 1)]))
        rollout.reward.append(mine(ranks, draw(batch, agents)))
        rollout.ended.append(torch.full((batch // ranks.count,), last))
    return rollout


def learned(ranks, alive, **changes):
    """Losses of an iteration, and all that was learned by it."""
    config = MappoConfig(
        hidden=(8,), critic="central", critic_hidden=(8,), epochs=3, lr=0.02, max_grad_norm=0.1
    )
    torch.manual_seed(ranks.rank)  # rank zero's weights are everybody's
    learner = mappo.Learner(
        Actor(3, 2, (8,)), Sizes(), dataclasses.replace(config, **changes), ranks
    )
    generator = torch.Generator().manual_seed(ranks.rank)
    batch = mappo.compute_advantages(played(ranks, alive), learner, Sizes())
    return mappo.update(learner, batch, generator), learner.state_dict()


def check_decisions(ranks):
    """The second rank has far fewer of them than the first, then none at all in an iteration."""
    uneven = torch.ones(3, 8, 5, dtype=torch.bool)
    uneven[1:, 4:, 1:] = False
    uneven[2, 2:7] = False
    one_sided = uneven.clone()
    one_sided[:, 4:] = False
    nobody = torch.zeros_like(uneven)
    for alive in (uneven, one_sided, nobody):
        alone = learned(ALONE, alive)
        assert_close(learned(ranks, alive), alone)
        assert_close(learned(ranks, alive, accumulate=3), alone)
    # in minibatches they are other parts of the same decisions, but all take the same steps
    _, weights = learned(ranks, one_sided, minibatches=3)
    for tensor in weights.values():
        assert_close(ranks.average(tensor), tensor)


def game_config(**changes):
    return MappoConfig(
        model_kwargs=TINY, checkpoint=Path("tiny.safetensors"), dataset=f"folder:{Path.cwd()}",
        augment=False, prune_before=(1, 2), rollouts_per_image=2, num_envs=8, iterations=4,
        hidden=(8,), critic="central", critic_hidden=(8,), epochs=2, lr=2e-4, device="cpu",
        eval_every=2, eval_size=7, checkpoint_every=3, keep_bias=1.0, **changes,
    )  # fmt: skip


def check_game(ranks, seed):
    """From the images to the record, alphas drawn per image included."""
    observation = ("token", "cls", "stage", "cls_attention", "alpha")
    config = game_config(alpha_range=(0.1, 1.0), observation=observation, seed=seed)
    outcomes = []
    sample = mappo.sample
    for together in (ranks, ALONE):
        torch.manual_seed(0)
        task = TokenPruneExperiment(config, together)
        mappo.sample = sample_alike(together, task.env)
        trainer = mappo.Trainer(task.env, task.make_actor(), config, together)
        records = [trainer.iterate() for _ in range(2)]
        judged = task.evaluate(trainer.learner.actor)
        outcomes.append((records, judged, trainer.learner.state_dict()))
        images = task.env.indices.unique()
    mappo.sample = sample
    assert len(images) == config.num_envs // config.rollouts_per_image
    assert all(0.2 < record["keep_ratio"] < 0.8 for record in outcomes[0][0])
    assert_close(*outcomes)


def sample_alike(ranks, env):
    """In the place of ``mappo.sample``: an agent gets the same random number on any number of
    ranks.

    Each agent has its own, since rollouts of an image that act alike have equal returns: all that
    their comparison leaves is rounding, which the normalised advantages enlarge.
    """
    generator = torch.Generator().manual_seed(0)
    stages = itertools.cycle(range(env.episode_length))
    alive = torch.ones(env.num_envs, env.num_agents, dtype=torch.bool)

    def sample(log_probs, own_generator):
        if next(stages) == 0:
            alive.fill_(True)
        uniform = torch.rand(ranks.count * env.num_envs, env.num_agents, generator=generator)
        keep = log_probs[:, 1].exp() > mine(ranks, uniform)[alive]
        alive.masked_scatter_(alive.clone(), keep)
        return keep.long()

    return sample


def check_supervised(ranks):
    """A backbone; then a pruned ViT, its frozen part and policy aside."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (8,), generator=generator)
    outcomes = []
    for together, parts in ((ranks, 2), (ALONE, 1)):
        torch.manual_seed(together.rank)
        # no batch normalisation, which has statistics of each rank's part
        vit = timm.create_model("vit_tiny_patch16_224", **VIT)
        config = BackboneConfig(patch_dropout=0, lr=2e-4, accumulate=parts)
        pruned = PrunedViT(StagedViT(copy.deepcopy(vit).eval(), (1, 2)), TopK([9, 4])).eval()
        freeze(pruned, "before-first-stage")
        distilled = FinetuneConfig(lr=2e-4, accumulate=parts)
        torch.manual_seed(2)
        teacher = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
        learners = (
            Learner(vit.train(), CrossEntropy(vit, config), config, 4, ranks=together),
            Learner(pruned, Distillation(teacher, distilled), distilled, 4, ranks=together),
        )
        losses = [
            [learner.learn(mine(together, inputs), mine(together, labels), step) for step in (0, 1)]
            for learner in learners
        ]
        states = [(each.model.state_dict(), each.ema.module.state_dict()) for each in learners]
        right = [accuracy(vit.eval(), Numbered(inputs, labels), torch.device("cpu"), together)]
        outcomes.append((losses, states, right))
    assert_close(*outcomes)


@dataclasses.dataclass
class Numbered:
    """An ``ImageSet`` of more than one batch of an evaluation."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return 2 * 250 + 7

    def load(self, indices):
        index = torch.as_tensor(list(indices)) % len(self.images)
        return self.images[index], self.labels[index]


def check_stopping(ranks):
    """A signal to one stops both; what is resumed then ends as if it had not been stopped."""
    whole = mappo.open_run(game_config(run_name="whole", profile=True), ranks)
    mappo.learn(*whole)
    played_before = mappo.collect_rollout

    def play_and_stop(env, learner, *rest):
        if ranks.rank == 1 and len(stopped_run.records) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return played_before(env, learner, *rest)

    stopped_run, config = mappo.open_run(game_config(run_name="stopped"), ranks)
    mappo.collect_rollout = play_and_stop
    with pytest.raises(Stopped) as stopped:
        mappo.learn(stopped_run, config)
    mappo.collect_rollout = played_before
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert stopped.value.is_told == (ranks.rank == 0)
    assert "iteration 3 is saved" in stopped.value.__notes__
    ranks.wait()
    resumed = mappo.open_run(MappoConfig(resume=Path("runs/stopped")), ranks)
    mappo.learn(*resumed)
    ranks.wait()
    policies = [Path(f"runs/{name}/policy.safetensors") for name in ("whole", "stopped")]
    assert policies[0].read_bytes() == policies[1].read_bytes()


def check_the_last_one_left(ranks):
    """A rank that has ended is an error for the other, and no endless wait."""
    ranks.wait()
    if ranks.rank == 1:
        os._exit(0)
    with pytest.raises(RanksError, match="another rank has ended"):
        ranks.total(1)


def work():
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    assert (ranks.rank, ranks.count) == (int(os.environ["RANK"]), RANKS)
    check_decisions(ranks)
    for seed in range(4):
        check_game(ranks, seed)
    check_supervised(ranks)
    check_stopping(ranks)
    check_the_last_one_left(ranks)
    # nothing is left to be taken leave of
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    work()
