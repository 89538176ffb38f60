"""A measure of `bench scale`: one number, counted, with its goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number that says whether a part of the system holds at a cluster's size.

    Attributes:
        name: its key in the JSON.
        function: gives the number. It gets an empty directory, which is removed afterwards; its other
            parameters have the sizes that the name promises as defaults, so that a test can take tiny ones.
        goal: what the number should be, `direction`.
        meaning: a line on what was counted, and at which sizes.
    """

    name: str
    function: Callable[[Path], float]
    goal: float
    direction: Literal["at most", "at least", "exactly"]
    meaning: str

    def is_met_by(self, value: float) -> bool:
        """Whether the goal is reached; never by a NaN."""
        return {
            "at most": value <= self.goal,
            "at least": value >= self.goal,
            "exactly": value == self.goal,
        }[self.direction]

    def describe(self, value: float) -> dict[str, Any]:
        """Its entry in the JSON's block of goals."""
        return {
            "goal": self.goal,
            "direction": self.direction,
            "passed": self.is_met_by(value),
            "meaning": self.meaning,
        }
