"""Bars of long commands, and how runs end."""

import io
import sys

from prunevit.progress import progress_bar, say
from prunevit.trainers.common.closing import say_where_and_what_next


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_what_is_done_and_what_is_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(8, "images", done=4, title="photos") as bar:
        bar.update(2)
        bar.refresh()
    shown = terminal.getvalue().split("\r")
    assert shown[1].startswith("photos:  50%")
    assert any("6/8 [" in state and "images/s" in state for state in shown)


def test_a_bar_counts_what_it_goes_through(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar(3, "rounds", items="abc")) == ["a", "b", "c"]
    assert "3/3" in terminal.getvalue()


def test_a_silent_bar_and_one_without_a_terminal_show_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(8, "images", silent=True) as bar:
        bar.update()
    assert not terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(8, "images") as bar:
        bar.update()
    assert not sys.stderr.getvalue()


def test_lines_go_to_the_output(capsys):
    with progress_bar(8, "images"):
        say("a line")
    assert capsys.readouterr() == ("a line\n", "")


def test_a_run_says_where_its_files_are_and_what_can_be_done(tmp_path, capsys):
    run = tmp_path / "a run"
    (run / "model").mkdir(parents=True)
    for name in ("report.json", "pruned.png", "events.out.tfevents.123"):
        (run / name).touch()
    say_where_and_what_next(run, "prunevit viewer --model FOLDER/model")
    assert capsys.readouterr() == (
        "",
        f"in {run}: model (the pruned ViT, for PrunedViT.from_pretrained), report.json (these "
        "results), pruned.png (what is pruned of some images)\n"
        f"curves: tensorboard --logdir '{run}'\n"
        f"next: prunevit viewer --model '{run}'/model\n",
    )
    (run / "events.out.tfevents.123").unlink()
    say_where_and_what_next(run)
    assert "tensorboard" not in capsys.readouterr().err
