"""FSDP2 replaces parameters by sharded ones, and gathers them in hooks around each module.
DistributedDataParallel wants a gradient of each parameter.
"""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from prunevit.agents import KeepAll, PrunedViT, TopK, prune
from prunevit.envs.vit.staged_vit import StagedViT
from prunevit.envs.vit.timm_models.supported import UnsupportedBackboneError

STAGES = (1, 2)


@pytest.fixture(scope="module")
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    try:
        fully_shard(torch.nn.Linear(2, 2), mesh=mesh)(torch.ones(1, 2))
        yield mesh
    except AttributeError:
        pytest.skip("FSDP2 of this torch needs a GPU")
    finally:
        distributed.destroy_process_group()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shard(blocks, mesh):
    for block in blocks:
        fully_shard(block, mesh=mesh)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_sharded_blocks_run(make_vit, mesh, images, batch):
    whole, vit = make_vit(), make_vit()
    images = images[:batch]
    shard(vit.blocks, mesh)
    for policy in (KeepAll(), TopK((8, 4))):
        pruned = PrunedViT(StagedViT(vit, STAGES), policy)
        expected = prune(whole, policy, STAGES)(images)
        torch.testing.assert_close(pruned(images), expected, rtol=0, atol=1e-5)


def test_a_sharded_pruned_model_learns_what_a_whole_one_does(make_vit, mesh, images):
    whole, sharded = (prune(make_vit(), TopK((8, 4)), STAGES) for _ in range(2))
    shard(sharded.backbone.model.blocks, mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (whole, sharded):
        model(images).square().sum().backward()
    for ours, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-5)


def test_a_model_that_was_sharded_as_a_whole_is_refused(make_vit, mesh):
    """Its own forward pass would gather the stem and the head, and never runs."""
    vit = make_vit()
    shard([*vit.blocks, vit], mesh)
    with pytest.raises(UnsupportedBackboneError, match="would never run"):
        StagedViT(vit, STAGES)
    with pytest.raises(UnsupportedBackboneError, match="prune it before it is sharded"):
        prune(vit, TopK((8, 4)), STAGES)


@pytest.mark.parametrize("training", [False, True])
def test_distributed_data_parallel_learns_what_one_process_does(make_vit, mesh, images, training):
    whole, wrapped = (prune(make_vit(), TopK((8, 4)), STAGES).train(training) for _ in range(2))
    parallel = DistributedDataParallel(wrapped)
    for _ in range(2):  # it complains about parameters without gradients in the second pass
        for model in (whole, parallel):
            model(images).square().sum().backward()
    for ours, expected in zip(wrapped.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)
