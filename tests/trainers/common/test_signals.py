import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from prunevit.trainers.common.signals import (
    Stopped,
    ends_in_one_line,
    finishing_first,
    says_how_to_go_on,
)

FLAGS = "--resume runs/mine --env 'a game'"
SIGNALS = [signal.SIGTERM, signal.SIGINT]


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_one_line_and_an_exit_code(number, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    before = handlers()
    with pytest.raises(SystemExit) as ended, ends_in_one_line(), says_how_to_go_on(tmp_path, FLAGS):
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    said = capsys.readouterr().err
    assert said == f"stopped by {number.name}; continue with {FLAGS}\n"
    assert handlers() == before


def test_a_disk_that_is_full_is_told_how_to_go_on(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(SystemExit) as ended,
        ends_in_one_line(OSError),
        says_how_to_go_on(tmp_path, FLAGS),
    ):
        raise OSError(28, "No space left on device")
    said = f"error: [Errno 28] No space left on device; continue with {FLAGS}"
    assert ended.value.code == said


def test_what_was_not_begun_can_not_be_gone_on_with(tmp_path, capsys):
    with pytest.raises(SystemExit), ends_in_one_line(), says_how_to_go_on(tmp_path, FLAGS):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_a_second_signal_does_not_disturb_the_last_checkpoint():
    saved = []

    def train():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            saved.append(True)
            raise

    with pytest.raises(SystemExit), ends_in_one_line():
        train()
    assert saved == [True]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_what_must_be_finished(number):
    before, done = handlers(), []

    def train():
        with finishing_first():
            os.kill(os.getpid(), number)
            done.append("inside")
        done.append("behind")

    with pytest.raises(SystemExit) as ended, ends_in_one_line():
        train()
    assert ended.value.code == 128 + number
    assert done == ["inside"]
    assert handlers() == before


def test_without_a_signal_nothing_is_held_back():
    def train():
        with finishing_first():
            return "done"

    before = handlers()
    with pytest.raises(ZeroDivisionError), finishing_first():
        _ = 1 / 0
    assert train() == "done"
    assert handlers() == before
    # signals are the main thread's, others have none to hold back
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train).result() == "done"


def test_nobody_takes_a_stop_for_an_error_to_recover_from():
    assert not issubclass(Stopped, Exception)


def test_an_expected_error_is_one_line():
    before = handlers()
    with pytest.raises(SystemExit) as ended, ends_in_one_line(ValueError, OSError):
        raise OSError("no\n  such file")
    assert ended.value.code == "error: no such file"
    assert handlers() == before


def test_other_errors_are_bugs_and_keep_their_traceback():
    before = handlers()
    with pytest.raises(ZeroDivisionError), ends_in_one_line(ValueError):
        _ = 1 / 0
    assert handlers() == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 8 GiB"),
    ],
)
def test_too_little_memory_is_one_line(error):
    with pytest.raises(SystemExit) as ended, ends_in_one_line():
        raise error
    assert ended.value.code.startswith("error: out of memory")
    assert " allocate 8 " in ended.value.code
    assert "\n" not in ended.value.code


def test_an_error_of_ours_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes differ"), ends_in_one_line(ValueError):
        raise RuntimeError("shapes differ")
