"""Random command lines of ``trainers.mappo``, right and wrong: each runs, or ends in a line that
says why. ``--command-lines N`` tries so many.
"""

import contextlib
import io
import json
import random
import shlex
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunevit.envs.vit.create import create_backbone
from prunevit.envs.vit.weights import write_weights
from prunevit.trainers import mappo
from prunevit.trainers.common import report

SPREAD = "pettingzoo:mpe2.simple_spread_v3"
TINY = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
SMALL = {"img_size": 32, **TINY, "num_heads": 1, "depth": 2}
LONGEST_MESSAGE = 1_000
FEW = 25  # command lines, of the test that belongs to the core
USAGE_ERROR = "For full helptext, "  # begins its last line
# nothing refuses huge ones, and nothing ends them either
ENDLESS = "iterations", "epochs", "rollout-steps", "eval-size"

NO_NUMBERS = ["", " ", "one", "nan", "inf", "-inf", "1e999", "0x10", "1,2", "None", "True", "--lr"]
NO_COUNTS = [*NO_NUMBERS, "0", "-1", "1.5", "-99999999999999999999"]
COUNTS = ["1", "2", "3", "٣"]  # Python reads other scripts' digits, too
HUGE = "99999999999999999999999"
WORDS = ["", " ", "nonsense", "🦊", "a\nb", "--", "x" * 300, "../..", "None", "{}", "%s"]
COUNTED = ("num-envs", "rollout-steps", "iterations", "rollouts-per-image", "epochs", "minibatches",
           "accumulate", "workers", "eval-every", "eval-size", "checkpoint-every",
           "threads", "actor-attention")  # fmt: skip
POSITIVE = ("lr", "clip", "huber-delta", "max-grad-norm")
NOT_NEGATIVE = ("entropy", "value-weight", "attention-prior", "alpha", "beta")
SHARES = ("gamma", "gae-lambda")


def choices(files):
    """By flag, what may follow it: each a list of arguments. ``files`` are by what is wrong with
    them.
    """
    paths = [str(path) for path in files.values()]
    one = {name: [*NO_COUNTS, *COUNTS, HUGE] for name in COUNTED}
    for name in ENDLESS:
        one[name].remove(HUGE)
    for name in POSITIVE:
        one[name] = [*NO_NUMBERS, "0", "-0.1", "1e-9", "0.1", "1", "1e30", "1e-320", "1e300"]
    for name in NOT_NEGATIVE:
        one[name] = [*NO_NUMBERS, "0", "-0.1", "-1e-30", "0.3", "1", "1e9", "1e30", "1e300"]
    for name in SHARES:
        one[name] = [*NO_NUMBERS, "0", "1", "0.5", "1.1", "-0.1", "1e300"]
    one |= {
        "keep-bias": [*NO_NUMBERS, "-3", "0", "50", "1e30", "-1e300"],
        "seed": [*NO_COUNTS, "0", "7", "4294967295", "4294967296", HUGE],
        "env": [*WORDS, "token-prune", "Token-Prune", SPREAD, "pettingzoo:", "pettingzoo:os",
                "pettingzoo:nowhere", "pettingzoo:.os", "pettingzoo:a..b", "pettingzoo:json",
                "pettingzoo:mpe2", "pettingzoo:🦊"],
        "env-kwargs": [*WORDS, "[1]", "null", "3", '{"N": 2}', '{"N": 0}', '{"N": -1}',
                       '{"N": "two"}', '{"max_cycles": 0}', '{"max_cycles": 3}', '{"nope": 1}',
                       '{"render_mode": "x"}', '{"max_cycles": NaN}', '{"local_ratio": 7}',
                       '{"continuous_actions": true}', '{"N": 1.5}', '{"": 1}'],
        "backbone": [*WORDS, "digits_vit", "vit_tiny_patch16_224", "vit_tiny_patch16_224.none",
                     "vit_nope", "resnet18", "VIT_TINY_PATCH16_224", "test_vit", "test_convnext",
                     *paths],
        "model-kwargs": [*WORDS, "[]", "null", "{", json.dumps(SMALL), '{"depth": 0}',
                         '{"depth": -1}', '{"depth": "two"}', '{"embed_dim": 15}',
                         '{"num_heads": 0}', '{"img_size": 0}', '{"img_size": 20}',
                         '{"img_size": null}', '{"patch_size": 0}', '{"patch_size": 1000000000}',
                         '{"nope": 1}', '{"embed_layer": "conv"}', '{"embed_layer": "conv_stem"}',
                         '{"mlp_ratio": NaN}', '{"num_classes": 0}', '{"num_classes": -3}',
                         '{"in_chans": 7}', '{"in_chans": 0}', '{"global_pool": "x"}',
                         '{"global_pool": ""}', '{"class_token": false}', '{"checkpoint": 1}',
                         '{"untrained": true}', '{"pretrained": 1}', '{"name": "x"}', '{"": 1}',
                         '{"drop_path_rate": 2}', '{"norm_layer": "x"}', '{"act_layer": 3}',
                         '{"depth": 1.5}', '{"embed_dim": [1]}', '{"dynamic_img_size": true}'],
        "checkpoint": [*WORDS, *paths],
        "init": [*WORDS, *paths],
        "dataset": [*WORDS, "digits", "digitz", "folder:", "folder:nowhere", "folder:.",
                    "folder:🦊", "tfds/nope", "torch/nope", "csv:x",
                    *(f"folder:{path}" for path in paths), *paths],
        "reward": [*WORDS, "team", "markov-game", "released-code", "Team"],
        "accuracy": [*WORDS, "correct", "confidence", "agreement", "kl", "KL"],
        "critic": [*WORDS, "central", "local", "none", "None"],
        "lr-schedule": [*WORDS, "constant", "linear", "cosine", "step"],
        "device": ["cpu", "auto", "cpu:0", "cpu:7", "cuda", "cuda:99", "mps", "meta", "xla", "hpu",
                   "abacus", "", "cpu:", "🦊", "cpu\n"],
        "run-name": [*WORDS, ".", "..", "a/b", "/", "прогон", "nul\0", "-dash", "taken"],
        "resume": [*WORDS, *paths],
    }  # fmt: skip
    many = {
        "prune-before": ["", "1", "2", "1 2", "0 1 2", "2 1", "1 1", "3", "-1", "0", "None", "1.0",
                         "a", HUGE, "1 None", "0 0 0", "1 2 3 4 5 6 7 8"],
        "observation": ["", "token", "token token", "cls stage", "smell", "token smell", "alpha",
                        "cls_attention", "position alive_fraction cls_attention", "🦊", "Token",
                        "token cls stage position cls_attention alive_fraction alpha"],
        "alpha-range": ["", "0.1", "0.1 0.5", "0.5 0.1", "0 1", "-1 1", "nan nan", "0.1 inf",
                        "a b", "0.1 0.2 0.3", "1e300 1e301", "1e-320 1", "None"],
        "hidden": ["", "4", "4 4", "0", "-1", "4 0", "a", "1.5", "999999999999999", HUGE, "None"],
        "critic-hidden": ["", "4", "4 4", "0", "-1", "a", "999999999999999", HUGE],
    }  # fmt: skip
    return {f"--{name}": [[value] for value in values] for name, values in one.items()} | {
        f"--{name}": [value.split() for value in values] for name, values in many.items()
    }


ODD = [["--help"], ["-h"], ["--lr"], ["--learning-rate", "1"], ["--no-augment"], ["--augment"],
       ["--augment", "--no-augment"], ["--augment", "yes"], ["--skip-bad-images"], [""],
       ["--no-skip-bad-images"], ["junk"], ["🦊"], ["--🦊", "1"], ["--"], ["--lr=1e-3"], ["--lr="],
       ["--seed", "1", "--seed", "2"], ["--pretrained"], ["--no-pretrained"], ["-x"],
       ["--num_envs", "4"], ["--hidden=4"], ["--iterations", "1", "--iterations"],
       ["--env="], ["--env"]]  # fmt: skip
RESUMED = ["--seed", "--lr", "--iterations", "--env", "--device", "--run-name"]


def command_line(chance, options, base, spread, files):
    """One command line, with up to three oddities."""
    kind = chance.random()
    if kind < 0.15:
        # runs as they are found, and what goes with them
        settings = {"--resume": [str(chance.choice(list(files.values())))]}
        for name in chance.sample(RESUMED, chance.choice([0, 0, 0, 1, 2])):
            settings[name] = chance.choice(options[name])
    else:
        settings = dict(spread if kind < 0.3 else base)
        settings["--run-name"] = [f"run{chance.randrange(10**12)}"]
        for _ in range(chance.choice([0, 1, 1, 1, 1, 2, 2, 3])):
            if chance.random() < 0.1:
                settings.pop(chance.choice(list(settings)))
                continue
            name = chance.choice(list(options))
            settings[name] = chance.choice(options[name])
    parts = list(settings.items())
    chance.shuffle(parts)
    line = [part for name, values in parts for part in (name, *values)]
    if chance.random() < 0.15:
        place = chance.randrange(len(line) + 1)
        line[place:place] = chance.choice(ODD)
    if SPREAD in line:
        line = [part if part != HUGE else "2" for part in line]  # copies of it are made one by one
    # what runs is to end soon: left out, these would be those of a real training
    for name in ("--iterations", "--eval-size"):
        if "--resume" not in line and name not in line:
            line += [name, "1"]
    return line


def complaint_of(line):
    """Runs a command; returns whether it ran, and what is wrong with how it ended."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            mappo.main(line)
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            if not code.startswith("error: ") or len(code) < 15 or len(code.splitlines()) != 1:
                return False, f"not one clear line: {code!r}"
            if len(code) > LONGEST_MESSAGE:
                return False, f"{len(code)} characters: {code[:300]!r}"
        elif code == 2:
            if "Traceback" in err.getvalue() or USAGE_ERROR not in err.getvalue():
                return False, f"no usage error: {err.getvalue()[-500:]}"
        elif code != 0 or not {"-h", "--help"} & set(line):
            return False, f"exit code {code}"
        return False, None
    except BaseException:
        return False, traceback.format_exc(limit=-6)
    if "s, seed" not in out.getvalue():
        return True, "it tells no result"
    return True, None


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files and folders, whole and broken, by what they are."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.RandomState(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in ("dark", "bright"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.randint(0, 256, (64, 64), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    weights = tmp_path / "weights.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_backbone(num_classes=2, untrained=True, **TINY)
    write_weights(weights, model.state_dict(), "digits_vit", 2, TINY)
    made = {"images": tmp_path / "images", "weights": weights, "nowhere": tmp_path / "nowhere"}
    for name, content in {
        "empty": b"",
        "text": "пиши".encode(),
        "half": weights.read_bytes()[:-1000],
        "zeros.safetensors": bytes(1000),
        "picture.png": (made["images"] / "train/dark/0.png").read_bytes(),
    }.items():
        made[name] = tmp_path / name
        made[name].write_bytes(content)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    made["other"] = tmp_path / "other.pt"
    made["empty folder"] = tmp_path / "empty folder"
    made["empty folder"].mkdir()
    bad = tmp_path / "bad images" / "train" / "dark"
    bad.mkdir(parents=True)
    (bad / "0.png").write_bytes(b"no picture")
    made["bad images"] = tmp_path / "bad images"
    taken = tmp_path / "runs" / "taken"
    taken.mkdir(parents=True)
    (taken / "file").write_text("x")
    made["no run"] = taken
    return made


def break_runs(whole, files):
    """Runs that can't be gone on with, made of one that can."""
    config = json.loads((whole / "config.json").read_text())
    texts = {
        "no JSON": "{",
        "a list": "[]",
        "null": "null",
        "no text": b"\xff\xfe\x00",
        "other version": json.dumps(config | {"brightness": 1}),
        "words for numbers": json.dumps(config | {"lr": "fast"}),
        "number for words": json.dumps(config | {"dataset": 3}),
        "number for many": json.dumps(config | {"hidden": 4}),
        "null for number": json.dumps(config | {"num_envs": None}),
        "text for many": json.dumps(config | {"prune_before": "12"}),
        "fractions": json.dumps(config | {"num_envs": 4.5}),
        "longer": json.dumps(config | {"iterations": 2}),
        "other sizes": json.dumps(config | {"hidden": [7]}),
        "list for folder": json.dumps(config | {"checkpoint": [1]}),
    }
    for name, text in texts.items():
        folder = whole.parent / name
        folder.mkdir()
        for file in whole.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "config.json").write_bytes(content)
        files[name] = folder
    for name, lost in {
        "no metrics": "metrics.jsonl",
        "no checkpoint": "checkpoint.safetensors",
        "torn checkpoint": "checkpoint.safetensors",
        "torn metrics": "metrics.jsonl",
    }.items():
        folder = whole.parent / name
        folder.mkdir()
        for file in whole.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        content = (folder / lost).read_bytes()
        (folder / lost).write_bytes(content[: len(content) // 2])
        if name.startswith("no "):
            (folder / lost).unlink()
        files[name] = folder
    files["whole"] = whole


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_any_command_line_runs_or_says_why_not(many, request, files, monkeypatch):
    threads = torch.get_num_threads()
    # a run's pictures and timings have tests of their own, and take longer than the run
    monkeypatch.setattr(report, "images_per_second", lambda models, *_: dict.fromkeys(models, 1.0))
    for name in ("draw_pruned", "draw_curve"):
        monkeypatch.setattr(report, name, lambda *_: None)
    common = {
        "--iterations": ["1"], "--epochs": ["1"], "--hidden": ["4"], "--device": ["cpu"],
        "--threads": ["1"], "--eval-size": ["1"], "--num-envs": ["4"],
    }  # fmt: skip
    base = common | {
        "--checkpoint": [str(files["weights"])], "--dataset": [f"folder:{files['images']}"],
        "--rollouts-per-image": ["2"], "--prune-before": ["1", "2"],
    }  # fmt: skip
    spread = common | {
        "--env": [SPREAD], "--env-kwargs": ['{"max_cycles": 3, "N": 2}'], "--rollout-steps": ["3"],
    }  # fmt: skip
    first = [part for name, values in base.items() for part in (name, *values)]
    assert complaint_of([*first, "--run-name", "whole"]) == (True, None)
    break_runs(Path("runs/whole").absolute(), files)
    options = choices(files)
    count = request.config.getoption("--command-lines") if many else FEW
    ran, wrong = 0, []
    for seed in range(count):
        line = command_line(random.Random(seed), options, base, spread, files)
        went, complaint = complaint_of(line)
        ran += went
        if complaint is not None:
            wrong.append(f"{seed}: {shlex.join(line)}\n{complaint}")
    torch.set_num_threads(threads)
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    assert 0.05 * count < ran < 0.9 * count
