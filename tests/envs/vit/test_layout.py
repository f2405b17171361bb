"""Packed rows against loops over images. Every image has a row at least: the prefix, or the patch
that a model without one keeps; a batch may have no image.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from prunevit.envs.vit import attention
from prunevit.envs.vit import layout as layout_module
from prunevit.envs.vit.attention import attention_received, varlen_attention
from prunevit.envs.vit.layout import BUCKET_WIDTHS, Layout

HEADS, SIZE = 3, 4
CPU = torch.device("cpu")
LENGTHS = {
    "one image": [5],
    "one row": [1],
    "alike": [4, 4, 4],
    "ascending": [1, 1, 2, 3, 5, 5, 9, 17, 40],
    "descending": [40, 17, 9, 5, 5, 3, 2, 1, 1],
    "mixed": [7, 1, 33, 2, 2, 8, 1, 16, 15, 64],
    "many short": [2, 2, 3, 3, 3, 4, 4, 5, 6, 6, 6, 6],
    "many alike": [5] * 9,
    "none": [],
}
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def layout_of(lengths):
    return Layout.of(np.array(lengths, np.int64), HEADS * SIZE, CPU)


def draw(lengths, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), *shape, generator=generator)


def by_image(rows, lengths):
    return rows.split(list(lengths))


# --- layout ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_averages_many_rows(dtype):
    """Their sum is more than float16 holds."""
    rows = torch.full((1_400, 3), 200.0, dtype=dtype)
    found = layout_of([500, 900]).mean(rows)
    assert found.dtype == dtype
    assert torch.equal(found, rows[:2])


class SumsAreWide(TorchDispatchMode):
    """Additions into rows take their dtype on a GPU, while a CPU may use a wider one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "index_add" in str(func):
            assert args[0].dtype not in (torch.float16, torch.bfloat16)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[576, 576], [576, 577]], ids=str)
def test_half_precision_averages_with_weights(dtype, lengths):
    """A sum of ones in bfloat16 stops at 256."""
    rows = torch.full((sum(lengths), 3), 2.0, dtype=dtype)
    with SumsAreWide():
        found = layout_of(lengths).mean(rows, torch.ones(sum(lengths)))
    assert torch.equal(found, rows[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[576, 576], [576, 577]], ids=str)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_half_precision_shares_attention_among_many_rows(dtype, lengths, count):
    """Queries of equal parts, whose mean is one of them; equal scores, which sum to 1."""
    q = torch.full((sum(lengths), 2, 4), 2.0, dtype=dtype)
    layout = layout_of(lengths)
    with SumsAreWide():
        received = attention_received(q, torch.zeros_like(q), layout, count).float()
    expected = torch.from_numpy(np.repeat(1 / np.array(lengths), lengths)).float()
    torch.testing.assert_close(received, expected, rtol=0.005, atol=0)
    k = torch.where(torch.arange(sum(lengths)) % 2 > 0, 0.25, 0)[:, None, None].expand_as(q)
    received, exact = (
        attention_received(q.to(kind), k.to(kind), layout, count).double()
        for kind in (dtype, torch.float64)
    )
    torch.testing.assert_close(received, exact, rtol=0.01, atol=0)


@each_lengths
def test_a_layout_tells_whose_rows_they_are(lengths):
    layout = layout_of(lengths)
    assert layout.starts.tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
    assert layout.image.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]


@each_lengths
@pytest.mark.parametrize("width", BUCKET_WIDTHS)
def test_cells_hold_every_row_once(monkeypatch, lengths, width):
    monkeypatch.setattr(layout_module, "BUCKET_WIDTHS", (width,))
    layout = layout_of(lengths)
    image, cell = 0, 0
    for images, longest, padded in layout.buckets.view(-1, 3).tolist():
        held = lengths[image : image + images]
        assert longest == max(held)
        assert longest - min(held) < width
        assert padded == (min(held) < max(held))
        for length in held:
            start = sum(lengths[:image])
            if layout.padding is not None:
                rows = layout.padding.row[cell : cell + longest].tolist()
                assert rows[:length] == list(range(start, start + length))
                assert set(rows[length:]) <= set(rows[:length])
                bias = layout.padding.bias[cell : cell + longest]
                assert (bias == 0).tolist() == [place < length for place in range(longest)]
                assert torch.isneginf(bias[length:]).all()
                assert layout.padding.cell[start] == cell
            image, cell = image + 1, cell + longest
    assert image == len(lengths)
    padded = layout.padding is not None
    assert padded == (cell > sum(lengths))
    if padded:
        assert len(layout.padding.row) == cell
        assert torch.equal(layout.padding.row[layout.padding.cell], torch.arange(sum(lengths)))


def test_buckets_are_those_that_should_take_the_least_time():
    """Few long images are worth a call each, many short ones are padded to share it."""
    assert layout_of([400, 500, 600]).padding is None
    assert layout_of([2, 3, 4] * 100).buckets.tolist() == [300, 4, 1]
    for lengths in LENGTHS.values():
        layout = layout_of(lengths)
        if not lengths:
            continue
        edges = [layout_module._cut(layout.lengths, width).tolist() for width in BUCKET_WIDTHS]
        costs = [
            layout_module._estimated_seconds(layout.lengths, np.array(e), HEADS * SIZE)
            for e in edges
        ]
        chosen = np.cumsum([0, *layout.buckets[::3].tolist()]).tolist()
        assert chosen == edges[int(np.argmin(costs))]


def test_buckets_are_ranges_of_length():
    lengths = np.array([1, 3, 4, 5, 8, 9, 16, 17])
    assert layout_module._cut(lengths, 1).tolist() == list(range(9))
    assert layout_module._cut(lengths, 4).tolist() == [0, 3, 5, 6, 7, 8]
    assert layout_module._cut(lengths, 16).tolist() == [0, 7, 8]
    assert layout_module._cut(lengths, 1 << 30).tolist() == [0, 8]


@pytest.mark.parametrize(
    ("edges", "calls", "squares", "gathered"),
    [
        ([0, 1, 3, 4], 3, 3**2 + 2 * 5**2 + 7**2, 0),
        # gathering and scattering queries, keys, values and results takes calls of its own
        ([0, 2, 4], 2 + 4, 2 * 5**2 + 2 * 7**2, 4 * 6 * (2 * 5 + 2 * 7)),
    ],
)
def test_what_buckets_are_taken_to_cost(monkeypatch, edges, calls, squares, gathered):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seconds = layout_module._estimated_seconds(np.array([3, 5, 5, 7]), np.array(edges), 6)
    shared = layout_module.MAC_SECONDS * 2 * 6 * squares + layout_module.GATHER_SECONDS * gathered
    assert seconds == pytest.approx(layout_module.CALL_SECONDS * calls + shared / 3, rel=1e-9)


@each_lengths
def test_a_layout_knows_images_of_one_length(lengths):
    layout = layout_of(lengths)
    assert layout.uniform_length == (lengths[0] if len(set(lengths)) == 1 else None)
    assert layout.max_seqlen == max(lengths, default=0)
    assert layout.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


# --- attention ---


@each_lengths
@pytest.mark.parametrize("width", [*BUCKET_WIDTHS, None])
def test_attention_is_that_of_each_image_alone(monkeypatch, lengths, width):
    if width is not None:
        monkeypatch.setattr(layout_module, "BUCKET_WIDTHS", (width,))
    q, k, v = (draw(lengths, HEADS, SIZE, seed=seed) for seed in range(3))
    mixed = varlen_attention(q, k, v, layout_of(lengths))
    assert mixed.shape == (sum(lengths), HEADS * SIZE)
    for ours, *image in zip(*(by_image(rows, lengths) for rows in (mixed, q, k, v)), strict=True):
        alone = F.scaled_dot_product_attention(*(rows.transpose(0, 1) for rows in image))
        torch.testing.assert_close(ours, alone.transpose(0, 1).flatten(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_attention_over_random_lengths(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 70, size=generator.integers(1, 40)).tolist()
    q, k, v = (draw(lengths, HEADS, SIZE, seed=seed) for seed in range(3))
    mixed = varlen_attention(q, k, v, layout_of(lengths))
    for ours, *image in zip(*(by_image(rows, lengths) for rows in (mixed, q, k, v)), strict=True):
        alone = F.scaled_dot_product_attention(*(rows.transpose(0, 1) for rows in image))
        torch.testing.assert_close(ours, alone.transpose(0, 1).flatten(1), rtol=0, atol=1e-5)


def test_gradients_stay_within_an_image():
    lengths = [3, 5, 4]
    q, k, v = (draw(lengths, HEADS, SIZE, seed=seed).requires_grad_() for seed in range(3))
    varlen_attention(q, k, v, layout_of(lengths))[3:8].square().sum().backward()
    for rows in (q, k, v):
        reached = rows.grad.flatten(1).abs().sum(1) > 0
        assert reached.tolist() == [False] * 3 + [True] * 5 + [False] * 4


@each_lengths
@pytest.mark.parametrize("count", [0, 1, 2])
def test_received_attention_is_what_a_query_pays(lengths, count):
    """The first rows of the matrix, or all of them."""
    lengths = [length + 1 for length in lengths]
    q = draw(lengths, HEADS, SIZE)
    # far from zero: a softmax that does not subtract the maximum would overflow
    k = draw(lengths, HEADS, SIZE) + 300
    received = attention_received(q, k, layout_of(lengths), count)
    assert received.shape == (sum(lengths),)
    for ours, queries, keys in zip(*(by_image(x, lengths) for x in (received, q, k)), strict=True):
        query = queries[: count or None].mean(0)
        scores = torch.einsum("hd,lhd->hl", query, keys) / SIZE**0.5
        torch.testing.assert_close(ours, scores.softmax(1).mean(0), rtol=1e-3, atol=1e-5)


# --- pooling ---


@each_lengths
@pytest.mark.parametrize("shape", [(6,), (HEADS, SIZE)])
def test_mean(lengths, shape):
    rows = draw(lengths, *shape)
    pooled = layout_of(lengths).mean(rows)
    assert pooled.shape == (len(lengths), *shape)
    for ours, image in zip(pooled, by_image(rows, lengths), strict=True):
        torch.testing.assert_close(ours, image.mean(0))


@each_lengths
def test_max(lengths):
    rows = draw(lengths, 6) - 10  # below the zeros that a maximum might start from
    pooled = layout_of(lengths).max(rows)
    assert pooled.shape == (len(lengths), 6)
    for ours, image in zip(pooled, by_image(rows, lengths), strict=True):
        assert torch.equal(ours, image.amax(0))


@each_lengths
def test_pad(lengths):
    rows = draw(lengths, 6)
    padded, valid = layout_of(lengths).pad(rows)
    longest = max(lengths, default=0)
    assert padded.shape == (len(lengths), longest, 6)
    assert valid.tolist() == [[place < length for place in range(longest)] for length in lengths]
    for ours, length, image in zip(padded, lengths, by_image(rows, lengths), strict=True):
        assert torch.equal(ours[:length], image)
        assert not ours[length:].any()


@each_lengths
@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_first(lengths, count):
    lengths = [length + count for length in lengths]
    rows = draw(lengths, 6)
    rest, layout = layout_of(lengths).without_first(rows, count)
    assert layout.lengths.tolist() == [length - count for length in lengths]
    for ours, image in zip(by_image(rest, layout.lengths), by_image(rows, lengths), strict=True):
        assert torch.equal(ours, image[count:])
    # the layout that comes back is one of its own
    torch.testing.assert_close(
        layout.mean(rest), layout_of(layout.lengths.tolist()).mean(rest), rtol=0, atol=0
    )


# --- devices ---


@pytest.mark.parametrize("lengths", [[3, 1, 4], [2, 2], [70, 5, 5, 6]])
def test_everything_is_made_on_the_device_of_the_rows(lengths):
    """ "meta" stands for a GPU: like one, it refuses to meet what was left on the CPU."""
    meta = torch.device("meta")
    layout = Layout.of(np.array(lengths, np.int64), HEADS * SIZE, meta)
    assert {layout.starts.device, layout.image.device, layout.cu_seqlens.device} == {meta}
    assert layout.buckets.device == CPU
    assert len(layout.buckets) == 3  # a call each would keep a GPU waiting
    rows = torch.empty(sum(lengths), 6, device=meta)
    rest, without = layout.without_first(rows, 1)
    padded, valid = layout.pad(rows)
    k = torch.empty(sum(lengths), HEADS, SIZE, device=meta)
    for made in (
        layout.mean(rows),
        layout.max(rows),
        padded,
        valid,
        rest,
        without.image,
        varlen_attention(k, k, k, layout),
        attention_received(k, k, layout, 1),
        attention_received(k, k, layout, 0),
    ):
        assert made.device == meta


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, (8, 0), True),
        ("cuda", torch.float16, (9, 0), True),
        ("cuda", torch.float16, (7, 5), False),
        ("cuda", torch.float32, (9, 0), False),
        ("cpu", torch.bfloat16, (9, 0), False),
    ],
)
def test_the_varlen_kernel_is_for_half_precision_from_ampere_on(
    monkeypatch, device, dtype, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = SimpleNamespace(device=torch.device(device), dtype=dtype)
    monkeypatch.setattr(attention, "HAS_VARLEN", True)
    assert attention.has_varlen_kernel(q) is expected
    monkeypatch.setattr(attention, "HAS_VARLEN", False)  # torch before 2.10
    assert not attention.has_varlen_kernel(q)
