"""suites.json: another version is refused. What is written is read again: tests/stages/harness."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.formats.suites import Suites, read_suites, write_suites

NOTHING = Suites(suites=("nine",), arms={}, tasks=(), left_out={"cb": "no file"}, device="cpu")


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "suites.json"
    write_suites(path, NOTHING)
    assert read_suites(tmp_path) == NOTHING
    path.write_text('{"format": "mlpmem-suites", "version": 7}')
    with pytest.raises(DamagedDataError, match="is not mlpmem-suites version 1: run run_lm_eval again"):
        read_suites(tmp_path)
