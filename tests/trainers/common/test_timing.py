"""Variants take turns, the warm-up doesn't count, and ratios are those of one round."""

import multiprocessing
import os

import pytest
import torch

from prunevit.agents.policies.heuristics import TopK
from prunevit.agents.pruned_vit import PrunedViT
from prunevit.envs import devices
from prunevit.trainers.common import timing
from prunevit.trainers.common.timing import (
    Timing,
    images_per_second,
    interleaved,
    speedup,
    time_models,
)

CPU = torch.device("cpu")


def test_variants_take_turns_and_the_warm_up_is_not_counted():
    log = []
    variants = {name: [lambda name=name: log.append(name)] * 2 for name in "abc"}
    timings = interleaved(variants, 2, 1, CPU, each_call=True)
    assert "".join(log) == "aabbcc" + "bbccaa" + "ccaabb"
    assert {name: len(timing.passes) for name, timing in timings.items()} == dict.fromkeys("abc", 2)
    assert all(len(timing.calls) == 4 for timing in timings.values())
    assert timings["a"].passes[0] >= sum(timings["a"].calls[:2])
    assert not interleaved(variants, 1, 0, CPU)["a"].calls


def test_speedup_compares_within_rounds():
    # the machine became four times slower for the last two rounds
    dense = Timing([1, 1, 1, 4, 4])
    fast = Timing([0.5, 0.5, 0.5, 2, 2])
    assert speedup(dense, fast) == 2
    assert fast.seconds == 0.5
    assert fast.spread == 3
    assert Timing([], [1.0, 2.0, 3.0]).latency(50) == 2


def test_models_are_timed_by_the_clock_over_whole_batches(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock["now"])
    sizes = []

    def model(seconds):
        taken = iter(seconds)

        def run(batch):
            sizes.append(len(batch))
            clock["now"] += next(taken)

        return run

    # two batches a round; the first round is a warm-up, the last one of "b" is disturbed
    models = {
        "a": model([50, 50, 1, 1, 2, 2, 4, 4]),
        "b": model([50, 50, 5, 5, 5, 5, 900, 900]),
    }
    timings = time_models(models, torch.zeros(6, 1), batch_size=3, rounds=3)
    assert timings["a"].passes == [2, 4, 8]
    assert timings["b"].passes == [10, 10, 1800]
    assert timings["b"].seconds == 10
    assert sizes == [3] * 16


@pytest.mark.stress
def test_a_process_of_its_own_times_the_same_models(staged, some_images):
    pixels, _ = some_images.load(range(8))
    models = {"dense": staged.model, "pruned": PrunedViT(staged, TopK([2, 2, 2]))}
    found = images_per_second(models, pixels, batch_size=4, rounds=1)
    assert set(found) == set(models)
    assert min(found.values()) > 0


def test_copies_are_timed(staged, some_images):
    pixels, _ = some_images.load(range(8))
    seen = []
    hook = staged.model.register_forward_hook(lambda m, inputs, _: seen.append((m, *inputs)))
    try:
        found = timing._time_copies({"dense": staged.model}, pixels, 4, 2)["dense"]
    finally:
        hook.remove()  # other tests share the model
    assert len(found.passes) == 2
    assert len(seen) == 6
    assert all(model is not staged.model for model, _ in seen)
    shared = pixels.untyped_storage().data_ptr()
    assert all(images.untyped_storage().data_ptr() != shared for _, images in seen)


class Dies(torch.nn.Module):
    """Ends its process."""

    def forward(self, images):
        os._exit(1)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.stress)])
def test_a_process_that_dies_is_an_error(monkeypatch, start):
    context = multiprocessing.get_context(start)
    monkeypatch.setattr(timing.multiprocessing, "get_context", lambda _: context)
    with pytest.raises(RuntimeError, match=r"timed the models died; .* if __name__ == '__main__'"):
        images_per_second({"dies": Dies()}, torch.zeros(2, 1), batch_size=1)
