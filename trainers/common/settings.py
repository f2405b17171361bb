"""Settings of a command, read from its command line or from a run's ``config.json``. Both are
checked in the same way.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as type_hints

import tyro

from prunevit.cli import prog
from prunevit.envs.old_names import TRAINER_FLAGS, rename_flags, rename_observation
from prunevit.envs.rewards import LARGEST_NUMBER

# keeps counters, and numbers computed from them, within 64 bits
LARGEST_COUNT = 1_000_000_000
LARGEST_WIDTH = 65_536
LARGEST_SEED = 2**32 - 1
# if the system refuses more, the process dies without a message
MOST_THREADS = 1_024
MOST_WORKERS = 256
# settings of one process, not of the run: not written to config.json
NOT_SAVED = ("resume",)


def _parse_json_object(arguments: list[str]) -> dict[str, Any]:
    value = json.loads(arguments[0])
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object such as {{}}, got {arguments[0]}")
    try:
        # Python reads NaN, which isn't JSON; a game of NaN steps would never end
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(f"expected finite numbers, got {arguments[0]}") from None
    return value


JsonObject = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_parse_json_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of a number, as an annotation of a setting's type.

    Args:
        low: smallest value.
        high: largest value.
        open_low: whether ``low`` itself is excluded.
        open_high: whether ``high`` itself is excluded.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{x:g}" if isinstance(x, float) else str(x) for x in (self.low, self.high))
        low = f"greater than {low}" if self.open_low else f"at least {low}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {high}"


Count = Annotated[int, Range(1, LARGEST_COUNT)]
Widths = tuple[Annotated[int, Range(1, LARGEST_WIDTH)], ...]
Threads = Annotated[int, Range(1, MOST_THREADS)]
Workers = Annotated[int, Range(0, MOST_WORKERS)]
Seed = Annotated[int, Range(0, LARGEST_SEED)]
Positive = Annotated[float, Range(0, LARGEST_NUMBER, open_low=True)]
Weight = Annotated[float, Range(0, LARGEST_NUMBER)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, open_high=True)]


class Settings:
    """Base class of a command's settings: a dataclass whose fields all have defaults.

    ``to_json`` and ``from_json`` convert to and from what ``config.json`` holds.

    Attributes:
        LATER: settings that were added after 0.1.0, with values that keep the behaviour of its
            runs.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    LATER: ClassVar[Mapping[str, object]] = {}

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            problem = _problem(getattr(self, name), hint)
            if problem:
                raise ValueError(f"{name}={getattr(self, name)!r} {problem}")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
            if name not in NOT_SAVED
        }

    def defaults(self) -> dict[str, Any]:
        """What ``to_json`` returns for the default settings."""
        return type(self)().to_json()

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Self:
        """Settings as ``to_json`` wrote them.

        Raises:
            ValueError: a setting is unknown, is missing, or has a wrong type or value.
        """
        values = {**cls.LATER, **values}
        for name in NOT_SAVED:
            values.pop(name, None)
        hints = _hints(cls)
        unknown = sorted(values.keys() - hints.keys())
        missing = sorted(hints.keys() - values.keys() - {*NOT_SAVED})
        if unknown or missing:
            kinds = {"unknown settings": unknown, "missing settings": missing}
            raise ValueError(
                "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
            )
        return cls(**{name: _from_json(value, hints[name]) for name, value in values.items()})


def _hints(kind: type[Settings]) -> dict[str, Any]:
    hints = type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _from_json(value: Any, hint: Any) -> Any:
    """A JSON value as the setting's type: lists become tuples, strings become paths."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in (hint, *get_args(hint)):
        return Path(value)
    return value


def _problem(value: Any, hint: Any) -> str | None:
    """What is wrong with ``value`` for the annotation ``hint``, to follow it in a message."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [extra for extra in parts[1:] if isinstance(extra, Range)]
        outside = (f"must be {allowed}" for allowed in ranges if value not in allowed)
        return _problem(value, parts[0]) or next(outside, None)
    if origin in (UnionType, Union):
        problems = [_problem(value, part) for part in parts if part is not type(None)]
        return None if (value is None and type(None) in parts) or None in problems else problems[0]
    if origin is Literal:
        return None if value in parts else f"is unknown: choose from {', '.join(parts)}"
    if origin is tuple and isinstance(value, tuple):
        types = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(types) != len(value):
            return f"must have {len(types)} values"
        return next(filter(None, map(_problem, value, types)), None)
    wanted = origin or hint
    is_bool_for_number = wanted in (int, float) and isinstance(value, bool)
    if is_bool_for_number or not isinstance(value, (int, float) if wanted is float else wanted):
        return f"must be of type {wanted.__name__}"
    return None


S = TypeVar("S", bound=Settings)


def parse_arguments(
    kind: type[S],
    arguments: Sequence[str] | None,
    description: str | None = None,
    default: S | None = None,
) -> S:
    """Reads a command line. Old names are accepted with a warning on the standard error output.

    Args:
        kind: the settings.
        arguments: the arguments; the process's own if None.
        description: for the help; the docstring of ``kind`` if None.
        default: the settings if no arguments are given.
    """
    arguments = rename_flags(sys.argv[1:] if arguments is None else arguments, TRAINER_FLAGS)
    return tyro.cli(
        kind,
        args=rename_observation(arguments),
        prog=prog(),
        description=description,
        default=kind() if default is None else default,
    )
