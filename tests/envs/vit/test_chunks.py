"""Very many images go through the blocks in parts: the same numbers, and only where nobody could
tell.
"""

import weakref

import numpy as np
import pytest
import torch

from prunevit.envs.vit import execution
from prunevit.envs.vit.layout import Layout
from prunevit.envs.vit.staged_vit import StagedViT

IMAGES = 7
CPU = torch.device("cpu")


@pytest.fixture
def rows_seen(monkeypatch):
    """How many rows each call of a block had; about two images are a part."""
    seen = []

    def count(name):
        original = getattr(execution, name)

        def counted(call, x, *others):
            seen.append(len(x))
            return original(call, x, *others)

        monkeypatch.setattr(execution, name, counted)

    count("packed_block")
    count("eager_block")  # where gradients may be needed
    count("timm_block")  # where there are hooks
    return seen


@pytest.fixture
def chunks_of(monkeypatch):
    def cut(staged, images):
        size = images * staged.num_slots * staged.width * staged.dtype.itemsize
        monkeypatch.setattr(execution, "CHUNK_BYTES", size)

    return cut


@pytest.fixture
def images():
    return torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def played(staged, images, keep, with_attention=True):
    """Logits, and all that was seen on the way."""
    tokens = staged.begin(images, with_attention)
    seen = [tokens]
    for stage in range(staged.num_stages):
        tokens = staged.advance(tokens, keep[stage, : len(images)], stage, with_attention)
        seen.append(tokens)
    return staged.finish(tokens), seen


@torch.no_grad()
@pytest.mark.parametrize("with_attention", [True, False])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(
    ("name", "on_prune"),
    [
        ("vit_tiny_patch16_224", "drop"),
        ("vit_tiny_patch16_224", "merge"),
        ("deit3_small_patch16_224", "drop"),
        ("vit_base_patch16_siglip_224", "drop"),
        ("eva02_tiny_patch14_224", "drop"),
        ("vit_small_patch16_dinov3", "drop"),
        ("vit_small_patch16_rope_mixed_224", "drop"),
    ],
)
def test_chunks_give_what_all_images_at_once_give(
    name, on_prune, alike, with_attention, make_vit, images, keeps, rows_seen, chunks_of
):
    staged = StagedViT(make_vit(name), (0, 1, 3), on_prune=on_prune)
    keep = keeps(IMAGES, 3, staged.num_patches)
    if alike:
        keep = keep[:, -1:].expand(-1, IMAGES, -1)
    logits, seen = played(staged, images, keep, with_attention)
    calls = len(rows_seen)
    chunks_of(staged, 2)
    in_chunks, seen_in_chunks = played(staged, images, keep, with_attention)
    assert len(rows_seen) > 2 * calls
    torch.testing.assert_close(in_chunks, logits)
    for tokens, others in zip(seen, seen_in_chunks, strict=True):
        torch.testing.assert_close(others.x, tokens.x)
        torch.testing.assert_close(others.attention, tokens.attention)
        assert others.row.equal(tokens.row)
        assert staged.spent_macs(others).equal(staged.spent_macs(tokens))


@torch.no_grad()
def test_chunks_are_about_as_small_as_asked_for(
    vit, images, keeps, rows_seen, chunks_of, monkeypatch
):
    staged = StagedViT(vit, (1, 2))
    chunks_of(staged, 2)
    embedded = []
    stem = type(vit.patch_embed)
    original = stem.forward

    def counted(self, images):
        embedded.append(len(images))
        return original(self, images)

    monkeypatch.setattr(stem, "forward", counted)
    played(staged, images, keeps(IMAGES, 2, staged.num_patches))
    assert embedded == [2, 2, 2, 1]
    assert max(rows_seen) <= 3 * staged.num_slots  # two, and what stands across the edge


def test_nobody_can_tell(make_vit, images, keeps, rows_seen, chunks_of):
    """Gradients, hooks and layers in training see all images at once."""
    vit = make_vit()
    staged = StagedViT(vit, (1, 2))
    chunks_of(staged, 2)
    keep = keeps(IMAGES, 2, staged.num_patches)
    whole = IMAGES * staged.num_slots

    def first_call(images):
        rows_seen.clear()
        logits, _ = played(staged, images, keep)
        return logits, rows_seen[0]

    given = images.clone().requires_grad_()
    logits, rows = first_call(given)
    assert rows == whole
    logits.sum().backward()
    assert given.grad is not None
    with torch.no_grad():
        assert first_call(images)[1] < whole
        hook = vit.blocks[0].mlp.register_forward_hook(lambda *_: None)
        assert first_call(images)[1] == whole
        hook.remove()
        assert first_call(images)[1] < whole
        vit.blocks[0].mlp.train()
        assert first_call(images)[1] == whole
        vit.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert first_call(images)[1] == whole


@torch.no_grad()
def test_masked_and_compiled_blocks_see_all_images(vit, images, keeps, rows_seen, chunks_of):
    keep = keeps(IMAGES, 2, 16)
    masked = StagedViT(vit, (1, 2), "masked")
    chunks_of(masked, 2)
    expected, _ = played(StagedViT(vit, (1, 2)), images, keep)
    calls = []
    original = execution.masked_block

    def counted(call, x, *others):
        calls.append(len(x))
        return original(call, x, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "masked_block", counted)
        logits, _ = played(masked, images, keep)
    assert set(calls) == {IMAGES * masked.num_slots}
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "compile_block", lambda: execution.packed_block)
        rows_seen.clear()
        played(StagedViT(vit, (1, 2), torch_compile=True), images, keep)
    assert rows_seen[0] == IMAGES * masked.num_slots


@torch.no_grad()
def test_images_that_share_rows_go_on_in_chunks(vit, images, keeps, rows_seen, chunks_of):
    staged = StagedViT(vit, (1, 2))
    keep = keeps(2 * IMAGES, 2, staged.num_patches)

    def rollouts():
        tokens = staged.begin(images).repeat(2)
        for stage in range(2):
            tokens = staged.advance(tokens, keep[stage], stage)
        return staged.finish(tokens)

    logits = rollouts()
    calls = len(rows_seen)
    chunks_of(staged, 2)
    torch.testing.assert_close(rollouts(), logits)
    assert len(rows_seen) > 2 * calls


@torch.no_grad()
@pytest.mark.parametrize("kind", ["packed", "masked"])
def test_the_rows_that_blocks_begin_with_are_gone_after_the_first(
    kind, vit, images, keeps, monkeypatch
):
    staged = StagedViT(vit, (2,), kind)
    begun, alive = [], []
    name = f"{kind}_block"
    original = getattr(execution, name)

    def watched(call, x, *others):
        if len(begun) > len(alive):
            alive.append(begun[-1]() is not None)
        else:
            begun.append(weakref.ref(x))
        return original(call, x, *others)

    monkeypatch.setattr(execution, name, watched)
    played(staged, images, keeps(IMAGES, 1, staged.num_patches))
    # masked pruning leaves the rows that the caller got from ``begin`` as they are
    assert alive == [False, kind == "masked"]


@pytest.mark.parametrize("count", [1, 2, 3, 50])
@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [1, 1, 2, 5, 9], [1, 50], [50, 1], [7]])
def test_a_layout_is_cut_between_images(lengths, count):
    layout = Layout.of(np.array(lengths), 8, CPU)
    parts = layout.split(count)
    assert 1 <= len(parts) <= min(count, len(lengths))
    assert np.concatenate([part.lengths for _, part in parts]).tolist() == lengths
    edge = 0
    for place, part in parts:
        assert place.start == edge
        edge = place.stop
        assert edge - place.start == part.lengths.sum()
    assert edge == sum(lengths)
