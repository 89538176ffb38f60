"""Batches streamed by webdataset: each row of an epoch once, over ranks, stops and other numbers of ranks."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines import webdataset_stream
from mlpmem_ds.formats import shard_deal
from mlpmem_ds.formats.shard_deal import ShardDeal
from mlpmem_ds.formats.targets import ORDER_NAME, Targets, open_targets
from mlpmem_ds.formats.training_rows import stored_inputs
from mlpmem_ds.stages.training import streamed_batches
from mlpmem_ds.stages.training.streamed_batches import StreamedBatches, StreamSettings

from .conftest import BLOCK, write_targets

GROUP = 24
SETTINGS: dict[str, Any] = {"open_shards": 2, "buffer_positions": 256, "seed": 3}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three groups a block, the last one smaller."""
    for module in (shard_deal, streamed_batches):
        monkeypatch.setattr(module, "ROWS_OF_GROUP", GROUP)


class MadeUpKeys:
    """Keys of 5,000 positions in memory."""

    num_positions, sha256 = 5000, "0" * 64
    manifest = SimpleNamespace(vocab_size=300)

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.arrays = {
            "inputs": generator.integers(0, 1 << 14, (5000, 3)).astype(np.uint16),
            "values": generator.integers(0, 300, 5000).astype(np.uint16),
            "log_probabilities": -generator.random(5000).astype(np.float32),
        }

    def read(self, array: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.arrays[array][start:stop]

    def gather(self, array: str, positions_n: np.ndarray) -> np.ndarray:
        return self.arrays[array][positions_n]

    def read_inputs(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.arrays["inputs"][start:stop]

    def gather_inputs(self, positions_n: np.ndarray) -> np.ndarray:
        return self.arrays["inputs"][positions_n]


@pytest.fixture(scope="module")
def keys() -> Any:
    return MadeUpKeys()


@pytest.fixture(scope="module")
def targets(keys: Any, tmp_path_factory: pytest.TempPathFactory) -> Targets:
    """Shards of one and of two blocks; the last is shorter."""
    root = tmp_path_factory.mktemp("streamed") / "targets"
    num_blocks = -(-keys.num_positions // BLOCK)
    write_targets(root, keys, cuts=[cut for cut in range(1, num_blocks) if cut % 3])
    return open_targets(root)


def make_batches(
    keys: Any, targets: Targets, *, rank: int = 0, size: int = 1, per_rank: int = 16, **changes: Any
) -> StreamedBatches:
    inputs = changes.pop("inputs", None)
    return StreamedBatches(
        keys,
        targets,
        StreamSettings(**({"place": str(targets.root)} | SETTINGS | changes)),
        batch_positions=per_rank * size,
        world=World(rank=rank, size=size),
        num_micro_batches=2,
        with_log_probabilities=True,
        inputs=inputs,
    )


def positions_of(batches: StreamedBatches, first: int, stop: int) -> Iterator[np.ndarray]:
    for step, (parts, _) in enumerate(batches.stream(first, stop), start=first):
        assert [len(part.inputs_NI) for part in parts] == [8, 8]
        yield batches._recent[step][0]


def test_rows_are_those_of_the_positions(keys: Any, targets: Targets) -> None:
    batches, seen = make_batches(keys, targets), []
    for step, (parts, _) in enumerate(batches.stream(0, 60)):
        positions = batches._recent[step][0]
        inputs = torch.cat([part.inputs_NI for part in parts])
        assert torch.equal(
            inputs.view(torch.int16), stored_inputs(keys.gather_inputs(positions)).view(torch.int16)
        )
        labels = torch.cat([part.targets.labels_N for part in parts])
        assert labels.tolist() == keys.gather("values", positions).tolist()
        expected = targets.gather(positions)
        assert torch.cat([part.targets.ids for part in parts]).tolist() == expected.ids.tolist()
        probabilities = torch.cat([part.targets.probabilities for part in parts])
        assert np.array_equal(probabilities.numpy(), expected.probabilities)
        logs = torch.cat([part.targets.base_log_probabilities_N for part in parts])
        assert np.array_equal(logs.numpy(), keys.gather("log_probabilities", positions))
        assert batches.faulty_positions(step) == []
        seen.append(positions[0] // BLOCK)
    assert len(set(seen)) > 4  # blocks are mixed


def test_an_epoch_has_each_position_once(keys: Any, targets: Targets) -> None:
    """Of one rank: the rows until the second epoch's first; then each again."""
    num_steps = 2 * keys.num_positions // 16
    found = np.concatenate(list(positions_of(make_batches(keys, targets, buffer_positions=1), 0, num_steps)))
    counts = Counter(found.tolist())
    assert max(counts.values()) <= 3 and len(counts) == keys.num_positions
    assert len(set(found[: keys.num_positions // 2].tolist())) == keys.num_positions // 2
    again = np.concatenate(list(positions_of(make_batches(keys, targets, buffer_positions=1), 0, num_steps)))
    np.testing.assert_array_equal(found, again)  # a function of the seed


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (2, 3), (3, 1)])
def test_a_resumed_run_reads_each_position_of_an_epoch_once(
    keys: Any, targets: Targets, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]
) -> None:
    """Stopped in the first epoch, in the middle of shards, and continued by as many ranks or others: what was
    trained on before and what comes after are the epoch, but for the rows of a group that was cut."""
    first_size, second_size = sizes
    steps = keys.num_positions // 3 // (16 * first_size)
    readers = [make_batches(keys, targets, rank=rank, size=first_size) for rank in range(first_size)]
    before: list[int] = []
    for batches in readers:
        stream = positions_of(batches, 0, 1000)
        for _, positions in zip(range(steps), stream, strict=False):
            before += positions.tolist()
        stream.close()  # type: ignore[attr-defined]
    state = json.loads(json.dumps(saved_by(readers, steps, monkeypatch)))

    deal = ShardDeal.from_json(state)
    num_shards = len(targets.manifest.shards)
    assert len(deal.left) < num_shards and deal.horizon < num_shards
    after: list[int] = []
    for rank in range(second_size):
        batches = make_batches(keys, targets, rank=rank, size=second_size, buffer_positions=1, open_shards=1)
        batches.continue_from(state)
        for place, positions in groups_of_first_epoch(batches, rank, second_size, num_shards):
            assert batches._sequence.at(batches._deal.at(place).number)[0] == 0
            after += positions
    counts = Counter([*before, *after])
    assert set(counts) == set(range(keys.num_positions))
    twice = sum(count - 1 for count in counts.values())
    assert twice < GROUP * first_size


def saved_by(readers: list[StreamedBatches], step: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The state that ranks save together, here one after another."""
    reports: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            streamed_batches,
            "gather_values",
            lambda report, world: reports.append(report) or [report] * world.size,
        )
        for batches in readers:
            batches.state_after(step)
    return ShardDeal().after(reports).to_json()


def groups_of_first_epoch(
    batches: StreamedBatches, rank: int, size: int, num_shards: int
) -> Iterator[tuple[int, list[int]]]:
    """All groups that a rank reads of the first epoch."""
    place = rank
    while batches._deal.at(place).number < num_shards:
        for block in batches._blocks_of(place, batches._deal.at(place)):
            for group in batches._groups_of(block):
                yield place, group.positions_n.tolist()
        place += size


def test_what_is_read_ahead_is_not_counted_as_read(
    keys: Any, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = make_batches(keys, targets)
    stream = positions_of(batches, 0, 100)
    for _ in range(5):
        next(stream)
    masks = [
        sum(shard.mask.bit_count() for shard in ShardDeal.from_json(batches.state_after(step)).left)
        for step in (0, 2, 4)
    ]
    stream.close()  # type: ignore[attr-defined]
    assert masks[0] == 0 and masks == sorted(masks)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("shards", "batches"))]


def test_memory_is_bounded_by_the_buffer(
    keys: Any, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are read and not yet given out: those of the buffer, and two a shard that is open."""
    read = []
    original = StreamedBatches._read_block
    monkeypatch.setattr(
        StreamedBatches,
        "_read_block",
        lambda self, *rest: read.append(rest[1].count) or original(self, *rest),
    )
    batches = make_batches(keys, targets)
    for step, (_, _) in enumerate(batches.stream(0, 30)):
        given = 16 * (step + 1)
        assert sum(read) <= given + 256 + BLOCK * 2 * 5 + 16 * 4 + BLOCK


def test_inputs_are_computed_where_they_are_not_stored(keys: Any, targets: Targets) -> None:
    class Computed:
        is_collective = False

        def __call__(self, runs: list[Block], others: Any = ()) -> torch.Tensor:
            return stored_inputs(np.concatenate([keys.read_inputs(*run) for run in runs]))

    stored, computed = (
        list(make_batches(keys, targets, inputs=inputs).stream(0, 12)) for inputs in (None, Computed())
    )
    for (one, _), (other, _) in zip(stored, computed, strict=True):
        assert all(torch.equal(a.inputs_NI, b.inputs_NI) for a, b in zip(one, other, strict=True))


def test_shards_come_from_elsewhere_and_the_manifest_is_enough(
    keys: Any, targets: Targets, tmp_path: Path
) -> None:
    shutil.copytree(targets.root, tmp_path / "store")
    (tmp_path / "here").mkdir()
    for name in ("manifest.json", "identity.json"):
        shutil.copy(targets.root / name, tmp_path / "here" / name)
    with pytest.raises(DamagedDataError):
        open_targets(tmp_path / "here")
    here = open_targets(tmp_path / "here", has_shards=False)
    expected = make_batches(keys, targets).stream(0, 6)
    found = make_batches(keys, here, place=f"pipe:cat {tmp_path}/store/{{}}").stream(0, 6)
    for (one, _), (other, _) in zip(expected, found, strict=True):
        assert all(torch.equal(a.inputs_NI, b.inputs_NI) for a, b in zip(one, other, strict=True))
    assert not (tmp_path / "here" / ORDER_NAME).exists()


def test_a_shard_that_is_another_one_ends_the_training(keys: Any, targets: Targets, tmp_path: Path) -> None:
    shards = targets.manifest.shards
    shutil.copytree(targets.root, tmp_path / "store")
    for shard in shards[1:]:
        shutil.copy(targets.root / shards[0].name, tmp_path / "store" / shard.name)
    with pytest.raises(DamagedDataError, match="come next: it is another file|bytes where"):
        list(make_batches(keys, targets, place=str(tmp_path / "store")).stream(0, 200))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("open_shards", [1, 2, 4])
def test_two_epochs_open_each_shard_twice(
    keys: Any, targets: Targets, monkeypatch: pytest.MonkeyPatch, size: int, open_shards: int
) -> None:
    """With a buffer larger than the epochs: nothing is read to fill it, but for one shard a rank."""
    opened: list[str] = []
    original = webdataset_stream.read_shard
    monkeypatch.setattr(
        webdataset_stream,
        "read_shard",
        lambda shard, **rest: opened.append(shard.url) or original(shard, **rest),
    )
    changes = {"open_shards": open_shards, "buffer_positions": 1 << 20}
    num_steps = 2 * keys.num_positions // (16 * size)
    found = []
    for rank in range(size):
        batches = make_batches(keys, targets, rank=rank, size=size, **changes)
        found += [list(positions_of(batches, 0, num_steps))]
    assert all(len(steps) == num_steps for steps in found)
    assert len(opened) <= 2 * len(targets.manifest.shards) + size
    if size == 1:
        counts = Counter(np.concatenate(found[0]).tolist())
        assert len(counts) == keys.num_positions and max(counts.values()) <= 3
