"""Optional dependencies: whether one is there, and the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


def install_command(extra: str) -> str:
    """The command that installs the extra ``extra``, run in a checkout."""
    return f"pip install -e '.[{extra}]'"


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of an optional dependency: its absence is reported with its extra.

    Raises:
        ImportError: a module is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is missing. It comes with the extra {extra!r}. In a checkout of "
            f"prunevit: {install_command(extra)}",
            name=error.name,
        ) from error


def is_installed(package: str) -> bool:
    """Whether a top-level package is there. Folders that its removal left behind don't count,
    although Python takes them for a namespace package.
    """
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
