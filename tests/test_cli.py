"""The command ``prunevit`` and its subcommands."""

import subprocess
import sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import prunevit
from prunevit.cli import COMMANDS, main

SETUP = Path(__file__).parents[1] / "setup.cfg"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"]])
def test_help_and_version_import_no_torch(arguments):
    code = (
        "import sys\nfrom prunevit.cli import main\nmain()\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_help_lists_every_command(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in shown
        assert command.summary in shown


def test_the_version_is_the_packages(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"prunevit {prunevit.__version__}\n"


def test_python_m_is_the_command():
    command = [sys.executable, "-m", "prunevit", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == f"prunevit {prunevit.__version__}\n"


@pytest.mark.skipif(not SETUP.is_file(), reason="needs the checkout")
def test_the_installed_script_is_this_command():
    config = ConfigParser()
    config.read(SETUP, encoding="utf-8")
    scripts = config["options.entry_points"]["console_scripts"].split("\n")
    assert [line for line in scripts if line] == ["prunevit = prunevit.cli:main"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_that_runs(name):
    spec = find_spec(COMMANDS[name].module)
    assert spec is not None
    assert 'if __name__ == "__main__":' in Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a command, or see prunevit --help"),
        (["trian"], "unknown command 'trian': did you mean train?"),
        (["finetune_"], "unknown command 'finetune_': did you mean finetune?"),
        (["???"], "unknown command '???': see prunevit --help"),
        (["--verbose"], "unknown command '--verbose': see prunevit --help"),
    ],
)
def test_what_is_no_command_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"prunevit: {message}\n"


# its module was imported by other tests before
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
def test_a_command_gets_the_rest_of_the_arguments_and_gives_its_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prunevit", "train", "--seed", "no number"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--seed" in said
    assert "prunevit train --help" in said
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", "no-such-run"])
    # a message as the code is one line on stderr and exit code 1
    assert ended.value.code == "error: no-such-run is no run: it has no config.json"
