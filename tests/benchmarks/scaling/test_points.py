"""Reports as points: parameters and compute by hand; what cannot be compared is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.benchmarks.scaling import points
from mlpmem_ds.benchmarks.scaling.fit_scaling import fit_reports
from mlpmem_ds.benchmarks.scaling.points import read_points
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.evaluation import DocumentSums, write_document_sums, write_evaluation

from ...stages.conftest import make_arm, make_evaluation

POSITIONS_M = np.array([40, 60])


class Opened:
    """A report whose eval.json alone is there."""

    def __init__(self, root: Path, *, flag: str) -> None:
        self.evaluation = points_reader(root)


def points_reader(root: Path):
    from mlpmem_ds.formats.evaluation import read_evaluation

    return read_evaluation(root)


@pytest.fixture(autouse=True)
def known_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each base read 500 tokens; the train split has 200."""
    monkeypatch.setattr(points, "open_report", Opened)
    monkeypatch.setattr(points, "_tokens_of_base", lambda evaluation, root: 500)
    monkeypatch.setattr(points, "num_tokens_of_splits", lambda root: {"train": 200})


def _write(root: Path, parameters: int, *, subject: str | None = "base+memory", last: int = 60) -> Path:
    root.mkdir()
    arms = [
        make_arm("base", 20.0, parameters=parameters),
        make_arm("base+memory", 17.0, parameters=parameters + 100, tokens=1000),
    ]
    write_evaluation(root, make_evaluation(*arms, subject=subject))
    positions_M = np.array([40, last])
    sums = {"base": -np.log(20.0) * positions_M, "base+memory": -np.log(17.0) * positions_M}
    write_document_sums(root, "test", DocumentSums(positions_M=positions_M, sums=sums))
    return root


def test_parameters_compute_and_loss_are_those_by_hand(tmp_path: Path) -> None:
    base, memory = read_points([_write(tmp_path / "r", 1000)])
    assert (base.parameters, memory.parameters) == (1000, 1100)
    assert base.compute == 6 * 1000 * 500
    assert memory.compute == base.compute + 2 * 1000 * 200 + 6 * 100 * 1000
    assert (base.loss, memory.loss) == pytest.approx((np.log(20), np.log(17)))


def test_a_report_without_a_memory_or_of_another_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no memory"):
        read_points([_write(tmp_path / "bare", 1000, subject=None)])
    roots = [_write(tmp_path / "one", 1000), _write(tmp_path / "two", 2000, last=70)]
    with pytest.raises(UserError, match="of another text"):
        read_points(roots)


def test_two_sizes_are_refused_and_three_are_fitted(tmp_path: Path) -> None:
    roots = [_write(tmp_path / str(size), size) for size in (1000, 2000, 4000)]
    with pytest.raises(UserError, match="of 2 sizes"):
        fit_reports(roots[:2], text="a text", held_equal="all")
    result = fit_reports(roots, text="a text", held_equal="all")
    assert len(result.points) == 6 and result.documents == 2
    assert [fit.exponent for fit in result.fits] == pytest.approx([0, 0, 0, 0], abs=1e-9)
