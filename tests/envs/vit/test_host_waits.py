"""How often the host waits for the GPU: a wait empties its queue, and small batches pay for each.

On CUDA the driver counts. Without it, tensors pretend to be on a GPU, and what would wait there is
counted: reading their values, searching for those that are true, and copies that are not
asynchronous.
"""

import warnings

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunevit.agents import AttentionThreshold, KeepAll, PrunedViT, TopK
from prunevit.agents.policies.serialization import learned_policy
from prunevit.envs.game import TokenGame
from prunevit.envs.vit.staged_vit import StagedViT

STAGES = (1, 2, 3)
GPU = torch.device("cuda")
# what reads values of a tensor, or makes a tensor whose size is known on the GPU alone
READS = {
    "cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__",
    "nonzero", "unique", "unique_consecutive", "masked_select", "argwhere", "equal", "allclose",
}  # fmt: skip


class Pretended(Tensor):
    """A tensor on the CPU that pretends to be on a GPU; see ``PretendGPU``."""


class PretendGPU(TorchFunctionMode):
    """Counts the waits for tensors that are ``Pretended``, and makes those on ``GPU`` pretend."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        on_gpu = bool(args) and isinstance(args[0], Pretended)
        if func == Tensor.device.__get__:
            return GPU if on_gpu else func(*args)
        if on_gpu and (name in READS or self.searches(name, args)):
            self.waits.append(name)
            plain = args[0].as_subclass(Tensor)
            found = func(plain, *args[1:], **kwargs)
            host = name in ("cpu", "numpy", "equal") or not isinstance(found, Tensor | tuple)
            return found if host else self.pretend(found)
        if name in ("repeat_interleave", "where") and self.hides_a_size(name, args, kwargs):
            self.waits.append(name)
        args = list(args)
        to_gpu = GPU in [each for each in args if isinstance(each, torch.device)]
        to_gpu |= kwargs.get("device") is not None and torch.device(kwargs["device"]) == GPU
        if to_gpu:
            cpu = torch.device("cpu")
            args = [cpu if isinstance(each, torch.device) else each for each in args]
            if "device" in kwargs:
                kwargs["device"] = cpu
            copies = name == "to" and not on_gpu and not kwargs.get("non_blocking")
            if copies or name in ("tensor", "as_tensor"):
                self.waits.append(f"{name} the GPU")
        found = func(*args, **kwargs)
        return self.pretend(found) if to_gpu else found

    @staticmethod
    def searches(name, args):
        """Whether an index is a mask, whose true entries are counted first."""
        if name not in ("__getitem__", "__setitem__", "index_put", "index_put_"):
            return False
        indices = args[1] if isinstance(args[1], tuple | list) else (args[1],)
        return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in indices)

    @staticmethod
    def hides_a_size(name, args, kwargs):
        if name == "where":
            return len(args) == 1
        times = args[1] if len(args) > 1 else args[0]
        return isinstance(times, Pretended) and kwargs.get("output_size") is None

    @classmethod
    def pretend(cls, found):
        if isinstance(found, tuple):
            return tuple(map(cls.pretend, found))
        return found.as_subclass(Pretended) if isinstance(found, Tensor) else found


class Draw:
    """Random decisions, another share for each image."""

    needs_attention, macs_per_decision = True, 0

    def __call__(self, view):
        generator = torch.Generator().manual_seed(view.stage)
        share = torch.linspace(0.2, 0.9, len(view.alive))[:, None]
        keep = torch.rand(view.alive.shape, generator=generator) < share
        return keep.to(view.alive.device, non_blocking=True)


def count(run, images):
    with torch.no_grad(), PretendGPU() as gpu:
        run(gpu.pretend(images))
    return gpu.waits


def test_the_pretence_counts():
    def run(x):
        x.sum().item()
        (x > 0).nonzero()
        x[x > 0] = 1
        torch.zeros(2).to(x.device)
        torch.zeros(2).to(x.device, non_blocking=True)
        torch.tensor([1.0], device=x.device)
        torch.arange(3, device=x.device).repeat_interleave(torch.arange(3, device=x.device))
        if (x > 0).all():
            pass
        torch.zeros(2).tolist()
        (x + torch.ones_like(x)).cpu().tolist()

    assert count(run, torch.randn(3)) == [
        "item", "nonzero", "__setitem__", "to the GPU", "tensor the GPU", "repeat_interleave",
        "__bool__", "cpu",
    ]  # fmt: skip


POOLING = {"class_token": False, "global_pool": "avg"}
# arguments of the backbone and of its stages, the policy, waits at each stage and at the end
PASSES = {
    "ragged": ({}, {}, "draw", 1, 0),
    "even": ({}, {}, "top-k", 1, 0),
    "nothing pruned": ({}, {}, "all", 1, 0),
    "inside of blocks": ({}, {"prune_at": "mlp"}, "draw", 1, 0),
    "threshold with dither": ({}, {}, "threshold", 1, 0),
    "merging": ({}, {"on_prune": "merge"}, "draw", 2, 0),
    "masked": ({}, {"execution": "masked"}, "draw", 0, 0),
    "pooling": (POOLING, {}, "draw", 1, 1),
    "rotary": ({"name": "eva02_tiny_patch14_224"}, {}, "draw", 1, 1),
    # it refuses logits that are not finite
    "learned": ({}, {}, "learned", 2, 0),
    "learned, redundancy": ({}, {}, "redundancy", 2, 0),
}
each_pass = pytest.mark.parametrize("name", PASSES)
each_batch = pytest.mark.parametrize("batch", [1, 6])


def build(make_vit, name):
    """The pruned model, and the waits of a pass."""
    vit, staged, policy, at_stage, at_end = PASSES[name]
    backbone = StagedViT(make_vit(**vit), STAGES, **staged)
    learned = ["token", "cls_attention"] + ["redundancy"] * (policy == "redundancy")
    made = {
        "draw": Draw,
        "top-k": lambda: TopK((9, 5, 2)),
        "all": KeepAll,
        "threshold": lambda: AttentionThreshold((0.9, 0.9, 0.9), dither=1.0),
    }.get(policy, lambda: learned_policy(backbone, learned, [8], attention_prior=True))()
    return PrunedViT(backbone, made).eval(), len(STAGES) * at_stage + at_end


@each_pass
@each_batch
def test_waits_of_a_pass(make_vit, make_images, name, batch):
    model, expected = build(make_vit, name)
    waits = count(model, make_images(batch).images)
    assert len(waits) == expected, waits


@each_batch
def test_waits_of_an_episode(make_vit, make_images, batch):
    """One at the beginning, to check images and labels, and one at each stage."""
    game = TokenGame(StagedViT(make_vit(), STAGES))
    images = make_images(batch)
    policy = Draw()

    def play(pixels):
        labels = images.labels.as_subclass(Pretended)
        stage = game.reset(pixels, labels)
        while stage.view is not None:
            stage = game.step(policy(stage.view))

    waits = count(play, images.images)
    assert len(waits) == 1 + len(STAGES), waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@each_pass
@each_batch
@torch.no_grad()
def test_waits_of_a_pass_on_cuda(make_vit, make_images, name, batch):
    model, expected = build(make_vit, name)
    model, images = model.to("cuda"), make_images(batch).images.to("cuda")
    model(images)  # kernels are loaded
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) == expected, [(each.filename, each.lineno) for each in caught]
