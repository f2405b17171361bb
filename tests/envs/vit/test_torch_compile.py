"""A game whose blocks are compiled; ``tests/agents/test_compile.py`` has inductor's own code."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from prunevit.envs.game import TokenGame
from prunevit.envs.rewards import TeamReward
from prunevit.envs.vit import torch_compile
from prunevit.envs.vit.staged_vit import StagedViT

compile_by = torch.compile


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """Of graphs alone: the code that is made of them takes its time."""
    monkeypatch.setattr(torch, "compile", partial(compile_by, backend="eager"))
    for forget in (torch_compile.compile_block.cache_clear, torch.compiler.reset, counters.clear):
        forget()
    yield
    for forget in (torch_compile.compile_block.cache_clear, torch.compiler.reset):
        forget()


def play(game, images, labels, shares):
    """All that is seen and paid when such shares of the patches are kept, at random."""
    generator = torch.Generator().manual_seed(0)
    stage, told = game.reset(images, labels), []
    for share in shares:
        told.append(stage.view.living(("token", "cls_attention")))
        stage = game.step(torch.rand(stage.alive.shape, generator=generator) < share)
        told.append(stage.reward)
    return [*told, stage.outcome.logits]


@pytest.mark.parametrize("on_prune", ["drop", "merge"])
def test_a_compiled_game_is_the_same_and_compiles_no_number_of_tokens_anew(
    vit, make_images, on_prune
):
    images, labels = make_images(24).load(range(24))
    plain, fast = (
        TokenGame(
            StagedViT(vit, (1, 3), torch_compile=is_compiled, on_prune=on_prune),
            TeamReward(accuracy="kl"),
            rollouts_per_image=2,
        )
        for is_compiled in (False, True)
    )
    graphs = []
    # nothing pruned, more and more, all; in batches of several sizes
    kinds = [(24, (1.0, 0.9)), (24, (0.5, 0.5)), (9, (0.3, 1.0)), (24, (0.0, 0.0))]
    for batch, shares in kinds + [(size, (0.6, 0.7)) for size in (2, 3, 10, 23)]:
        games = (play(game, images[:batch], labels[:batch], shares) for game in (plain, fast))
        torch.testing.assert_close(*games, rtol=0, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    # so many kinds of layout there are, with attention observed and without
    assert 0 < graphs[0] < graphs[4] <= 8
    assert graphs[-1] == graphs[4]


def test_blocks_that_are_pruned_inside_are_not_compiled_and_the_others_are(vit, make_images):
    images, labels = make_images(12).load(range(12))
    plain, fast = (
        TokenGame(StagedViT(vit, (0, 2), torch_compile=is_compiled, prune_at="mlp"))
        for is_compiled in (False, True)
    )
    for shares in ((1.0, 0.9), (0.5, 0.5), (0.0, 0.0)):
        games = (play(game, images, labels, shares) for game in (plain, fast))
        torch.testing.assert_close(*games, rtol=0, atol=1e-5)
    # with padding and without, for blocks 1 and 3
    assert 0 < counters["stats"]["unique_graphs"] <= 3


def test_where_there_is_no_compiler_it_is_said(monkeypatch):
    def fail(function):
        def call(x):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH...")

        return call

    torch_compile.check_compiler(torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ValueError, match="can't be compiled for cpu here: InvalidCxx") as raised:
        torch_compile.check_compiler(torch.device("cpu"))
    assert "\n" not in str(raised.value)
