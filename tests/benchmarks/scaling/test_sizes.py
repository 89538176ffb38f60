"""The sizes of a preset as jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.quality.presets import PRESETS
from mlpmem_ds.benchmarks.scaling.sizes import SIZES, make_jobs


@pytest.mark.parametrize("name", SIZES)
def test_each_size_has_all_stages_after_those_that_they_need(name: str) -> None:
    jobs = make_jobs(PRESETS[name], SIZES[name], Path("/run"))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == 1 + 6 * len(SIZES[name])
    for number, job in enumerate(jobs):
        assert {*job.needs} <= {*names[:number]}, job.name
    assert len(SIZES[name]) >= 3


@pytest.mark.parametrize("name", SIZES)
def test_what_only_reads_a_base_has_the_precision_of_the_preset(name: str) -> None:
    jobs = make_jobs(PRESETS[name], SIZES[name], Path("/run"))
    reading = [job for job in jobs if job.words[0] in ("extract-keys", "evaluate")]
    assert len(reading) == 2 * len(SIZES[name])
    for job in reading:
        assert job.words[job.words.index("--dtype") + 1] == PRESETS[name].dtype, job.name
