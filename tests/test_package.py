"""What is installed: names, commands, types and weights."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import prunevit
from prunevit.agents import pruned_vit, pruning
from prunevit.envs.token_prune import TokenPruneEnv
from prunevit.extras import is_installed
from prunevit.trainers.common.config import MappoConfig
from prunevit.versions import version_of

ROOT = Path(__file__).parents[1]
BEFORE = ROOT / "tests" / "fixtures" / "before-0.2"
PACKAGES = ("envs", "agents", "trainers", "benchmarks")
IN_CHECKOUT = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="needs the checkout")


def python(*arguments, cwd, env=None):
    # help as wide as its longest line
    environment = os.environ | {"COLUMNS": "300"} | (env or {})
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def check(ended):
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# --- names ---


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, prunevit\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)\n"
        "assert {'prune', 'PrunedViT', 'TokenPruneEnv', '__version__'} <= set(dir(prunevit))\n"
    )
    check(python("-c", code, cwd=ROOT))


def test_the_package_offers_what_most_need():
    assert prunevit.PrunedViT is pruned_vit.PrunedViT
    assert prunevit.prune is pruning.prune
    assert prunevit.TokenPruneEnv is TokenPruneEnv
    with pytest.raises(AttributeError, match=r"^module 'prunevit' has no attribute 'nothing'$"):
        prunevit.nothing  # noqa: B018 - asking is what fails


@IN_CHECKOUT
def test_the_version_is_written_in_one_place():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["metadata"]["version"] == "attr: prunevit.versions.__version__"
    assert version_of("prunevit") == prunevit.__version__
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {prunevit.__version__}\n" in cited


def test_foreign_packages_of_the_same_names_do_not_clash(tmp_path):
    """Folders named as those of our checkout, and the distribution tokenprune, which on PyPI is
    another project.
    """
    for name in (*PACKAGES, "tokenprune"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"mine = 'foreign {name}'\n")
    metadata = tmp_path / "tokenprune-9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenprune\nVersion: 9.0\n")
    code = (
        "import tokenprune, prunevit\n"
        "from importlib.metadata import version\n"
        "from prunevit import PrunedViT\n"
        "from prunevit.envs import TokenPruneEnv\n"
        "from prunevit.trainers.common.config import MappoConfig\n"
        "from prunevit.versions import version_of\n"
        "import prunevit.benchmarks\n"
        "import agents, benchmarks, envs, trainers\n"
        "assert version('tokenprune') == '9.0'\n"
        "assert version_of('prunevit') == prunevit.__version__\n"
        f"model = PrunedViT.from_pretrained({str(BEFORE / 'topk')!r})\n"
        "assert not hasattr(envs, 'TokenPruneEnv')\n"
        "print(TokenPruneEnv.__module__, PrunedViT.__module__)\n"
        "for each in agents, benchmarks, envs, tokenprune, trainers:\n    print(each.mine)\n"
    )
    modules, *shown = check(python("-c", code, cwd=tmp_path)).splitlines()
    assert modules == "prunevit.envs.token_prune prunevit.agents.pruned_vit"
    assert shown == [f"foreign {name}" for name in sorted((*PACKAGES, "tokenprune"))]


def imports(file):
    """Modules that ``file`` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            yield node.module


def sources():
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield package, file


@IN_CHECKOUT
def test_code_imports_by_the_installed_names_and_one_way_only():
    assert {package for package, _ in sources()} == set(PACKAGES)
    for package, file in sources():
        for module in imports(file):
            top, _, rest = module.partition(".")
            assert top not in PACKAGES, f"{file} imports {module}"
            if top == "prunevit":
                imported = rest.partition(".")[0]
                # these import none of the folders
                if imported in ("", "choices", "cli", "extras", "progress", "versions"):
                    continue
                # benchmarks -> trainers -> agents -> envs
                assert PACKAGES.index(imported) <= PACKAGES.index(package), f"{file}: {module}"


# --- versions ---


def requirements(extra):
    """Of an extra, those of other extras that it names included; "" for the core's."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    if extra:
        text = config["options.extras_require"][extra]
    else:
        text = config["options"]["install_requires"]
    for line in filter(None, text.splitlines()):
        ours = re.fullmatch(r"prunevit\[(.+)\]", line)
        yield from requirements(ours[1]) if ours else [line]


@IN_CHECKOUT
def test_the_lowest_versions_are_the_floors():
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    floors = dict(line.split(">=") for line in [*requirements(""), *requirements("test")])
    assert pinned == floors


# --- commands, and names, in the checkout ---

# by the command, what it says to arguments that make no sense
MISTAKES = {
    "trainers.mappo": (["--resume", "nope"], "error: nope is no run: it has no config.json"),
    "trainers.backbone": (["--dataset", "nope"], "error: unknown dataset 'nope'"),
    "trainers.finetune": (["--run", "nope"], "error: nope holds no finished run"),
    "trainers.sb3": (["--reward", "nope"], "error: "),
    "trainers.dynamic_vit": (["--dataset", "nope"], "error: unknown dataset 'nope'"),
    "trainers.straight_through": (["--dataset", "nope"], "error: unknown dataset 'nope'"),
}
# what the folders offer that is not the same object as what is installed; and what commands print
# and end with
IN_ONE_PROCESS = """
import agents, benchmarks, envs, trainers
import contextlib, importlib, io, json, runpy, sys

def different(folder):
    package = importlib.import_module(f"prunevit.{folder.__name__}")
    assert folder.__all__ == package.__all__
    return [name for name in folder.__all__ if getattr(folder, name) is not getattr(package, name)]

def ending(command, arguments):
    sys.argv = [command, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            return printed.getvalue(), ended.code

commands = json.loads(sys.argv[1])
print(json.dumps([different(envs) + different(agents), [ending(*each) for each in commands]]))
"""


@pytest.fixture(scope="module")
def in_checkout():
    """What ``IN_ONE_PROCESS`` says, of --help and ``MISTAKES``; and its stderr."""
    commands = [("trainers.mappo", ["--help"]), ("prunevit.trainers.mappo", ["--help"])]
    commands += [(command, arguments) for command, (arguments, _) in MISTAKES.items()]
    ended = python("-c", IN_ONE_PROCESS, json.dumps(commands), cwd=ROOT, env={"PYTHONPATH": ""})
    return *json.loads(check(ended)), ended.stderr


@IN_CHECKOUT
def test_both_names_in_the_checkout_are_the_same_classes(in_checkout):
    assert in_checkout[0] == []


def default_of(name, text):
    return re.search(rf" --{name} .*?\(default: (.*?)\)", " ".join(text.split()))[1]


@IN_CHECKOUT
def test_both_ways_to_call_the_main_command_are_one(in_checkout):
    (checkout, code), (installed, same_code), *_ = in_checkout[1]
    assert code == same_code == 0
    assert checkout.startswith("usage: python -m trainers.mappo ")
    assert installed.startswith("usage: python -m prunevit.trainers.mappo ")
    assert checkout.split()[4:] == installed.split()[4:]
    for name in ("env", "critic", "iterations", "gamma", "lr"):
        assert default_of(name, installed) == str(getattr(MappoConfig(), name))


@IN_CHECKOUT
def test_errors_of_commands_in_the_checkout_are_one_line(in_checkout):
    _, (_, _, *said), stderr = in_checkout
    assert stderr == ""
    for (shown, code), (_, message) in zip(said, MISTAKES.values(), strict=True):
        assert shown == ""
        assert code.startswith(message)
        assert "\n" not in code


# --- what lies in the package ---


@IN_CHECKOUT
@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def files_in(folder):
    """The names of a folder's files, and of those in its folders, from ``ROOT`` on."""
    files = (file for file in (ROOT / folder).rglob("*") if file.is_file())
    return {str(file.relative_to(ROOT)) for file in files if file.parent.name != "__pycache__"}


@IN_CHECKOUT
@pytest.mark.stress
def test_an_sdist_brings_the_tests_and_its_wheel_what_is_used(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    # a copy: a build leaves things behind
    texts = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"}
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", *texts):
        shutil.copy(ROOT / name, source)
    for folder in ("prunevit", *PACKAGES, "tests", "examples"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    code = "from setuptools import build_meta; build_meta.build_sdist('..')"
    check(python("-c", code, cwd=source))
    (archive,) = tmp_path.glob("prunevit-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    in_sdist = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*")}
    assert texts | files_in("tests") | files_in("examples") <= in_sdist
    assert "benchmarks/results" not in in_sdist

    arguments = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path)]
    check(python("-m", "pip", "wheel", *arguments, str(unpacked), cwd=tmp_path))
    (wheel,) = tmp_path.glob("prunevit-*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"prunevit/{package}/py.typed" for package in PACKAGES} | {"prunevit/py.typed"}
    expected |= {f"prunevit/{file.name}" for file in (ROOT / "prunevit").glob("*.py")}
    expected |= {f"prunevit/{file.relative_to(ROOT)}" for _, file in sources()}
    held = files_in("envs/assets") | files_in("agents/assets") | files_in("agents/viewer/samples")
    assert expected | {f"prunevit/{file}" for file in held} <= files
    assert any(file.endswith("/LICENSE") for file in files)
    top = {file.split("/")[0] for file in files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"prunevit"}
    assert not any(file.startswith("prunevit/benchmarks/results") for file in files)


def test_folders_that_a_removed_package_left_are_no_package(tmp_path, monkeypatch):
    (tmp_path / "was_here_once" / "__pycache__").mkdir(parents=True)
    (tmp_path / "is_here.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("was_here_once") is not None
    assert [is_installed(name) for name in ("was_here_once", "is_here", "never_was")] == [
        False, True, False,
    ]  # fmt: skip
