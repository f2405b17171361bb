"""The README's commands, and those of the pages in docs/, name programs and flags that exist."""

import re
import shlex
import sys
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from textwrap import indent

import pytest
import tyro

from prunevit.cli import COMMANDS

ROOT = Path(__file__).parents[1]
EXTRAS = {"trainers.rllib": "rllib", "trainers.benchmarl": "benchmarl"}
# flags of EPyMARL, of timm's scripts, of examples/, of what EXTRAS has, and of every program
OTHER_FLAGS = {
    "--config", "--env-config", "--torchcompile", "--kill", "--queue", "--timeout", "--algorithm",
    "--help",
}  # fmt: skip
# what a reader puts in is given here where not any text will do
PLACEHOLDERS = {"$M": "deit_small_patch16_224", "S": "0", "yours": "norm"}
FOLDERS = ("agents", "benchmarks", "trainers")  # of programs
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the checkout")


def pages():
    return [*ROOT.glob("README.md"), *sorted((ROOT / "docs").rglob("*.md"))]


def lines_of(text):
    """What a page has to be typed into a shell: lines of code, and code within its prose."""
    text = re.sub(r"```bash\n(.*?)```", lambda code: indent(code[1], "    "), text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE):
        begun = ""
        for line in block.splitlines():
            line = re.sub(r"(^| )# .*", "", line)
            begun += line.removesuffix("\\") + " "
            if not line.endswith("\\") and begun.count("'") % 2 == 0:
                yield begun
                begun = ""
        assert not begun, block
    for code in re.findall(r"`((?:python -m|prunevit) [^`]+)`", text):
        yield " ".join(code.split())


def calls_of(line):
    """The programs of ours that a line calls: module and arguments."""
    for call in line.split(" && "):
        match shlex.split(call):
            case ["python", "-m", module, *arguments] if module.startswith(FOLDERS):
                yield module, arguments
            case ["prunevit", name, *arguments] if not name.startswith("-"):
                yield COMMANDS[name].module.removeprefix("prunevit."), arguments
            case ["torchrun", *rest]:
                name, *arguments = rest[rest.index("--") + 1 :]
                yield name.removeprefix("prunevit."), arguments


@cache
def documented():
    """All calls, with the page that each was found on first."""
    found = {}
    for page in pages():
        for line in lines_of(page.read_text("utf-8")):
            for module, arguments in calls_of(line):
                known = [PLACEHOLDERS.get(word, word) for word in arguments]
                found.setdefault((module, *known), page.stem)
    return found


def programs():
    """Modules of programs, as parameters."""
    for name in sorted({module for module, *_ in documented()}):
        marks = [pytest.mark.integration(EXTRAS[name])] if name in EXTRAS else []
        yield pytest.param(name, marks=marks, id=name)


class ParsedError(BaseException):
    """A command line was understood; no program catches this."""


@pytest.fixture
def parsed(monkeypatch):
    """The kinds of settings that programs have read since; none goes on from there."""
    parse, kinds = tyro.cli, []

    def parse_and_stop(kind, **options):
        kinds.append(kind)
        parse(kind, **options)
        raise ParsedError

    monkeypatch.setattr(tyro, "cli", parse_and_stop)
    return kinds


@pytest.mark.parametrize("module", list(programs()))
def test_commands_of_the_pages_are_understood(module, parsed, monkeypatch, capsys):
    main = import_module(f"prunevit.{module}").main
    for (name, *arguments), page in documented().items():
        if name != module or arguments == ["--help"]:
            continue
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            main()
        except ParsedError:
            assert capsys.readouterr().err == "", page  # old names of flags are warned of
        except SystemExit as ended:
            pytest.fail(f"{page}: {name} {shlex.join(arguments)}: {ended}{capsys.readouterr().err}")


def test_flags_that_pages_name_exist(parsed, monkeypatch):
    ours = {command.module.removeprefix("prunevit.") for command in COMMANDS.values()}
    for module in (ours | {module for module, *_ in documented()}) - set(EXTRAS):
        monkeypatch.setattr(sys, "argv", [module])
        with pytest.raises((ParsedError, SystemExit)):
            import_module(f"prunevit.{module}").main()
    names = {field.name.replace("_", "-") for kind in parsed for field in fields(kind)}
    known = {f"--{prefix}{name}" for prefix in ("", "no-") for name in names} | OTHER_FLAGS
    for page in pages():
        for code in re.findall(r"`(--[^`]+)`", page.read_text("utf-8")):
            named = set(re.findall(r"(?<!\S)--[a-z][\w-]*", code))
            assert named <= known, f"{page.stem}: {code}"
