"""Versions of packages, for what is written into saved models, runs and records."""

from __future__ import annotations

from importlib.metadata import version

from prunevit import __version__


def version_of(package: str) -> str:
    """The version of an installed package, or of prunevit itself, which may also be an uninstalled
    checkout.
    """
    return __version__ if package == "prunevit" else version(package)
