import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunevit.trainers.common import checkpoint
from prunevit.trainers.common.checkpoint import (
    FORMAT,
    FORMAT_WITHOUT_CHECKSUM,
    KEPT,
    CheckpointError,
    existing,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    write_atomically,
    write_json,
    write_text,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / "checkpoint.safetensors"


@contextmanager
def full_disk():
    """No file may grow beyond 64 KiB: the system refuses the write, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        yield
    finally:
        # at once: what pytest itself writes may go to a longer file
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BIG = {"weights": torch.zeros(100_000)}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_a_tree_comes_back(file):
    tree = {
        "step": 3,
        "rate": 0.1,
        "name": "ä",
        "none": None,
        "flags": [True, False],
        "nested": {"list": [torch.ones(2, 3), {"deep": torch.zeros(())}], "empty": {}},
        "state": {0: {"step": torch.tensor(3)}, 1: {"step": torch.tensor(4.5)}},
        "types": [torch.arange(3), torch.ones(2, dtype=torch.bfloat16), torch.tensor([True])],
        "nothing": torch.empty(0, 4),
    }
    save_checkpoint(file, tree)
    assert equal(load_checkpoint(file), tree)


def test_keys_that_look_like_paths_stay_apart(file):
    tree = {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1), "$tensor": torch.full((1,), 2.0)}
    save_checkpoint(file, tree)
    assert equal(load_checkpoint(file), tree)


def test_a_tree_without_tensors(file):
    save_checkpoint(file, {"epoch": 1})
    assert load_checkpoint(file) == {"epoch": 1}


def test_tensors_may_share_memory_or_be_transposed(file):
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {"a": shared, "b": shared, "t": shared.T, "row": shared[1]}
    save_checkpoint(file, tree)
    loaded = load_checkpoint(file)
    assert equal(loaded, tree)
    loaded["a"].zero_()
    assert equal(loaded["b"], shared)


def test_gradients_are_left_behind(file):
    save_checkpoint(file, {"w": torch.ones(2, requires_grad=True)})
    assert not load_checkpoint(file)["w"].requires_grad


def test_an_optimizer_goes_on_as_if_nothing_had_been(file):
    def optimizer_of(weights):
        return torch.optim.AdamW([{"params": [weights], "lr": 0.1}], betas=(0.8, 0.9))

    def step(weights, optimizer):
        weights.grad = weights.detach() ** 2 + 1
        optimizer.step()

    weights = torch.nn.Parameter(torch.arange(3.0))
    optimizer = optimizer_of(weights)
    step(weights, optimizer)
    save_checkpoint(file, {"w": weights, "optimizer": optimizer.state_dict()})
    loaded = load_checkpoint(file)
    again = torch.nn.Parameter(loaded["w"])
    optimizer_again = optimizer_of(again)
    optimizer_again.load_state_dict(loaded["optimizer"])
    for _ in range(3):
        step(weights, optimizer)
        step(again, optimizer_again)
    assert torch.equal(weights, again)


def test_what_is_no_json_is_refused_and_nothing_lost(file):
    save_checkpoint(file, {"epoch": 1})
    with pytest.raises(TypeError):
        save_checkpoint(file, {"epoch": object()})
    assert load_checkpoint(file) == {"epoch": 1}


# --- damage ---


def test_a_missing_checkpoint_is_named(file):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*checkpoint\.safetensors"):
        load_checkpoint(file)


def test_a_truncated_checkpoint_is_named_wherever_it_ends(file):
    save_checkpoint(file, {"epoch": 1, "weights": torch.zeros(300)})
    content = file.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged"):
            load_checkpoint(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, f"format None, this version reads '{FORMAT}'"),
        ({"format": "prunevit-checkpoint-9", "skeleton": "{}"}, "prunevit-checkpoint-9"),
        ({"format": FORMAT}, "damaged"),
        ({"format": FORMAT, "skeleton": "{"}, "damaged"),
        ({"format": FORMAT, "skeleton": json.dumps({"$dict": [["a", {"$tensor": "9"}]]})}, "dam"),
    ],
)
def test_another_format_or_version_is_named(tmp_path, metadata, message):
    file = tmp_path / "w.safetensors"
    save_file({"0": torch.zeros(2)}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(file)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "w.safetensors").write_text("a text file, and no checkpoint at all")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "w.safetensors")


def test_any_flipped_bit_is_noticed(file):
    save_checkpoint(file, {"epoch": 1, "weights": torch.ones(3), "flag": torch.tensor(True)})
    content = file.read_bytes()
    for i in range(len(content)):
        if content[i : i + 1] == b" ":
            continue  # fills up the header, and says nothing
        file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(CheckpointError, match=r"safetensors is (damaged|of format)"):
            load_checkpoint(file)


def test_a_checkpoint_from_before_there_were_checksums_is_read(tmp_path):
    file = tmp_path / "w.safetensors"
    skeleton = json.dumps({"$dict": [["a", {"$tensor": "0"}]]})
    metadata = {"format": FORMAT_WITHOUT_CHECKSUM, "skeleton": skeleton}
    save_file({"0": torch.ones(2)}, file, metadata=metadata)
    assert equal(load_checkpoint(file), {"a": torch.ones(2)})


# --- the ones before ---


def epochs(file):
    return [load_checkpoint(each)["epoch"] for each in existing(file)]


@pytest.mark.parametrize("has_links", [True, False])
def test_the_last_few_are_kept(file, has_links, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(checkpoint.os, "link", refuse)
    assert existing(file) == []
    for epoch in range(5):
        save_checkpoint(file, {"epoch": epoch})
        assert epochs(file) == list(range(epoch, max(epoch - KEPT, -1), -1))
    assert len(list(file.parent.iterdir())) == KEPT


def test_the_newest_sound_one_is_loaded_and_the_damaged_are_named(file, capsys):
    for epoch in range(3):
        save_checkpoint(file, {"epoch": epoch})
    assert load_newest(file) == {"epoch": 2}
    assert capsys.readouterr().err == ""
    newest, before, oldest = existing(file)
    # a new file: the names must not share their content with each other
    newest.write_bytes(newest.read_bytes()[:-1])
    assert load_newest(file) == {"epoch": 1}
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {newest} is damaged")
    assert said.endswith(f"; going on from {before}\n")
    before.unlink()
    assert load_newest(file) == {"epoch": 0}
    oldest.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged"):
        load_newest(file)


def test_none_at_all_is_named(file):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_newest(file)


# --- writing ---


def test_a_full_disk_leaves_the_previous_checkpoint(file):
    save_checkpoint(file, {"epoch": 1})
    with full_disk(), pytest.raises(OSError, match=r"could not write .*checkpoint\.safetensors"):
        save_checkpoint(file, {"epoch": 2, **BIG})
    assert load_checkpoint(file) == {"epoch": 1}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (Path, "write_bytes", 1),  # the new one's content
        (Path, "replace", 1),  # of an older one's name
        (shutil, "copyfile", 1),  # of the last one, where it can't have a second name
        (os, "fsync", 1),
        (Path, "replace", 2),  # of the new one's name
    ],
)
def test_the_disk_may_be_full_at_any_moment(file, monkeypatch, owner, name, count):
    do, seen = getattr(owner, name), []

    def full(*args):
        seen.append(0)
        if len(seen) < count:
            return do(*args)
        if name in ("write_bytes", "copyfile"):
            Path(args[0] if name == "write_bytes" else args[1]).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    for epoch in range(1, KEPT + 1):
        save_checkpoint(file, {"epoch": epoch})
    with monkeypatch.context() as context:
        context.setattr(owner, name, full)
        if name == "copyfile":
            context.setattr(os, "link", refuse)
        with pytest.raises(OSError, match=r"could not write .*checkpoint\.safetensors: No space"):
            save_checkpoint(file, {"epoch": 9})
    assert len(seen) == count
    assert load_newest(file) == load_checkpoint(file) == {"epoch": KEPT}
    assert not list(file.parent.glob(".*"))
    save_checkpoint(file, {"epoch": 10})
    assert load_checkpoint(file) == {"epoch": 10}


def test_a_full_disk_leaves_the_previous_json(tmp_path):
    file = tmp_path / "report.json"
    write_json(file, {"accuracy": 0.5})
    with full_disk(), pytest.raises(OSError, match=r"could not write .*report\.json"):
        write_json(file, list(range(100_000)))
    assert json.loads(file.read_text()) == {"accuracy": 0.5}
    assert list(tmp_path.iterdir()) == [file]


def test_a_writer_that_fails_leaves_the_previous_file(tmp_path):
    file = tmp_path / "f.txt"
    write_text(file, "before\n")

    def write(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, write)
    assert file.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [file]


def test_readers_never_see_half_a_file(tmp_path):
    file = tmp_path / "f.txt"
    write_text(file, "before")

    def write(path):
        path.write_text("aft")
        assert file.read_text() == "before"
        path.write_text("after")

    write_atomically(file, write)
    assert file.read_text() == "after"


def test_what_a_killed_writer_left_is_cleared(file, monkeypatch):
    save_checkpoint(file, {"epoch": 1})
    with monkeypatch.context() as context:
        # a process that is killed neither moves its file nor removes it
        context.setattr(checkpoint.Path, "replace", lambda *_: None)
        context.setattr(checkpoint.Path, "unlink", lambda *_, **__: None)
        save_checkpoint(file, {"epoch": 2})
    assert len(list(file.parent.glob(".*"))) == 1
    assert load_checkpoint(file) == {"epoch": 1}
    save_checkpoint(file, {"epoch": 3})
    assert epochs(file)[:2] == [3, 1]
    assert not list(file.parent.glob(".*"))


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match=r"could not write .*taken/f\.json"):
        write_json(tmp_path / "taken" / "f.json", {})


def test_json_is_readable(tmp_path):
    write_json(tmp_path / "f.json", {"a": [1, "ä"]})
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) == {"a": [1, "ä"]}
    assert (tmp_path / "f.json").read_text(encoding="utf-8").endswith("}\n")
