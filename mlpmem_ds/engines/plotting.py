"""The owner of matplotlib: figures without a display, as PNG files; the same numbers give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, by matplotlib's object interface: no global state, no display."""
    # Imported late: it takes a second, which only the rank that draws pays.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: Path, *, dpi: int = 120) -> None:
    """Write the figure; matplotlib's version is not in the file, so that it depends on the picture alone."""
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})
