"""`bench scale`, the measures of files: they count what they say, at small sizes, and meet their goals."""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.benchmarks.scale import metadata
from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.formats.keys import open_keys

POSITIONS = 2600 << 20  # as many units as make a manifest with lists


def test_waiting_meets_its_goal(tmp_path: Path) -> None:
    by_name = {measure.name: measure for measure in metadata.MEASURES}
    rounds = metadata.calls_of_a_waiting_round(tmp_path, ranks=64, rounds=4)
    assert rounds >= 1 and by_name["stats_per_wait_round_2048"].is_met_by(rounds)


def test_a_rank_hashes_its_share(tmp_path: Path) -> None:
    share = metadata.bytes_hashed_by_a_rank(tmp_path / "bytes", num_positions=POSITIONS, ranks=8)
    assert 0.8 < share <= 1
    assert metadata.opens_of_a_rank(tmp_path / "opens", num_positions=POSITIONS, ranks=8) < 2000


def test_a_start_asks_for_some_files(tmp_path: Path) -> None:
    assert 10 < metadata.opens_of_a_start(tmp_path / "opens", num_positions=POSITIONS) < 200
    assert metadata.manifest_bytes(tmp_path / "bytes", num_positions=POSITIONS) < 1e5
    assert metadata.seconds_of_a_start(tmp_path / "seconds", num_positions=POSITIONS) < 10
    keys = open_keys(tmp_path / "seconds" / "keys")
    assert len(keys.files) > 10_000 and keys.bytes_of("keys") > POSITIONS * 256


def test_calls_below_a_folder_are_counted_and_no_others(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with counted_calls(inside) as calls:
        open(inside / "part-1", "w").close()  # pathlib of Python 3.10 opens in two calls
        (tmp_path / "outside").write_text("")
        assert (inside / "part-1").exists() and list(inside.iterdir())
    assert calls["opens"] == 1 == calls["part"] and calls["listings"] == 1 and calls["stats"] >= 1
