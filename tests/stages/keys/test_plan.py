"""How many positions a unit has, where its files lie, and what is on disk already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages.keys import plan
from mlpmem_ds.stages.keys.plan import PositionBytes, auto_unit_positions, require_disk


@pytest.mark.parametrize(
    ("num_positions", "unit"),
    [
        (1_000_000, 1 << 16),
        (65_536_000, 1 << 16),
        (131_071_999, 1 << 16),
        (131_072_000, 1 << 17),
        (600_000_000, 1 << 19),
        (5_000_000_000, 1 << 20),
        (200_000_000_000, 1 << 20),
    ],
)
def test_a_unit_grows_with_the_keys_so_that_there_are_a_thousand_or_more(
    num_positions: int, unit: int
) -> None:
    assert auto_unit_positions(num_positions) == unit


def test_the_arrays_of_more_than_a_thousand_units_lie_in_folders_of_a_thousand(
    tmp_path: Path, make_keys: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes_ND, values_N = np.arange(3003).astype(np.int8)[:, None].repeat(4, axis=1), np.arange(3003) % 50
    keys = open_keys(make_keys(tmp_path / "keys", codes_ND, values_N, unit_positions=3, block_size=1))
    assert keys.file_name("keys", 3000) == "keys/0001/keys-000000003000.npy"
    assert (keys.unit("keys", 3000) == codes_ND[3000:]).all() and (keys.read("values") == values_N).all()
    keys.check("keys")
    sizes = sum(path.stat().st_size for path in (keys.root / "keys").rglob("*.npy"))
    assert keys.bytes_of("keys") == sizes and len(list((keys.root / "keys" / "0000").iterdir())) == 1000
    assert {path.name for path in (keys.root / "done").iterdir()} == {"0000", "0001"}

    each, asked = PositionBytes(key=4, input=0, value=2), list[int]()
    monkeypatch.setattr(plan, "require_free_bytes", lambda output, needed, what: asked.append(needed))
    require_disk(keys.root, each, 10**6, codec="int8", input_codec="none")
    assert asked == [10 * 10**6 - keys.bytes_of("keys", "values")]


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    each = PositionBytes(key=4, input=0, value=2)
    with pytest.raises(UserError, match="the keys need"):
        require_disk(tmp_path, each, 10**15, codec="int8", input_codec="none")
