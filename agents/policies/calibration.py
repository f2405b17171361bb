"""``Calibration``: which setting of a learned policy costs which share of the dense compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Knob = Literal["alpha", "threshold"]
MOST_POINTS = 100  # that a file may hold; a dozen are usual


@dataclass(frozen=True)
class Calibration:
    """The compute of a policy as it was measured at some settings; those between are interpolated.

    Args:
        knob: what was set: "alpha", or "threshold" of a policy that doesn't observe alpha.
        values: of the knob, rising.
        compute: mean share of the dense multiply-accumulates at each, policy included, falling.
        dither: whether the policy dithered.

    Raises:
        ValueError: the values are out of order or range, or fewer than two.
    """

    knob: Knob
    values: tuple[float, ...]
    compute: tuple[float, ...]
    dither: bool

    def __post_init__(self) -> None:
        high = 1.0 if self.knob == "threshold" else math.inf
        in_order = all(
            len(numbers) == len(self.values) and np.all(np.diff(numbers) > 0)
            for numbers in (self.values, self.compute[::-1])
        )
        if (
            self.knob not in ("alpha", "threshold")
            or not 2 <= len(self.values) <= MOST_POINTS
            or not in_order
            or not 0 < self.values[0] < self.values[-1] < high
            or not 0 < self.compute[-1] < self.compute[0] < math.inf
        ):
            raise ValueError(f"{self} is no calibration")

    @property
    def lowest(self) -> float:
        """The lowest compute that can be set."""
        return self.compute[-1]

    @property
    def highest(self) -> float:
        """The highest compute that can be set."""
        return self.compute[0]

    def value_at(self, compute: float) -> float:
        """The knob's value that costs ``compute``, a share of the dense compute.

        Raises:
            ValueError: the policy can't cost that.
        """
        if not self.lowest <= compute <= self.highest:
            raise ValueError(
                f"compute={compute}: with this policy the model takes {self.lowest:.3f} to "
                f"{self.highest:.3f} of the dense compute"
            )
        scaled = np.interp(compute, self.compute[::-1], self._scaled(self.values)[::-1])
        return float(1 / (1 + np.exp(-scaled)) if self.knob == "threshold" else np.exp(scaled))

    def compute_at(self, value: float) -> float | None:
        """What ``value`` of the knob costs; None outside of what was measured."""
        if not self.values[0] <= value <= self.values[-1]:
            return None
        scaled = self._scaled((value,))[0]
        return float(np.interp(scaled, self._scaled(self.values), self.compute))

    def _scaled(self, values: Sequence[float]) -> Any:
        """The scale on which the knob is interpolated: log alpha, or the threshold's logit."""
        numbers = np.asarray(values)
        return np.log(numbers / (1 - numbers) if self.knob == "threshold" else numbers)

    def to_json(self) -> dict[str, Any]:
        """The calibration as JSON values."""
        return {
            "knob": self.knob,
            "values": list(self.values),
            "compute": list(self.compute),
            "dither": self.dither,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """What ``to_json`` returned.

        Raises:
            ValueError: the values are damaged.
        """
        try:
            set_to, compute = (tuple(map(float, values[name])) for name in ("values", "compute"))
            return cls(values["knob"], set_to, compute, bool(values["dither"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{values} is no calibration") from error
