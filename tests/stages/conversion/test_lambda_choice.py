"""The weight of a memory: the order of choice, and what is said where it was not tuned."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.evaluation import write_evaluation
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.models.memory_config import DEFAULT_LAMBDA
from mlpmem_ds.stages.conversion.lambda_choice import choose_lambda, read_report

from .conftest import LAMBDA, MemoryFlags, save_memory, save_report_of


def _gate(*fixed: float) -> Any:
    return SimpleNamespace(manifest=SimpleNamespace(fixed=fixed))


def test_a_flag_comes_before_a_report_and_a_report_before_a_gate(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_lambda(0.1, (0.3, "a rule"), _gate(0.2)) == (0.1, "given as a flag")
        assert choose_lambda(None, (0.3, "a rule"), _gate(0.2)) == (0.3, "a rule")
        lmbda, rule = choose_lambda(None, None, _gate(0.75, 0.5))
    assert (lmbda, rule) == (1.0, "the best fixed weight of the gate's texts")
    assert not caplog.records


def test_what_was_not_tuned_or_does_not_help_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_lambda(None) == (DEFAULT_LAMBDA, "the default, not tuned")
        assert choose_lambda(None, (0.0, "a rule"))[0] == 0
    untuned, useless = caplog.messages
    assert untuned.startswith(f"no λ was given: it is {DEFAULT_LAMBDA:g}, which was not tuned")
    assert "the memory does not help this base" in useless
    caplog.clear()
    assert choose_lambda(None, (0.0, "a rule"), _gate(0.2)) == (0.0, "a rule")
    assert not caplog.records  # the gate weighs the memory


def test_a_report_gives_the_lambda_of_this_memory_and_none_of_a_bank(
    memory_dir: Path, tmp_path: Path, flags: MemoryFlags
) -> None:
    trained, report = read_weights(memory_dir), save_report_of(memory_dir, tmp_path / "report")
    assert read_report(None, [(trained, memory_dir)]) == (None, None)
    opened, chosen = read_report(report, [(trained, memory_dir)])
    assert opened is not None and chosen == (LAMBDA, "least perplexity on the tuning split")
    write_evaluation(report, replace(opened.evaluation, choices_from="run/other"))
    assert read_report(report, [(trained, memory_dir)])[1] == (LAMBDA, "chosen in another report")
    assert read_report(report, [(trained, memory_dir)] * 2)[1] is None
    other = save_memory(tmp_path / "other", flags, seed=2)
    with pytest.raises(UserError, match=f"does not evaluate the memory of --checkpoint {other}"):
        read_report(report, [(trained, memory_dir), (read_weights(other), other)])
