"""Part of `evaluate`: how the report writes numbers; a missing one is a dash."""

from __future__ import annotations

from collections.abc import Sequence


def number_text(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def percent_text(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} %".replace("-", "−")


def interval_text(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "–"
    return f"{100 * interval[0]:+.1f} … {100 * interval[1]:+.1f}".replace("-", "−")


def scaled_text(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 4.27 M, 17.1 MB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def listed_text(numbers: Sequence[float]) -> str:
    """1, 2.5, 1024"""
    return ", ".join(f"{number:.6g}" for number in numbers)
