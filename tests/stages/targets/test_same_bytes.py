"""The same target files from any ranks, threads and batches, after a kill, and after damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.world import World
from mlpmem_ds.formats.target_shards import index_name
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.stages.targets import write_targets
from mlpmem_ds.stages.targets.teacher import Teacher

from .conftest import COMPACT, NUM_KEYS, config, result_of


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_give_the_same_files(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path, size: int
) -> None:
    for rank in range(size):  # the owner of `temperature` first, so that nobody waits
        write_targets.run(
            config(keys, tmp_path / "targets", index=index, search="ivf", nprobe=3),
            World(rank=rank, size=size),
        )
    assert result_of(tmp_path / "targets") == result_of(undisturbed)


@pytest.mark.parametrize(("batch_positions", "threads"), [(1, 1), (24, 2), (57, 1), (10**6, 2)])
def test_batches_and_threads_change_nothing(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path, batch_positions: int, threads: int
) -> None:
    before = torch.get_num_threads()
    changes = {"batch_positions": batch_positions, "threads": threads}
    write_targets.run(
        config(keys, tmp_path / "targets", index=index, search="ivf", nprobe=3, **changes), World()
    )
    torch.set_num_threads(before)
    assert result_of(tmp_path / "targets") == result_of(undisturbed)


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_a_failed_unit_leaves_the_others(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    wanted = config(
        keys, tmp_path / "targets", index=index, search="ivf", nprobe=3, batch_positions=104, threads=1
    )
    calls = 0
    original = Teacher.find

    def search(self: Any, positions: np.ndarray, **flags: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > failing:
            raise RuntimeError("pulled the plug")
        return original(self, positions, **flags)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="plug"):
        patch.setattr(Teacher, "find", search)
        write_targets.run(wanted, World())
    assert len(list((tmp_path / "targets" / "done").glob("*.json"))) == failing  # the sample is the first
    assert not (tmp_path / "targets" / "manifest.json").exists()
    write_targets.run(wanted, World())
    assert result_of(tmp_path / "targets") == result_of(undisturbed)


@pytest.mark.parametrize(
    ("ranks", "threads", "batch_positions"), [(1, 2, 8), (2, 1, 24), (3, 2, 10**6), (4, 1, 57)], ids=str
)
def test_compact_targets_are_the_same_bytes(
    keys: Path, index: Path, compact: Path, tmp_path: Path, ranks: int, threads: int, batch_positions: int
) -> None:
    before = torch.get_num_threads()
    wanted = config(
        keys, tmp_path / "targets", **COMPACT, index=index, threads=threads, batch_positions=batch_positions
    )
    for rank in range(ranks):
        write_targets.run(wanted, World(rank=rank, size=ranks))
    torch.set_num_threads(before)
    assert result_of(tmp_path / "targets") == result_of(compact)


@pytest.mark.parametrize("container", ["tar.zst", "tar"])
def test_encodings_hold_the_same_rows(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path, container: str
) -> None:
    changes = {"index": index, "search": "ivf", "nprobe": 3, "encoding": "compact", "container": container}
    write_targets.run(config(keys, tmp_path / "targets", **changes), World())
    compact, exact = open_targets(tmp_path / "targets"), open_targets(undisturbed)
    assert (compact.encoding, compact.container, exact.encoding) == ("compact", container, "exact")
    found, expected = compact.read_all(), exact.read_all()
    assert np.array_equal(found.offsets, expected.offsets) and np.array_equal(found.ids, expected.ids)
    row_of_entry = np.repeat(np.arange(NUM_KEYS), np.diff(found.offsets))
    differences = np.abs(found.probabilities.astype(float) - expected.probabilities)
    assert np.bincount(row_of_entry, weights=differences).mean() / 2 < 0.003
    sums = np.bincount(row_of_entry, weights=found.probabilities) + found.dropped
    assert np.allclose(sums, 1, atol=1e-5)
    assert compact.encoding == "compact" and exact.encoding == "exact"
    assert {shard.name.split(".", 1)[1] for shard in compact.manifest.shards} == {container}


def test_killed_runs_leave_the_undisturbed_bytes(
    keys: Path, index: Path, killed_runs: Callable[..., int], tmp_path: Path
) -> None:
    wanted = config(keys, tmp_path / "targets", **COMPACT, index=index, threads=1, batch_positions=24)
    undisturbed: dict[str, bytes] = {}

    def check(output: Path) -> None:
        undisturbed.update(undisturbed or result_of(tmp_path / "targets-undisturbed"))
        assert result_of(output, without_lists=True) == undisturbed

    assert killed_runs(write_targets.run, wanted, ranks=2, kills=6, check=check) == 6
    assert result_of(tmp_path / "targets") == undisturbed and not (tmp_path / "targets/lists").exists()
    left = [path.name for path in (tmp_path / "targets").rglob("*") if path.suffix in (".tmp", ".claim")]
    assert not left


def test_a_flipped_byte_is_repaired_and_nothing_else_is_made(
    keys: Path, index: Path, undisturbed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "targets"
    wanted = config(keys, root, index=index, search="ivf", nprobe=3)
    write_targets.run(wanted, World())
    names = [shard.name for shard in open_targets(root).manifest.shards]
    for damaged in (names[1], index_name(names[2])):
        content = bytearray((root / damaged).read_bytes())
        content[len(content) // 2] ^= 4
        (root / damaged).write_bytes(content)
        times = {name: (root / name).stat().st_mtime_ns for name in names if not damaged.startswith(name)}
        write_targets.run(wanted, World())
        assert result_of(root) == result_of(undisturbed)
        assert {name: (root / name).stat().st_mtime_ns for name in times} == times
