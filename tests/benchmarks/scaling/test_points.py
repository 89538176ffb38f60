"""Reports as points: parameters and compute by hand; what cannot be compared is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.benchmarks.scaling import points
from mlpmem_ds.benchmarks.scaling.config import Config
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
    monkeypatch.setattr(points, "num_tokens_of_splits", lambda root, flag: {"train": 200})


def _write(
    root: Path,
    parameters: int,
    *,
    subject: str | None = "base+memory",
    last: int = 60,
    tokens: int | None = 1000,
    added: int = 100,
) -> Path:
    root.mkdir()
    arms = [
        make_arm("base", 20.0, parameters=parameters),
        make_arm("base+memory", 17.0, parameters=parameters + added, tokens=tokens),
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


def test_a_cost_that_is_not_known_is_no_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="how many tokens base.memory was trained on is not known"):
        read_points([_write(tmp_path / "imported", 1000, tokens=None)])
    monkeypatch.undo()
    monkeypatch.setattr(points, "open_report", Opened)
    monkeypatch.setattr(points, "_tokens_of_base", lambda evaluation, root: 500)
    with pytest.raises(UserError, match="--reports .*moved: its corpus run/corpus does not exist: give the"):
        read_points([_write(tmp_path / "moved", 1000)])


def test_sizes_that_are_none_are_refused(tmp_path: Path) -> None:
    """Base and memory together are of two sizes, though the bases are of three."""
    shapes = ((1000, 100), (2000, 100), (1900, 200))
    roots = [_write(tmp_path / str(size), size, added=added) for size, added in shapes]
    with pytest.raises(UserError, match="--reports: 2 sizes; a power law needs 3 or more: give reports of"):
        fit_reports(roots, text="a text", held_equal="all")
    with pytest.raises(UserError, match="--reports names .* twice .as .*: give each once"):
        Config(output=tmp_path / "out", reports=(*roots, roots[0]))


def test_two_sizes_are_refused_and_three_are_fitted(tmp_path: Path) -> None:
    roots = [_write(tmp_path / str(size), size) for size in (1000, 2000, 4000)]
    with pytest.raises(UserError, match="of 2 sizes"):
        fit_reports(roots[:2], text="a text", held_equal="all")
    result = fit_reports(roots, text="a text", held_equal="all")
    assert len(result.points) == 6 and result.documents == 2
    assert [fit.exponent for fit in result.fits] == pytest.approx([0, 0, 0, 0], abs=1e-9)
