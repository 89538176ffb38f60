"""Lines of metrics.jsonl, also where the file was cut short or damaged."""

from __future__ import annotations

import json
from pathlib import Path

from mlpmem_ds.stages.training.curves import draw_curves
from mlpmem_ds.stages.training.metrics import read_metrics


def test_lines_that_are_cut_short_or_have_lost_their_step_are_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == [] and not draw_curves(tmp_path)
    lines = [{"step": 10, "loss": 2.5}, {"s4ep": 20, "loss": 2.25}, {"step": 30, "loss": 2.0}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 40, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_metrics(tmp_path) == [lines[0], lines[2]]
    assert draw_curves(tmp_path)  # a training that goes on draws them again
