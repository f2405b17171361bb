"""Who imports whom: no circle, and arrows in one direction only."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("envs", "agents", "trainers", "benchmarks")  # each may import those before it


@cache
def imports():
    """What each module of the package imports from it, anywhere in its file, lazily too."""
    files = [path for folder in ("prunevit", *LAYERS) for path in (ROOT / folder).rglob("*.py")]
    modules = {module_name(path): path for path in files}
    graph = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} imports relatively"
                for alias in node.names:
                    below = f"{node.module}.{alias.name}"
                    found.add(below if below in modules else node.module)
        graph[name] = (found & set(modules)) - {name}
    return graph


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "prunevit" else ("prunevit", *parts))


def circle(graph):
    """The modules of a circle in ``graph``, in order; none if it has no circle."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for imported in sorted(graph.get(module, ())):
            if found := visit(imported):
                return found
        path.pop()
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module))), [])


def inside(module, folder):
    return f"{module}.".startswith(f"prunevit.{folder}.")


def arrows(source, target):
    """Imports of modules in ``target`` by modules in ``source``."""
    return [
        f"{module} imports {imported}"
        for module, found in imports().items()
        if inside(module, source)
        for imported in sorted(found)
        if inside(imported, target)
    ]


def test_circles_are_found():
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_imports_are_read():
    assert "prunevit.envs.game" in imports()["prunevit.envs.batched.token_prune"]
    assert len(imports()) > 50


def test_no_circle():
    assert {"prunevit", "prunevit.cli"} <= set(imports())
    assert not circle(imports())


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(low, high) for i, low in enumerate(LAYERS) for high in LAYERS[i + 1 :]],
)
def test_layers_import_those_below_only(lower, upper):
    assert not arrows(lower, upper)


@pytest.mark.parametrize("folder", ["envs.vit", "envs.data"])
def test_the_runtime_and_the_images_know_nothing_of_the_game(folder):
    known = {folder, "envs.old_names"}
    others = [
        arrow
        for arrow in arrows(folder, "envs")
        if not any(inside(arrow.rpartition(" ")[2], name) for name in known)
    ]
    assert not others


def test_the_rest_of_envs_knows_nothing_of_the_adapters():
    found = arrows("envs", "envs.adapters")
    assert not [arrow for arrow in found if not inside(arrow.split()[0], "envs.adapters")]


def at_import(tree):
    """The modules that are imported with a module: not those in functions, or for types alone."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from at_import(ast.Module(node.orelse, []))
        elif isinstance(node, ast.If | ast.With | ast.Try):
            yield from at_import(node)
            yield from at_import(ast.Module(getattr(node, "orelse", []), []))


@pytest.mark.parametrize("folder", ["prunevit", "envs", "agents", "trainers"])
def test_the_extra_train_is_imported_where_it_is_used_only(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for module in at_import(ast.parse(path.read_text(encoding="utf-8"))):
            assert module.partition(".")[0] not in ("matplotlib", "tensorboard"), path
            assert not module.startswith("torch.utils.tensorboard"), path
