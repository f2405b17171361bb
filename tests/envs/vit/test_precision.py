"""Half precision, and the GPU: packed is masked there too, to a tolerance that is stated."""

import pytest
import torch

from prunevit.agents import PrunedViT
from prunevit.envs.vit.staged_vit import StagedViT

STAGES = (1, 3)
# bfloat16 keeps 8 bits: a unit in the last place of logits around 1, over four blocks
BFLOAT16 = 0.1
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Draw:
    """Random decisions, the same on every device: the first image loses all patches, the last
    none.
    """

    needs_attention, macs_per_decision = True, 0

    def __call__(self, view):
        generator = torch.Generator().manual_seed(view.stage)
        share = torch.linspace(0, 1, len(view.alive))[:, None]
        drawn = torch.rand(view.alive.shape, generator=generator) < share
        return drawn.to(view.alive.device)


def logits(vit, images, execution="packed"):
    with torch.no_grad():
        return PrunedViT(StagedViT(vit, STAGES, execution), Draw())(images).float().cpu()


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}])
def test_bfloat16_on_the_cpu(make_vit, make_images, kwargs):
    images = make_images(8).images
    full = logits(make_vit(**kwargs), images)
    vit, images = make_vit(**kwargs).bfloat16(), images.bfloat16()
    packed = logits(vit, images)
    torch.testing.assert_close(packed, logits(vit, images, "masked"), rtol=0, atol=BFLOAT16)
    torch.testing.assert_close(packed, full, rtol=0, atol=2 * BFLOAT16)


@needs_cuda
@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}])
def test_cuda_pads_in_single_precision(make_vit, make_images, kwargs):
    images = make_images(8).images
    vit = make_vit(**kwargs)
    expected = logits(vit, images, "masked")
    torch.testing.assert_close(
        logits(vit.cuda(), images.cuda()), expected, rtol=0, atol=1e-4, msg="packed on CUDA"
    )


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}])
def test_cuda_runs_lengths_as_they_are_in_half_precision(make_vit, make_images, kwargs, dtype):
    images = make_images(8).images
    expected = logits(make_vit(**kwargs), images, "masked")
    vit = make_vit(**kwargs).to("cuda", dtype)
    found = logits(vit, images.to("cuda", dtype))
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * BFLOAT16)
