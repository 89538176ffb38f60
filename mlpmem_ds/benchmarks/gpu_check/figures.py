"""What a step of the GPU check measures: figures with goals, reported as soon as they are there.

A step that is cut off has reported all that it had measured by then.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mlpmem_ds.core.log import append_json_line, read_json_lines


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a step.

    Attributes:
        goal: what it should be, `direction`; None = it is only said.
        is_speed: whether it depends on the machine and the sizes: then a rehearsal does not judge it.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    direction: Literal["at most", "at least"] = "at most"
    is_speed: bool = True

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached; a NaN reaches none."""
        if self.goal is None:
            return True
        return self.value <= self.goal if self.direction == "at most" else self.value >= self.goal

    def __str__(self) -> str:
        said = f"{self.name} {self.value:.4g} {self.unit}".rstrip()
        return said if self.goal is None else f"{said} ({self.direction} {self.goal:g})"


class Reporter:
    """Appends figures to a file, a line of JSON each.

    Args:
        path: the file.
        is_rehearsal: goals that depend on the machine are dropped.
    """

    def __init__(self, path: Path, *, is_rehearsal: bool) -> None:
        self._path, self._is_rehearsal = path, is_rehearsal

    def speed(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """A figure of this machine; its goal counts at the full sizes alone."""
        self._write(name, value, unit, at_most, at_least, is_speed=True)

    def fact(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """A figure that must be right at any size: a difference, a count, 1 for yes."""
        self._write(name, value, unit, at_most, at_least, is_speed=False)

    def _write(
        self,
        name: str,
        value: float,
        unit: str,
        at_most: float | None,
        at_least: float | None,
        *,
        is_speed: bool,
    ) -> None:
        goal = at_least if at_most is None else at_most
        if is_speed and self._is_rehearsal:
            goal = None
        figure = Figure(
            name=name,
            value=float(value),
            unit=unit,
            goal=goal,
            direction="at least" if at_most is None else "at most",
            is_speed=is_speed,
        )
        append_json_line(self._path, asdict(figure))


def read_figures(path: Path) -> list[Figure]:
    """The figures that a step reported, without a line that a kill cut short."""
    figures = []
    for values in read_json_lines(path):
        with contextlib.suppress(TypeError):
            figures.append(Figure(**values))
    return figures


def as_json(figure: Figure) -> dict[str, object]:
    """Its entry in the JSON; a number that is not finite is null there."""
    value = figure.value if math.isfinite(figure.value) else None
    return {**asdict(figure), "value": value, "passed": figure.is_met}
