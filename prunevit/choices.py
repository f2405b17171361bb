"""``check_choice``: refuses names that are none of those that there are."""

from __future__ import annotations

from collections.abc import Iterable


def check_choice(
    what: str, name: object, choices: Iterable[str], error: type[ValueError] = ValueError
) -> None:
    """Raises ``error``, which lists the ``choices``, if ``name`` is none of them."""
    if name not in (known := tuple(choices)):
        raise error(f"unknown {what} {name!r}: choose from {', '.join(known)}")
