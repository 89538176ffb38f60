"""Part of `train` and `train_base`: the curves of metrics.jsonl as one picture, OUTPUT/curves.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlpmem_ds.core.files import publish
from mlpmem_ds.engines.plotting import new_figure, save_png
from mlpmem_ds.stages.training.metrics import read_metrics

# Title of a panel → (metric, label) of its lines; a panel without any of its metrics is left out.
_PANELS: dict[str, tuple[tuple[str, str], ...]] = {
    "loss (nats)": (("loss", "loss"), ("kl", "KL(kNN || memory)"), ("ce", "cross entropy")),
    "perplexity on the tuning split": (
        ("validation_base_perplexity", "base"),
        ("validation_memory_perplexity", "memory"),
        ("validation_perplexity", "best interpolation"),
    ),
    "gradient norm": (("gradient_norm", "before clipping"),),
    "learning rate": (("learning_rate", "learning rate"),),
}


def draw_curves(output: Path) -> bool:
    """Draw OUTPUT/curves.png; False where there is nothing to draw."""
    lines = read_metrics(output)
    panels = {
        title: [(label, points) for name, label in names if (points := _points(lines, name))]
        for title, names in _PANELS.items()
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return False
    figure = new_figure(10, 3 * ((len(panels) + 1) // 2))
    for number, (title, curves) in enumerate(panels.items(), start=1):
        axes: Any = figure.add_subplot((len(panels) + 1) // 2, 2, number)
        for label, points in curves:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="." if len(points) < 20 else None, linewidth=1
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=8)
    with publish(output / "curves.png") as path:
        save_png(figure, path, dpi=110)
    return True


def _points(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]
