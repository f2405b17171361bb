"""Training without the extra ``train``: it says what is left out, and how to get it."""

import sys
from types import SimpleNamespace

from prunevit.trainers import sb3
from prunevit.trainers.common.loop import _open_board
from prunevit.trainers.common.report import draw_curve


def test_a_run_goes_on_without_its_log_and_pictures(tmp_path, monkeypatch, capsys):
    """``tests/test_imports.py`` sees that neither is imported with our modules."""
    missing = ("matplotlib.", "tensorboard.", "torch.utils.tensorboard.")
    for name in [name for name in sys.modules if f"{name}.".startswith(missing)]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("matplotlib", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "reward": 0.5}\n')
    draw_curve(tmp_path)
    run = SimpleNamespace(ranks=SimpleNamespace(is_first=True), path=tmp_path)
    assert _open_board(run, 1) is None
    assert sb3.tensorboard_folder(tmp_path) is None
    picture, log = capsys.readouterr().err.splitlines()
    assert picture.startswith("curve.png is not drawn: matplotlib")
    assert log.startswith("No TensorBoard log is written: tensorboard is missing")
    for line in (picture, log):
        assert line.endswith("pip install -e '.[train]'")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
