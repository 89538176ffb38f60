"""Made-up results, to see what the page makes of them."""

from __future__ import annotations

from typing import Any

from mlpmem_ds.benchmarks.quality.results import ArmRow, QualityResult, RatioResult, TextResult


def in_one_line(text: str) -> str:
    """Without line breaks, which lie where the width of the page has them."""
    return " ".join(text.split())


def make_row(arm: str, ppl: float, **changes: Any) -> ArmRow:
    fields: dict[str, Any] = {
        "description": f"what {arm} is",
        "seeds": 3,
        "ppl_by_seed": (ppl, ppl, ppl),
        "change": ppl / 20 - 1,
        "interval": (ppl / 20 - 1.02, ppl / 20 - 0.98),
        "bits_per_byte": 1.5,
        "calibration_error": 0.01,
        "lambdas": (0.3, 0.35, 0.3),
        "other_change": 0.004,
        "other_interval": (0.001, 0.006),
        "parameters": 2_000_000,
        "tokens": 300_000,
        "seconds": 61.0,
        "epochs_used_up": (),
    }
    return ArmRow(arm=arm, ppl=ppl, **(fields | changes))


def make_ratio(name: str, value: float, *, is_met: bool, is_clear: bool) -> RatioResult:
    return RatioResult(
        name=name,
        text="domain",
        value=value,
        interval=(value - 0.1, value + 0.1),
        by_seed=(value, value, value),
        goal="at least 1",
        is_met=is_met,
        is_clear=is_clear,
        meaning=f"what {name} means",
    )


def make_result(preset: str = "tiny", **changes: Any) -> QualityResult:
    """Base 20, kNN 18, memory 17, the base trained on 16: the memory loses to it."""
    base = make_row("base", 20.0, change=None, interval=None, lambdas=(), seeds=1, seconds=0.0)
    rows = (
        base,
        make_row("base+knn_exact", 18.0, seeds=1, other_change=None, other_interval=None),
        make_row("base+memory", 17.0),
        make_row("continued", 16.0, lambdas=(), other_change=0.3, other_interval=(0.2, 0.4)),
    )
    text = TextResult(
        name="domain",
        title="a manual",
        positions={"train": 1000, "tuning": 200, "test": 300},
        documents=12,
        other="books",
        rows=rows,
    )
    fields: dict[str, Any] = {
        "date": "2026-01-02",
        "machine": "a processor, 2 cores",
        "versions": {"torch": "2"},
        "settings": {"preset": preset},
        "seeds": (0, 1, 2),
        "left_out": ("lora",),
        "base": "a small model",
        "texts": (text,),
        "ratios": (
            make_ratio("recovered_share", 1.5, is_met=True, is_clear=True),
            make_ratio("memory_ppl_over_continued_training", 0.4, is_met=False, is_clear=True),
            make_ratio("memory_gain_over_ce_only_gain", 1.05, is_met=True, is_clear=False),
        ),
        "questions": (),
        "job_seconds": {"base": 60.0, "domain/keys": 30.0},
    }
    return QualityResult(preset=preset, **(fields | changes))
