"""The version of prunevit, and those of packages, for saved models, runs and records.

It imports nothing of prunevit, so every module can import it.
"""

from __future__ import annotations

from importlib.metadata import version

__version__ = "0.2.0"


def version_of(package: str) -> str:
    """The version of an installed package, or of prunevit itself, which may also be an uninstalled
    checkout.
    """
    return __version__ if package == "prunevit" else version(package)
