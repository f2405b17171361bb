"""Training without the extra ``train``: it says what is left out, and how to get it."""

import subprocess
import sys

CODE = """
import sys
import stable_baselines3  # older versions need matplotlib themselves
missing = ("matplotlib", "tensorboard", "torch.utils.tensorboard")
for name in list(sys.modules):
    if f"{name}.".startswith(tuple(f"{module}." for module in missing)):
        del sys.modules[name]
for name in ("matplotlib", "tensorboard"):
    sys.modules[name] = None  # as if it were not installed
from pathlib import Path
from types import SimpleNamespace
import prunevit.trainers.mappo
import prunevit.trainers.sb3
from prunevit.trainers.common.loop import _open_board
from prunevit.trainers.common.report import draw_curve

folder = Path(sys.argv[1])
(folder / "metrics.jsonl").write_text('{"iteration": 1, "reward": 0.5}\\n')
draw_curve(folder)
run = SimpleNamespace(ranks=SimpleNamespace(is_first=True), path=folder)
assert _open_board(run, 1) is None
assert prunevit.trainers.sb3.tensorboard_folder(folder) is None
"""


def test_a_run_goes_on_without_its_log_and_pictures(tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    picture, log = ended.stderr.splitlines()
    assert picture.startswith("curve.png is not drawn: matplotlib")
    assert log.startswith("No TensorBoard log is written: tensorboard is missing")
    for line in (picture, log):
        assert line.endswith("pip install -e '.[train]'")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
