"""The text format, by a strict reader of ours, and by Prometheus' own where it is installed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mlpmem_ds.stages.inspection.progress import LastError
from mlpmem_ds.stages.inspection.prometheus import exposition

from .test_screen import rank, stage

STRANGE = 'a "b" \\ c\nd'
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\n"])*)"'


def text() -> str:
    error = LastError(time=12.5, rank=3, code=2, message="m")
    stages = [
        stage(),
        replace(
            stage(), name=STRANGE, state="failed", error=error, per_second=None, slowest=None, total=None
        ),
        replace(stage(), name="keys", state="complete", ranks=(rank(0, "finished"),)),
    ]
    return exposition(stages, run="demo", disk_bytes=10**12, free_bytes=10**9, time=1764400000.25)


def parsed(content: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Metric → labels → value; every line must be HELP, then TYPE, then samples of that metric alone."""
    assert content.endswith("\n")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    lines = iter(content.split("\n")[:-1])
    name = ""
    for line in lines:
        if line.startswith("#"):
            help_line = re.fullmatch(rf"# HELP ({_NAME}) ((?:[^\\\n]|\\[\\n])+)", line)
            assert help_line, line
            name = help_line[1]
            assert re.fullmatch(rf"# TYPE {name} (gauge|counter)", next(lines)) and name not in found
            found[name] = {}
            continue
        sample = re.fullmatch(rf"({_NAME})\{{((?:{_LABEL},?)*)\}} (\S+)", line)
        assert sample and sample[1] == name, line
        labels = tuple(
            (label, re.sub(r"\\(.)", lambda part: "\n" if part[1] == "n" else part[1], value))
            for label, value in re.findall(_LABEL, sample[2])
        )
        assert labels not in found[name], "a sample stands twice"
        found[name][labels] = float(line.rpartition(" ")[2])
    return found


def value(found: dict, name: str, stage_name: str, **more: str) -> float | None:
    return found[name].get((("run", "demo"), ("stage", stage_name), *more.items()))


def test_every_figure_is_there_by_the_rules_of_the_format() -> None:
    found = parsed(text())
    assert value(found, "mlpmem_stage_units_done", "targets") == 1200
    assert value(found, "mlpmem_stage_units", "targets") == 4800
    assert value(found, "mlpmem_stage_units_per_second", "targets") == 0.5
    assert value(found, "mlpmem_stage_left_seconds", "targets") == 7200
    assert value(found, "mlpmem_stage_slowest_rank_ratio", "targets") == 2.53
    assert value(found, "mlpmem_stage_ranks", "targets", state="silent") == 1
    assert value(found, "mlpmem_stage_complete", "keys") == 1
    assert value(found, "mlpmem_stage_failed", STRANGE) == 1
    assert value(found, "mlpmem_stage_last_error_timestamp_seconds", STRANGE) == 12.5
    assert value(found, "mlpmem_stage_units", STRANGE) is None  # not known: no sample
    assert found["mlpmem_disk_free_bytes"] == {(("run", "demo"),): 1e9}


def test_names_follow_the_conventions() -> None:
    """Base units, `_total` on counters alone, no reserved ends: what promtool checks."""
    for name in parsed(text()):
        assert name.startswith("mlpmem_")
        assert not re.search(r"_(total|count|sum|bucket|info)$", name)
        assert not re.search(r"(milli|minutes|hours|kilo|mega|giga)", name)


def test_prometheus_reads_it() -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    families = {family.name: family for family in parser.text_string_to_metric_families(text())}
    own = parsed(text())
    assert set(families) == set(own)
    for name, family in families.items():
        assert family.type == "gauge" and family.documentation
        assert {tuple(sorted(sample.labels.items())): sample.value for sample in family.samples} == {
            tuple(sorted(labels)): number for labels, number in own[name].items()
        }


def test_a_run_without_stages_still_has_its_disk() -> None:
    found = parsed(exposition([], run="r", disk_bytes=2, free_bytes=1, time=3.0))
    assert set(found) == {"mlpmem_disk_size_bytes", "mlpmem_disk_free_bytes", "mlpmem_look_timestamp_seconds"}
