"""bfloat16 is for the ViT; who decides and what is learned stays in float32."""

import pytest
import torch

from prunevit.agents import PrunedViT
from prunevit.agents.policies.actor_critic import TokenActor
from prunevit.agents.policies.learned import LearnedPolicy
from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.game import TokenGame
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.trainers.common.classification import Learner
from prunevit.trainers.common.config import MappoConfig
from prunevit.trainers.common.evaluation import evaluate
from prunevit.trainers.finetune import Distillation, FinetuneConfig, freeze
from prunevit.trainers.mappo import Trainer

FIELDS = ("token", "cls", "stage", "cls_attention")
BFLOAT16 = 0.1  # 8 bits of a loss around 1, over four blocks


def make_actor(env):
    torch.manual_seed(0)
    return TokenActor(env.observation_space.shape[0], (8,), env.field_slices["cls_attention"].start)


def test_a_policy_learns_in_float32_on_a_backbone_in_bfloat16(make_vit, some_images):
    config = MappoConfig(num_envs=8, rollouts_per_image=2, iterations=2, critic="central")
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        backbone = StagedViT(make_vit().to(dtype), (1, 3))
        env = BatchedTokenPrune(TokenGame(backbone, rollouts_per_image=2), some_images, 8, FIELDS)
        trainer = Trainer(env, make_actor(env), config)
        records.append(trainer.iterate())
        assert env.outcome.logits.dtype == torch.float32
        learned = trainer.learner.state_dict().values()
        assert {tensor.dtype for tensor in learned} == {torch.float32}
        policy = LearnedPolicy(trainer.learner.actor, FIELDS)
        assert 0 <= evaluate(PrunedViT(backbone, policy), some_images).accuracy <= 1
    plain, half = records
    assert half["entropy"] == pytest.approx(plain["entropy"], abs=BFLOAT16)
    assert half["keep_ratio"] == pytest.approx(plain["keep_ratio"], abs=BFLOAT16)


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_fine_tuning_computes_in_bfloat16_alone(make_vit, some_images, execution):
    losses = []
    for precision in ("float32", "bfloat16"):
        vit = make_vit()
        backbone = StagedViT(vit, (1, 3), execution)
        env = BatchedTokenPrune(TokenGame(StagedViT(vit, (1, 3))), some_images, 4, FIELDS)
        actor = make_actor(env)
        pruned = PrunedViT(backbone, LearnedPolicy(actor, FIELDS)).eval()
        freeze(pruned, "nothing")
        config = FinetuneConfig(precision=precision, accumulate=2)
        learner = Learner(pruned, Distillation(make_vit(seed=1), config), config, 4)
        inputs, labels = some_images.load(range(12))
        losses.append(float(learner.learn(inputs, labels, 0)))
        assert {p.dtype for p in pruned.parameters()} == {torch.float32}
        for group in learner.optimizer.state.values():
            assert group["exp_avg"].dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], abs=BFLOAT16)
    assert losses[1] != losses[0]


def test_the_policy_decides_in_float32_under_autocast(make_vit, some_images):
    backbone = StagedViT(make_vit(), (1, 3))
    dtypes = []

    class Watching:
        needs_attention, macs_per_decision = True, 0

        def __call__(self, view):
            product = view.token @ view.token.T
            dtypes.append((view.token.dtype, product.dtype))
            return view.alive

    images = some_images.load(range(2))[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = PrunedViT(backbone, Watching())(images)
    assert logits.dtype == torch.bfloat16
    assert dtypes == [(torch.float32, torch.float32)] * 2
