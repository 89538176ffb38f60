"""Part of `plan`: bytes, times and prices in words; three digits, because they are estimates."""

from __future__ import annotations


def bytes_in_words(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def price_in_words(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:,.2f}" if amount < 1000 else f"{amount:,.0f}"


def time_in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"
