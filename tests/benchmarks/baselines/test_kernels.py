"""Rivals run on the kernels that ours runs on, and answer what they answer on timm's."""

import pytest
import torch

from prunevit.agents import AttentionThreshold, KeepAll, PrunedViT, TopK
from prunevit.benchmarks.baselines.ats import ATS
from prunevit.benchmarks.baselines.diffrate import DiffRateViT
from prunevit.benchmarks.baselines.evit import EViT
from prunevit.benchmarks.baselines.ltmp import LTMPViT
from prunevit.benchmarks.baselines.padded import PaddedViT
from prunevit.benchmarks.baselines.pitome import PiToMeViT
from prunevit.benchmarks.baselines.timm_parts import run_block
from prunevit.benchmarks.baselines.tome import ToMeViT
from prunevit.benchmarks.baselines.zero_tprune import ZeroTPrune
from prunevit.envs.vit import execution, onednn_linear
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

STAGES = (1, 3)
LINEARS = 4  # of a block: queries, keys and values; output; two of the MLP
RIVALS = {
    "ToMe": lambda backbone: ToMeViT(backbone.model, (3, 0, 5, 2)),
    "PiToMe": lambda backbone: PiToMeViT(backbone.model, (3, 0, 5, 2)),
    "DiffRate": lambda backbone: DiffRateViT(backbone.model, ((16, 16), (14, 11), (9, 9), (8, 5))),
    "Zero-TPrune": lambda backbone: ZeroTPrune(backbone.model, STAGES, (10, 5)),
    "LTMP": lambda backbone: LTMPViT(backbone, (0.9, 0.6, 1.1, 0.3), (0.02, 0.04, 0.0, 0.06)),
    "EViT": lambda backbone: EViT(backbone.model, STAGES, (10, 5)),
    "EViT, not fused": lambda backbone: EViT(backbone.model, STAGES, (10, 5), with_fused=False),
    "uniform": lambda backbone: PaddedViT(backbone, TopK((10, 5))),
    "padded": lambda backbone: PaddedViT(backbone, AttentionThreshold((1.0, 1.0))),
    "ATS": lambda backbone: ATS(backbone, (9, 6)),
    "ours, unpruned": lambda backbone: PrunedViT(backbone, KeepAll()),
}
rivals = pytest.mark.parametrize("make", RIVALS.values(), ids=RIVALS)


@pytest.fixture
def backbone(make_vit):
    return StagedViT(make_vit().requires_grad_(False), STAGES)


@pytest.fixture
def images(backbone):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, *backbone.image_shape, generator=generator)


def test_rectangles_run_whole_blocks_only(backbone):
    inside = StagedViT(backbone.model, STAGES, prune_at="mlp")
    with pytest.raises(UnsupportedBackboneError, match="run whole blocks, not prune_at='mlp'"):
        PaddedViT(inside, TopK((10, 5)))


@pytest.fixture
def rows_of_linears(monkeypatch):
    """How many rows each call of oneDNN's linear layer had, where any product is large enough."""
    monkeypatch.setattr(onednn_linear, "MIN_MACS", 0)
    seen = []
    original = onednn_linear._onednn

    def counted(layer, rows, *arguments):
        seen.append(len(rows))
        return original(layer, rows, *arguments)

    monkeypatch.setattr(onednn_linear, "_onednn", counted)
    return seen


@rivals
@torch.no_grad()
@pytest.mark.skipif(not onednn_linear.HAS_ONEDNN, reason="torch was built without oneDNN")
def test_all_blocks_go_through_onednns_linear_layers(
    make, backbone, images, rows_of_linears, monkeypatch
):
    model = make(backbone)
    answer = model(images)
    assert len(rows_of_linears) == LINEARS * backbone.depth
    monkeypatch.setattr(onednn_linear, "MIN_MACS", 1 << 40)  # timm's own
    torch.testing.assert_close(model(images), answer, rtol=0, atol=1e-5)
    assert len(rows_of_linears) == LINEARS * backbone.depth


@rivals
@torch.no_grad()
@pytest.mark.skipif(not onednn_linear.HAS_ONEDNN, reason="torch was built without oneDNN")
def test_large_batches_pass_in_chunks(make, backbone, images, rows_of_linears, monkeypatch):
    model = make(backbone)
    whole = model(images)
    most_of_whole = max(rows_of_linears)
    rows_of_linears.clear()
    size = 2 * backbone.num_slots * backbone.width * backbone.dtype.itemsize  # two images
    monkeypatch.setattr(execution, "CHUNK_BYTES", size)
    torch.testing.assert_close(model(images), whole, rtol=0, atol=1e-5)
    step = onednn_linear.ROW_STEP
    assert max(rows_of_linears) < 2 * backbone.num_slots + step < most_of_whole


@torch.no_grad()
def test_timms_own_block_runs_where_someone_watches(backbone, rows_of_linears):
    seen = []
    block = backbone.model.blocks[0]
    block.register_forward_hook(lambda *_: seen.append(1))
    run_block(block, torch.randn(2, 9, backbone.width))
    assert seen
    assert not rows_of_linears
