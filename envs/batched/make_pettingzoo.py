"""``make_pettingzoo``: finds a PettingZoo environment by name."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import Any

from pettingzoo import ParallelEnv

from prunevit.extras import install_command

EXTRAS = {"mpe2": "mpe2"}  # our extra that installs an environment's top-level package


def make_pettingzoo(name: str, **kwargs: Any) -> Callable[[], ParallelEnv]:
    """Finds the factory of an environment by name.

    Args:
        name: a module with a ``parallel_env``, such as "mpe2.simple_spread_v3" or
            "pettingzoo.sisl.pursuit_v5", or "module:factory" if the factory has another name.
        kwargs: arguments of the factory.

    Returns:
        a function that makes one environment.

    Raises:
        ModuleNotFoundError: there is no such module. The message says what to install, or which
            environments exist.
        ValueError: the module has no such factory.
    """
    module_name, _, attribute = name.partition(":")
    module = _import(module_name)
    factory = getattr(module, attribute or "parallel_env", None)
    if not callable(factory):
        raise ValueError(
            f"module {module_name!r} has no callable {attribute or 'parallel_env'!r}; name another "
            f"factory as '{module_name}:factory'"
        )
    return functools.partial(factory, **kwargs)


def _import(module_name: str) -> Any:
    if not re.fullmatch(r"\w+(\.\w+)*", module_name):
        raise ValueError(f"{module_name!r} is no module name, such as mpe2.simple_spread_v3")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        parent = missing.rpartition(".")[0]
        if parent and f"{module_name}.".startswith(f"{missing}."):
            paths = getattr(importlib.import_module(parent), "__path__", [])
            known = [m.name for m in pkgutil.iter_modules(paths) if re.search(r"_v\d+$", m.name)]
            advice = f"{parent} has {', '.join(known) or 'no environments'}"
        else:
            top, *below = module_name.split(".")
            if top == "pettingzoo" and below:
                advice = f"pip install 'pettingzoo[{below[0]}]'"
            elif top in EXTRAS:
                advice = install_command(EXTRAS[top])
            else:
                advice = f"install what provides {missing!r}"
        raise ModuleNotFoundError(
            f"environment {module_name!r} needs module {missing!r}, which is not there: {advice}",
            name=missing,
        ) from error
