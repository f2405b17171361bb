"""The benchmark's variants do the same work, its plan is fair, and its records are complete."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunevit.agents.policies.heuristics import TopK
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.benchmarks.baselines.padded import PaddedViT
from prunevit.benchmarks.speed import throughput
from prunevit.benchmarks.speed.throughput import (
    ThroughputConfig,
    measure,
)
from prunevit.benchmarks.speed.variants import (
    VARIANTS,
    DrawnPolicy,
    Workload,
    calls,
    draw_keep,
    load,
    untrained_policy,
)
from prunevit.envs.data.datasets import open_images
from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.digits_vit import DIGITS_VIT
from prunevit.envs.vit.staged_vit import StagedViT

STAGES, BATCH, IMAGES = (1, 2, 3), 4, 8
TINY = ["--model", "test_vit", "--prune-before", "1", "2", "--image-sizes", "64"]
KEYS = {
    "variant", "model", "batch_size", "image_size", "images_per_second", "gmacs", "speedup",
    "efficiency", "threads", "device",
}  # fmt: skip
BACKBONES = {
    "class token": {},
    "registers": {"reg_tokens": 2, "init_values": 0.1},
    "no prefix": {"class_token": False, "global_pool": "avg"},
}
PATTERNED = ("packed", "masked", "padded")


def make_workload(model, keep=None, stages=STAGES):
    packed = StagedViT(model, stages)
    torch.manual_seed(0)
    images = torch.randn(IMAGES, *packed.image_shape)
    if keep is None:
        keep = draw_keep((IMAGES, len(stages), packed.num_patches), 0.7)
    return Workload(packed, untrained_policy(packed), images, keep)


def gmacs(variant, workload, batch_size=BATCH):
    return VARIANTS[variant].macs(workload, batch_size) / 1e9


@pytest.fixture
def workload(make_vit):
    return make_workload(make_vit(img_size=64))


@torch.no_grad()
def logits(variant, workload, batch_size=BATCH):
    return torch.cat([call() for call in calls(variant, workload, batch_size)])


# --- the same work ---


@pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_variants_with_a_pattern_agree(make_vit, kwargs, batch_size):
    workload = make_workload(make_vit(img_size=64, **kwargs))
    packed, masked, padded = (logits(v, workload, batch_size) for v in PATTERNED)
    torch.testing.assert_close(masked, packed, rtol=0, atol=1e-4)
    torch.testing.assert_close(padded, packed, rtol=0, atol=1e-4)
    dense = logits("dense", workload, batch_size)
    assert (dense - packed).abs().amax(1).min() > 1e-3  # something was pruned in every image


def test_images_that_lose_everything_or_nothing_agree(make_vit):
    for kwargs in BACKBONES.values():
        keep = np.ones((IMAGES, 3, 64), dtype=np.bool_)
        keep[1, 1:] = False
        keep[2] = False
        workload = make_workload(make_vit(img_size=64, **kwargs), keep)
        packed = logits("packed", workload)
        torch.testing.assert_close(logits("padded", workload), packed, rtol=0, atol=1e-4)
        dense = logits("dense", workload)
        torch.testing.assert_close(packed[3:], dense[3:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("score", ["attention", "norm"])
@torch.no_grad()
def test_padded_decides_as_packed_does(make_vit, kwargs, score):
    """A policy that reads what the blocks left sees the same thing in both."""
    workload = make_workload(make_vit(img_size=64, **kwargs))
    policy = TopK((40, 20, 7), score)
    padded = PaddedViT(workload.packed, policy)(workload.images)
    packed = PrunedViT(workload.packed, policy).eval()(workload.images)
    torch.testing.assert_close(padded, packed, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)
@torch.no_grad()
def test_padded_pays_attention_to_living_tokens_alone(make_vit, kwargs):
    """The attention that is observed after images have got different lengths."""
    workload = make_workload(make_vit(img_size=64, **kwargs))
    seen = {}

    class Noting(DrawnPolicy):
        def __call__(self, view):
            seen.setdefault(view.stage, []).append(view.scatter(view.cls_attention))
            return super().__call__(view)

    keep = torch.from_numpy(workload.keep)
    for model in (PaddedViT, PrunedViT):
        model(workload.packed, Noting(workload.policy, keep)).eval()(workload.images)
    assert set(seen) == {0, 1, 2}
    for padded, packed in seen.values():
        torch.testing.assert_close(padded, packed, rtol=1e-4, atol=1e-5)


def test_uniform_runs_timms_blocks_without_a_mask(workload):
    masks, lengths = [], []

    def note(_, inputs, options):
        masks.append(options.get("attn_mask"))
        lengths.append(inputs[0].shape[1])

    blocks = workload.packed.model.blocks
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    logits("uniform", workload, IMAGES)
    assert masks == [None] * len(masks)
    # the blocks before the stages are run with their attention visible, not through the hook
    assert lengths == [workload.tokens[-1] + 1]
    logits("padded", workload, IMAGES)
    assert masks[-1] is not None
    for hook in hooks:
        hook.remove()


# --- a fair plan ---


def test_peers_cost_as_much_as_ours_and_not_more(make_vit):
    workload = make_workload(make_vit(img_size=128, depth=6), stages=(1, 3, 5))
    ours = gmacs("packed", workload)
    for peer in ("tome", "uniform"):
        assert 0.98 * ours < gmacs(peer, workload) <= ours, peer


@pytest.mark.parametrize("kwargs", BACKBONES.values(), ids=BACKBONES)
def test_our_cost_is_what_a_pass_says_it_was(make_vit, kwargs):
    keep = draw_keep((IMAGES, 3, 64), 0.7)
    keep[0, 1:] = False
    workload = make_workload(make_vit(img_size=64, **kwargs), keep)
    policy = DrawnPolicy(workload.policy, torch.from_numpy(keep))
    trace = PrunedViT(workload.packed, policy).eval().trace(workload.images)
    assert trace.macs.double().mean().item() == workload.macs()
    assert torch.equal(trace.alive[1:], torch.from_numpy(keep[1:]))
    assert workload.policy.macs_per_decision > 0


@pytest.mark.parametrize(
    ("variant", "tolerance"),
    [
        ("dense", 1e-6),
        ("packed", 0.02),  # attention over images of like length may be padded a little
        ("masked", 0.15),  # computes queries and keys once more for the attention it observes
        ("padded", 1e-6),
        ("tome", 1e-6),
        ("uniform", 1e-6),
    ],
)
def test_costs_are_what_pytorch_counts(workload, variant, tolerance, monkeypatch):
    """The policy apart: it multiplies what patches share only once, and is charged in full."""
    # the counter's hooks on all modules would keep pruned tokens from them
    monkeypatch.setattr("prunevit.envs.vit.execution.has_global_hooks", lambda: False)
    workload.policy.forward = lambda view: view.alive
    passes = calls(variant, workload, BATCH)
    with FlopCounterMode(display=False) as counter:
        for call in passes:
            call()
    counted = counter.get_total_flops() / 2 / IMAGES
    charged = gmacs(variant, workload) * 1e9
    if variant in PATTERNED:
        decisions = 64 + workload.keep[:, :-1].sum((1, 2)).mean()
        charged -= decisions * workload.policy.macs_per_decision
    assert charged == pytest.approx(counted, rel=tolerance)


def test_masked_and_padded_pay_for_what_they_carry(workload):
    cost = {
        variant: gmacs(variant, workload) for variant in ("dense", "packed", "masked", "padded")
    }
    assert cost["packed"] < cost["padded"] < cost["masked"]
    assert cost["masked"] > cost["dense"]
    assert gmacs("padded", workload, 1) == pytest.approx(cost["packed"])


def test_a_run_brings_its_backbone_policy_and_images(tmp_path, monkeypatch):
    backbone = StagedViT(create_backbone(DIGITS_VIT), (1, 3))
    policy = untrained_policy(backbone)
    # keeps what class attention is above even on
    torch.nn.init.zeros_(policy.actor.net[-1].weight)
    asked = []

    def from_run(folder):
        asked.append(folder)
        return PrunedViT(backbone, policy).eval()

    monkeypatch.setattr(PrunedViT, "from_run", from_run)
    (tmp_path / "config.json").write_text(json.dumps({"dataset": "digits"}))
    config = tiny_config(run=tmp_path, image_sizes=(), variants=("padded",), batch_sizes=(3,))
    workload = load(config)
    assert asked == [tmp_path]
    assert workload.policy is policy
    test = open_images("digits", "test", {"input_size": (1, 64, 64), "mean": (0,), "std": (1,)})
    expected = test.load([0, 1, 2])[0]
    correlation = np.corrcoef(workload.images.flatten().numpy(), expected.flatten().numpy())
    assert correlation[0, 1] > 0.999
    alive = PrunedViT(backbone, policy).eval().trace(workload.images).alive
    assert np.array_equal(workload.keep, alive.numpy())
    assert 0 < workload.keep.mean() < 1
    (records,) = measure(config)
    assert {record["model"] for record in records} == {str(tmp_path)}


# --- drawn patterns ---


def test_drawn_ratios_are_each_images_own_and_right_on_average():
    keep = draw_keep((400, 3, 196), 0.7)
    counts = np.concatenate([np.full((400, 1), 196), keep.sum(2)], axis=1)
    ratios = counts[:, 1:] / counts[:, :-1]
    assert np.abs(ratios.mean(0) - 0.7).max() < 0.03
    assert ratios.min() >= 0.4 - 0.02
    assert ratios.std(0).min() > 0.1
    assert len(set(counts[:, 1])) > 50
    # nobody comes back
    assert not (keep[:, 1:] & ~keep[:, :-1]).any()


# --- measuring ---


@pytest.mark.stress
def test_peak_memory_sees_what_was_held():
    # in a process of its own: in this one other tests have held more before
    code = (
        "import torch; from prunevit.benchmarks.machine import peak_memory\n"
        "cpu = torch.device('cpu'); before = peak_memory(cpu); held = torch.ones(64 * 2**20)\n"
        "del held; print(peak_memory(cpu) - before)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(printed) > 200 * 2**20


# --- records ---


def tiny_config(**changes):
    settings = {
        "model": "test_vit",
        "prune_before": (1, 2),
        "image_sizes": (64,),
        "batch_sizes": (1, 2),
        "images": 3,
        "rounds": 2,
        "memory": False,
    }
    return ThroughputConfig(**settings | changes)


def test_records_have_all_keys():
    measured = list(measure(tiny_config()))
    assert [(group[0]["batch_size"], len(group)) for group in measured] == [(1, 7), (2, 7)]
    for record in (row for group in measured for row in group):
        assert record.keys() >= KEYS
        assert (record["image_size"], record["device"]) == (64, "cpu")
        assert record["threads"] == torch.get_num_threads()
        assert ("p50" in record) == ("p95" in record) == (record["batch_size"] == 1)
        dense = measured[0][0]
        promised = dense["gmacs"] / record["gmacs"]
        assert record["efficiency"] * promised == pytest.approx(record["speedup"])
        assert (record["speedup_same_kernels"] == 1) == (record["variant"] == "unpruned")
    assert (dense["variant"], dense["speedup"], dense["efficiency"]) == ("dense", 1, 1)


def test_chosen_variants_and_image_sizes():
    config = tiny_config(variants=("packed",), batch_sizes=(2,), image_sizes=(32, 48))
    measured = list(measure(config))
    assert [[row["variant"] for row in group] for group in measured] == [["dense", "packed"]] * 2
    assert all("over unpruned" not in throughput.table(group) for group in measured)
    assert [group[0]["image_size"] for group in measured] == [32, 48]
    assert measured[0][0]["gmacs"] < measured[1][0]["gmacs"]


def test_the_command_writes_records(tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "records.json"
    arguments = [
        *TINY, "--no-memory", "--batch-sizes", "1", "2", "--images", "2", "--rounds", "1",
        "--out", str(out),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["throughput", *arguments])
    throughput.main()
    records = json.loads(out.read_text())
    assert len(records) == 14
    assert all(record.keys() >= KEYS for record in records)
    shown = capsys.readouterr().out
    assert "| over dense | over unpruned | efficiency |" in shown
    assert "test_vit, 64 px, batch 2 (cpu, float32" in shown
    assert shown.count("| packed |") == 2


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes"], "batch_sizes is empty"),
        (["--batch-sizes", "1", "0"], "batch_sizes=(1, 0)"),
        (["--image-sizes", "-224"], "image_sizes=(-224,)"),
        (["--rounds", "0"], "rounds=0 must be at least 1"),
        (["--threads", "0"], "threads=0 must be at least 1"),
        (["--run", "runs/x", "--image-sizes", "32"], "a run brings its own"),
        (["--model", "no_such_vit"], "unknown backbone 'no_such_vit'"),
        (["--model", "resnet18"], "ResNet can't be run on a part of its tokens"),
        (["--keep", "1.5"], "keep=1.5 must be"),
        (["--model", "test_vit"], "prune_before=(3, 6, 9) is out of range"),
        (["--run", "/no/such/run"], "/no/such/run"),
    ],
)
def test_bad_input_is_refused(monkeypatch, refusal, arguments, message):
    monkeypatch.setattr(sys, "argv", ["throughput", "--no-memory", *arguments])
    assert message in refusal(throughput.main)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="cuda"):
        list(measure(tiny_config(device="cuda")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda():
    config = tiny_config(device="cuda", dtype="bfloat16", memory=True, batch_sizes=(2,))
    (records,) = measure(config)
    assert all(record["peak_memory"] > 0 for record in records)


@pytest.mark.stress
def test_the_command_runs_and_measures_memory():
    ended = subprocess.run(
        [
            sys.executable, "-m", "prunevit.benchmarks.speed.throughput", *TINY, "--threads", "1",
            "--variants", "packed", "--images", "2", "--batch-sizes", "1", "--rounds", "1",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "1 threads, load" in ended.stdout
    peaks = [float(line.split("|")[-2]) for line in ended.stdout.splitlines() if "| 1." in line]
    assert peaks
    assert all(50 < mib < 8_192 for mib in peaks)
