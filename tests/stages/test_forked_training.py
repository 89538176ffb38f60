"""A forked rank ends with the exit codes of a real one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mlpmem_ds.core.errors import LOST_RANK, REFUSED, LostRankError, UserError
from mlpmem_ds.core.world import World

from . import forked_training


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (UserError("a wrong flag"), REFUSED), (LostRankError("rank 1 is gone"), LOST_RANK)],
)
def test_a_rank_ends_with_the_code_of_its_error(
    error: UserError | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: object, world: World) -> None:
        if error is not None:
            raise error

    monkeypatch.setitem(forked_training.STAGES, "train", SimpleNamespace(Config=SimpleNamespace, run=run))
    monkeypatch.setattr(forked_training, "set_up_logging", lambda *_, **__: None)
    monkeypatch.setitem(forked_training.device_peak._SIZES, "cpu", 64)
    assert forked_training.run_rank({}, World(), draw=True) == code
