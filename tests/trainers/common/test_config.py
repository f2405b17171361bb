import dataclasses
import json
import re
from pathlib import Path

import pytest

from prunevit.agents.policies.actor_critic import POLICY_GAIN
from prunevit.trainers.common.config import MappoConfig, defaults_for, parse
from prunevit.trainers.common.settings import parse_arguments
from prunevit.trainers.finetune import FinetuneConfig
from prunevit.trainers.mappo import ADAM_EPS

SPREAD = "pettingzoo:mpe2.simple_spread_v3"


# --- defaults ---


def test_each_kind_of_game_has_defaults_of_its_own():
    assert defaults_for("token-prune") == MappoConfig()
    assert defaults_for(SPREAD).env == SPREAD
    assert MappoConfig().critic == defaults_for(SPREAD).critic == "central"


def test_pettingzoo_games_have_the_defaults_of_mappos_authors():
    """Yu et al. 2022, app. D, and the configuration in their code."""
    config = defaults_for(SPREAD)
    assert {name: getattr(config, name) for name in AUTHORS} == AUTHORS
    assert ADAM_EPS == 1e-5
    assert POLICY_GAIN == 0.01


AUTHORS = {
    "critic": "central", "critic_norm": True, "hidden_layers": "relu-norm",
    "lr": 5e-4, "lr_schedule": "constant", "epochs": 10, "minibatches": 1, "clip": 0.2,
    "huber_delta": 10.0, "value_weight": 1.0, "entropy": 0.01,
    "gamma": 0.99, "gae_lambda": 0.95, "max_grad_norm": 10.0, "value_norm_decay": 0.99999,
}  # fmt: skip


@pytest.mark.parametrize("arguments", [["--env", SPREAD], [f"--env={SPREAD}"]])
def test_the_command_line_starts_from_the_games_defaults(arguments):
    assert parse(arguments) == defaults_for(SPREAD)
    changed = parse(["--num-envs", "3", *arguments, "--hidden", "5", "6"])
    assert changed == dataclasses.replace(defaults_for(SPREAD), num_envs=3, hidden=(5, 6))
    assert parse([]) == MappoConfig()


def test_every_flag_of_the_issue_is_there():
    line = (
        "--env token-prune --backbone vit --checkpoint w.pt --dataset folder:x --prune-before 1 3 "
        "--reward markov-game --alpha 0.5 --beta 2 --rollouts-per-image 4 --num-envs 8 "
        "--iterations 9 --seed 3 --device cpu --run-name r --critic local --attention-prior 0 "
        '--redundancy-prior 9 --model-kwargs {"depth":3}'
    )
    expected = MappoConfig(
        backbone="vit", checkpoint=Path("w.pt"), dataset="folder:x", prune_before=(1, 3),
        reward="markov-game", alpha=0.5, beta=2.0, rollouts_per_image=4, num_envs=8, iterations=9,
        seed=3, device="cpu", run_name="r", critic="local", attention_prior=0.0,
        redundancy_prior=9.0, model_kwargs={"depth": 3},
    )  # fmt: skip
    assert parse(line.split()) == expected
    assert parse(["--resume", "runs/r"]).resume == Path("runs/r")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_gb": 1.0}, "give --no-augment with --cache-gb"),
        ({"cache_gb": -1.0, "augment": False}, "at least 0 and"),
        ({"backbone_dtype": "float16"}, "choose from float32, bfloat16"),
    ],
)
def test_how_the_backbone_runs_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        MappoConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_range": (0.1, 0.5)}, "needs both --alpha-range and alpha"),
        ({"observation": ("token", "alpha")}, "needs both --alpha-range and alpha"),
        ({"alpha": 1.0, "alpha_range": (0.1, 0.5), "observation": ("alpha",)}, "not both"),
    ],
)
def test_a_range_of_prices_goes_with_agents_that_see_them(settings, message):
    with pytest.raises(ValueError, match=message):
        MappoConfig(**settings)


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(MappoConfig):
        name = field.name.replace("_", "-")
        found = re.search(rf" --{name}(?:, --no-{name})? (.*?) \(default: ", text)
        assert found, name
        assert re.search(r"[\w)}]\.$", found[1]), f"{name}: {found[1]}"
        assert " --" not in found[1], f"{name}: {found[1]}"


def test_help_shows_the_games_own_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = []
    for arguments in (["--help"], ["--env", SPREAD, "--help"]):
        with pytest.raises(SystemExit):
            parse(arguments)
        shown.append(" ".join(capsys.readouterr().out.replace("│", " ").split()))
    for text, config in zip(shown, (MappoConfig(), defaults_for(SPREAD)), strict=True):
        for name in ("env", "critic", "iterations", "num_envs", "epochs", "lr", "gamma"):
            after = text.partition(f"--{name.replace('_', '-')} ")[2]
            assert after.partition("(default: ")[2].partition(")")[0] == str(getattr(config, name))


# --- JSON ---

UNUSUAL = MappoConfig(
    model_kwargs={"depth": 3, "sizes": [1, 2]},
    checkpoint=Path("weights.safetensors"),
    prune_before=(1, 3),
    observation=("token", "stage"),
    hidden=(),
    alpha=0.25,
    attention_prior=0.0,
    threads=2,
)


@pytest.mark.parametrize("config", [MappoConfig(), UNUSUAL, defaults_for(SPREAD)])
def test_settings_come_back_from_json(config):
    assert MappoConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_run_of_before_keeps_its_networks_and_its_norms_decay():
    values = defaults_for(SPREAD).to_json()
    del values["critic_norm"], values["value_norm_decay"], values["hidden_layers"]
    config = MappoConfig.from_json(values)
    assert (config.critic_norm, config.value_norm_decay) == (False, 0.99)
    assert config.hidden_layers == "gelu"
    del values["actor_attention"]
    assert MappoConfig.from_json(values).actor_attention == 0


def test_settings_of_another_version_are_named():
    values = MappoConfig().to_json()
    with pytest.raises(ValueError, match=r"^unknown settings: brightness, contrast$"):
        MappoConfig.from_json(values | {"contrast": 1, "brightness": 2})
    del values["lr"]
    with pytest.raises(ValueError, match=r"^missing settings: lr$"):
        MappoConfig.from_json(values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", "fast", "must be of type float"),
        ("lr", None, "must be of type float"),
        ("num_envs", 4.5, "must be of type int"),
        ("num_envs", True, "must be of type int"),
        ("augment", 1, "must be of type bool"),
        ("dataset", 3, "must be of type str"),
        ("hidden", 4, "must be of type tuple"),
        ("hidden", [4, "8"], "must be of type int"),
        ("alpha_range", [0.1], "must have 2 values"),
        ("prune_before", "13", "must be of type tuple"),
        ("critic", "best", "is unknown: choose from central, local, none"),
        ("model_kwargs", [], "must be of type dict"),
        ("checkpoint", 3, "must be of type Path"),
    ],
)
def test_settings_of_a_wrong_type_are_named(name, value, message):
    values = json.loads(json.dumps(MappoConfig().to_json())) | {name: value}
    with pytest.raises(ValueError, match=rf"^{name}=.*{message}$"):
        MappoConfig.from_json(values)


# --- bad values ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("num_envs", "rollout_steps", "iterations", "epochs",
                                     "minibatches", "rollouts_per_image", "eval_every",
                                     "eval_size", "checkpoint_every", "threads")
          for value in (0, -1, 10**10)),
        ("seed", -1),
        ("seed", 2**32),
        *((name, value) for name in ("lr", "clip", "huber_delta", "max_grad_norm")
          for value in (0.0, -1.0, 1e300, float("inf"), float("nan"))),
        *((name, value) for name in ("gamma", "gae_lambda")
          for value in (-0.1, 1.1, float("nan"))),
        *((name, value) for name in ("entropy", "value_weight", "attention_prior",
                                     "redundancy_prior")
          for value in (-0.1, 1e300, float("inf"), float("nan"))),
        *(("keep_bias", value) for value in (-1e300, float("inf"), float("nan"))),
        ("hidden", (32, 0)),
        ("hidden", (32, 10**6)),
        ("critic_hidden", (-1,)),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}="):
        MappoConfig(**{name: value})


def test_without_a_critic_rollouts_must_be_compared():
    with pytest.raises(ValueError, match=r"--rollouts-per-image 2 or more, or --critic central"):
        MappoConfig(critic="none", rollouts_per_image=1)
    MappoConfig(critic="local", rollouts_per_image=1)
    MappoConfig(critic="none", rollouts_per_image=2)


def test_pettingzoo_needs_a_critic():
    with pytest.raises(ValueError, match="needs a critic, central or local"):
        dataclasses.replace(defaults_for(SPREAD), critic="none")


def test_networks_that_the_token_game_can_not_read_again_are_refused():
    with pytest.raises(ValueError, match=r"'relu-norm' is for PettingZoo games"):
        MappoConfig(hidden_layers="relu-norm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minibatches": 2}, r"minibatches=2 would tear agents apart .* --minibatches 1"),
        ({"hidden": ()}, "needs an actor with a hidden layer"),
        ({"env": SPREAD}, "only agents of the token game attend"),
    ],
)
def test_agents_that_can_not_attend_to_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MappoConfig(actor_attention=2, **changes)


def test_an_unknown_env_is_told_what_exists():
    message = r"unknown env 'chess': choose token-prune or pettingzoo:MODULE"
    with pytest.raises(ValueError, match=message):
        MappoConfig(env="chess", critic="central")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "chess"], "unknown env 'chess'"),
        (["--iterations", "0"], "iterations=0 must be at least 1"),
        (["--critic", "best"], "central"),
        (["--lr", "fast"], "--lr"),
        (["--env-kwargs", "[1]"], "JSON object"),
        (["--env-kwargs", '{"max_cycles": NaN}'], "finite numbers"),
        (["--env-kwargs", '{"sizes": [1, {"N": -1e999}]}'], "finite numbers"),
        (["--learning-rate", "1"], "--learning-rate"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_names_of_before_are_taken_with_a_warning(capsys):
    arguments = ["--alpha-range", "0.1", "0.5", "--observation", "token", "cls_attention", "budget"]
    assert parse(arguments).observation == ("token", "cls_attention", "alpha")
    assert capsys.readouterr().err == "warning: the observation budget is called alpha now\n"
    flags = parse_arguments(FinetuneConfig, ["--budget", "0.3"])
    assert flags.alpha == 0.3
    assert capsys.readouterr().err == "warning: --budget is called --alpha now\n"
