"""Images that other processes read: the same images, and nothing of them left behind."""

import multiprocessing
import os
import signal
import sys

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from prunevit.envs.batched.token_prune import BatchedTokenPrune
from prunevit.envs.data.datasets import open_images
from prunevit.envs.data.image_set import ReadRequest
from prunevit.envs.data.image_sources import DatasetError
from prunevit.envs.data.prefetch import BATCHES_AHEAD, Prefetcher, prefetch
from prunevit.envs.game import TokenGame
from prunevit.envs.vit.staged_vit import StagedViT

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
AUGMENTATION = {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5}
CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def vit(make_vit):
    """For the two classes of the photographs."""
    return make_vit(num_classes=2)


@pytest.fixture(scope="module")
def photographs(make_photographs):
    return make_photographs(train=12, test=1, shape=(40, 36, 3))


@pytest.fixture(autouse=True)
def nobody_is_left():
    yield
    assert not multiprocessing.active_children()


class Written:
    """A ``Prefetchable`` whose reads are written down by whoever carries them out, a line each."""

    num_classes = 2
    class_names = ("a", "b")

    def __init__(self, file, harm=lambda index: None):
        self.file, self.harm = file, harm
        self.done = FORK.Semaphore(0)  # released with every batch that has been read
        file.touch()

    def __len__(self):
        return 1000

    def request(self, indices, seed=None):
        return ReadRequest(tuple(int(i) for i in indices), seed)

    def read(self, load):
        for index in load.indices:
            self.harm(index)
        with self.file.open("a") as file:
            file.write(f"{os.getpid()} {' '.join(map(str, load.indices))}\n")
        self.done.release()
        index = torch.tensor(load.indices)
        return index.float(), index % 2

    def load(self, indices):
        return self.read(self.request(indices))

    @property
    def reads(self):
        """Who read what."""
        lines = [list(map(int, line.split())) for line in self.file.read_text().splitlines()]
        return [(process, indices) for process, *indices in lines]


def make_env(vit, images, workers, shard=(0, 1)):
    game = TokenGame(StagedViT(vit, (1, 3)), rollouts_per_image=2)
    return BatchedTokenPrune(game, images, 8, alpha_range=(0.1, 1.0), shard=shard, workers=workers)


def begun(env, *args, **kwargs):
    """What decides on an episode, and all that is seen of it."""
    observed = env.reset(*args, **kwargs)
    return env.indices, env.labels, env.pixels, observed.living(), env.game._episode.alpha


@pytest.mark.parametrize("augment", [False, AUGMENTATION])
@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_episodes_are_those_of_a_game_that_reads_for_itself(vit, photographs, augment, shard):
    played = []
    for workers in (0, 2):
        images = open_images(photographs, "train", CONFIG, augment=augment)
        env = make_env(vit, images, workers, shard)
        before = torch.get_rng_state()
        env.prefetch([3, 1, 4, 1, 5])
        assert torch.equal(torch.get_rng_state(), before)
        # what nobody spoke of comes in between, and goes on from where the last seed led
        resets: list[dict] = [
            {"seed": 3}, {"seed": 1}, {}, {"indices": [5, 2, 7, 1]}, {"seed": 9}, {"seed": 4},
            {"seed": 1}, {}, {"seed": 5}, {"seed": 3},
        ]  # fmt: skip
        played.append([part for reset in resets for part in begun(env, **reset)])
        assert (env._prefetcher is not None) == bool(workers)
        if env._prefetcher is not None:
            assert env._prefetcher.next_request is None  # all that was announced was taken
        env.close()
    torch.testing.assert_close(*played, rtol=0, atol=0)


def test_all_is_read_once_and_before_it_is_asked_for(tmp_path):
    images = Written(tmp_path / "reads")
    batches = [[i, i + 1] for i in range(0, 24, 2)]
    planned = []

    def plans():
        for batch in batches:
            planned.append(batch)
            yield images.request(batch)

    ahead = Prefetcher(images, plans(), 2, CPU)
    # so far and no further
    for _ in range(2 * BATCHES_AHEAD):
        assert images.done.acquire(timeout=60)
    assert len(planned) == len(images.reads) == 2 * BATCHES_AHEAD
    for batch in batches:
        assert ahead.next_request == images.request(batch)
        pixels, labels = next(ahead)
        assert pixels.tolist() == batch
        assert labels.tolist() == [0, 1]
    # with the last batch the processes end
    assert not multiprocessing.active_children()
    assert ahead.next_request is None
    assert next(ahead, None) is None
    assert sorted(indices for _, indices in images.reads) == batches
    readers = {process for process, _ in images.reads}
    assert len(readers) == 2
    assert os.getpid() not in readers


def test_closing_ends_the_processes_wherever_they_are(vit, photographs):
    env = make_env(vit, open_images(photographs, "train", CONFIG), 2)
    env.prefetch(range(100))
    env.reset(0)
    assert len(multiprocessing.active_children()) == 2
    env.prefetch(range(100))  # instead of the seeds before
    assert len(multiprocessing.active_children()) == 2
    env.close()
    assert not multiprocessing.active_children()
    # and it goes on without them
    assert env.reset(1).alive.all()


def test_a_generator_that_is_left_takes_its_processes_along(tmp_path):
    images = Written(tmp_path / "reads")
    for workers in (0, 1):
        batches = prefetch(images, ([i] for i in range(1000)), workers, CPU)
        assert [next(batches)[0].item() for _ in range(5)] == [0, 1, 2, 3, 4]
        batches.close()
        assert not multiprocessing.active_children()


def test_readers_import_nothing(tmp_path, monkeypatch):
    """A module that another thread imports while a process is forked can't be imported there."""

    def harm(index):
        if Image._initialized < 2:
            raise DatasetError("Pillow would import formats here")

    monkeypatch.setattr(Image, "_initialized", 0)
    images = Written(tmp_path / "reads", harm)
    assert len(list(prefetch(images, [[0], [1]], 1, CPU))) == 2


def test_images_in_memory_are_read_by_nobody_else(make_vit, some_images):
    env = make_env(make_vit(), some_images, 2)
    env.prefetch(range(5))
    assert not multiprocessing.active_children()
    batches = prefetch(some_images, [[3], [1, 2]], 2, CPU)
    assert [len(labels) for _, labels in batches] == [1, 2]
    assert not multiprocessing.active_children()


def test_a_bad_image_is_named_when_its_batch_is_due(tmp_path):
    def harm(index):
        if index == 1:
            raise DatasetError("image 1 is no image")

    images = Written(tmp_path / "reads", harm)
    batches = prefetch(images, [[0], [1], [2]], 1, CPU)
    assert next(batches)[0] == 0
    with pytest.raises(DatasetError) as raised:
        next(batches)
    assert str(raised.value) == "image 1 is no image"


@pytest.mark.skipif(sys.platform != "linux", reason="processes start anew there")
def test_how_other_libraries_start_processes_is_their_own_matter(tmp_path):
    """TorchRL changes it for everybody when it is imported."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        images = Written(tmp_path / "reads", lambda index: None)  # which nobody could pickle
        assert [pixels[0] for pixels, _ in prefetch(images, [[0], [1]], 1, CPU)] == [0, 1]
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.skipif(sys.platform != "linux", reason="processes start anew there")
@pytest.mark.parametrize(("chosen", "used"), [("forkserver", "forkserver"), ("spawn", "fork")])
def test_a_chosen_fork_server_is_heeded(tmp_path, monkeypatch, chosen, used):
    """It takes seconds to start one: that it is asked for is enough."""
    asked = []
    monkeypatch.setattr(
        "prunevit.envs.data.prefetch.DataLoader",
        lambda *_, multiprocessing_context, **__: asked.append(multiprocessing_context) or [],
    )
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: chosen)
    Prefetcher(Written(tmp_path / "reads"), [], 1, CPU)
    assert asked == [used]


@pytest.mark.timeout(60)
def test_a_process_that_dies_is_an_error_where_its_batch_is_due(tmp_path, monkeypatch):
    # seconds after which torch looks whether somebody died
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    taken = FORK.Event()

    def harm(index):
        if index == 1:
            taken.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    images = Written(tmp_path / "reads", harm)
    batches = prefetch(images, [[0], [1], [2]], 1, CPU)
    assert next(batches)[0] == 0
    (reader,) = multiprocessing.active_children()
    taken.set()
    # torch would raise it here, wherever we are
    reader.join()
    with pytest.raises(DatasetError, match="a process that reads images was ended"):
        next(batches)


class Two(Dataset):
    """For a ``DataLoader`` of somebody else's."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return index


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="there is no such signal")
def test_torchs_handler_is_left_to_other_loaders(tmp_path, monkeypatch):
    """It is set once in a process; who had it taken away later heard of no dead worker."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        images = Written(tmp_path / "reads", lambda index: None)
        assert len(list(prefetch(images, [[0], [1]], 1, CPU))) == 2
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        list(DataLoader(Two(), num_workers=1, multiprocessing_context=FORK))
        assert callable(signal.getsignal(signal.SIGCHLD))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_it_reads_ahead_where_there_is_no_such_signal(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(signal, "SIGCHLD", raising=False)
    images = Written(tmp_path / "reads", lambda index: None)
    assert len(list(prefetch(images, [[0], [1]], 1, CPU))) == 2


def test_signals_are_for_the_trainer(tmp_path):
    def harm(index):
        if index == 2:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)

    images = Written(tmp_path / "reads", harm)
    pixels: list[Tensor] = [batch for batch, _ in prefetch(images, [[1], [2], [3]], 1, CPU)]
    assert torch.cat(pixels).tolist() == [1, 2, 3]
