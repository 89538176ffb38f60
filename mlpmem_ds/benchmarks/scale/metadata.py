"""Benchmark `scale`, measures of files that a rank opens, asks for and hashes.

The directories have as many files as a real one of that size, all of them sparse or not there at all: what is
counted is what our code asks of the file system. A checksum is counted by the size of its file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.benchmarks.scale.measure import Measure
from mlpmem_ds.core import files, waiting
from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.file_lists import files_of, list_files
from mlpmem_ds.core.files import FileRecord, publish_json, read_json
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import CodecManifest, KeysManifest, file_name, open_keys
from mlpmem_ds.stages.keys.plan import auto_unit_positions

_SHA256 = "0" * 64
_BYTES = {"keys": 256, "values": 4, "log_probabilities": 4, "inputs": 8192}  # of a position
_HEADER = 128  # of an .npy file
_FIVE_BILLION, _TWO_HUNDRED_BILLION = 5 * 10**9, 2 * 10**11


class _Config(Flags):
    """The flags of a made-up stage."""

    output: Path = option("directory")


def write_sparse_keys(root: Path, num_positions: int, *, arrays: Sequence[str] = ()) -> None:
    """A key directory's manifest with its lists; of the files those that are checked when it is opened, and
    all of the named arrays, with their sizes and without content."""
    unit = auto_unit_positions(num_positions)
    name_of = partial(file_name, unit_positions=unit, total=num_positions)
    records = [
        FileRecord(name=name_of(array, block.start), bytes=_HEADER + block.size * each, sha256=_SHA256)
        for block in split_blocks(num_positions, unit)
        for array, each in _BYTES.items()
    ]
    root.mkdir(parents=True)
    header: dict[str, Any] = {"format": "mlpmem-keys", "version": KeysManifest.VERSION}
    header |= {"inputs": {"corpus": ""}, "config": {}}
    manifest = header | _keys_manifest(num_positions, unit).to_json() | list_files(root, records)
    publish_json(root / "manifest.json", manifest, seal=True)
    publish_json(root / "identity.json", header, seal=True)
    named = [record for record in records if record.name.startswith(tuple(f"{array}/" for array in arrays))]
    for record in [*files_of(read_json(root / "manifest.json"), root).sample(), *(named if arrays else ())]:
        (root / record.name).parent.mkdir(parents=True, exist_ok=True)
        with open(root / record.name, "wb") as stream:
            stream.truncate(record.bytes)


def _keys_manifest(num_positions: int, unit_positions: int) -> KeysManifest:
    codec = CodecManifest(
        name="int8",
        dim=256,
        scale=1.0,
        raw_dtype=None,
        energy_kept=1.0,
        clipped_share=0.0,
        massive_dimensions=(),
    )
    return KeysManifest(
        codec=codec,
        num_positions=num_positions,
        unit_positions=unit_positions,
        split="train",
        block_size=1024,
        vocab_size=128_256,
        vocabulary_sha256="",
        key_size=4096,
        key_layer=31,
        key_point="ffn_input",
        num_layers=32,
        layers_path=None,
        input_codec="bf16",
        input_size=4096,
        input_width=4096,
        input_layer=31,
        input_point="ffn_input",
        input_num_layers=32,
        input_layers_path=None,
        head_size=128_256,
        dtype="bfloat16",
        attention="sdpa",
    )


class _OneOf:
    """A dealer that gives this rank every `size`-th number, and lets the others be done when it waits."""

    def __init__(self, rank: int, size: int) -> None:
        self.size = size
        self._numbers: dict[str, Iterator[int]] = {}
        self._rank = rank
        self.finish_others: Any = lambda: None

    def next_number(self, counter: str) -> int:
        numbers = self._numbers.setdefault(counter, iter(range(self._rank, 1 << 40, self.size)))
        return next(numbers)

    def wait(self) -> None:
        self.finish_others()


def _open(root: Path, rank: int, size: int, dealer: _OneOf | None = None) -> StageDirectory:
    return open_stage(
        root,
        stage="made-up",
        version=1,
        config=_Config(),
        inputs={},
        world=World(rank=rank, size=size),
        dealer=dealer,
    )


def _verified(work: Path, *, num_positions: int, ranks: int) -> dict[str, int]:
    """What one of the ranks asks for until all keys are compared with their checksums: it opens the keys,
    compares its share, and waits. `opens` (stats too) and `bytes` hashed."""
    keys_root, root = work / "keys", work / "index"
    write_sparse_keys(keys_root, num_positions, arrays=("keys",))
    _open(root, 0, ranks)
    dealer, hashed = _OneOf(ranks - 1, ranks), [0]

    def count_bytes(path: Path) -> str:
        if keys_root not in path.parents or path.suffix != ".npy":
            return sha256_of_file(path)
        hashed[0] += path.stat().st_size
        open(path, "rb").close()
        return _SHA256

    sha256_of_file = files.sha256_of_file
    with mock.patch.object(files, "sha256_of_file", count_bytes), counted_calls(work) as calls:
        keys = open_keys(keys_root)
        stage = _open(root, ranks - 1, ranks, dealer)

        def finish_others() -> None:
            before = calls.copy()
            units = [f"verified-keys-{number:03d}" for number in range(len(names) // 16 + 1)]
            for unit in units:
                if not stage.records.path(unit).is_file():
                    stage.records.publish(unit, [], {})
            calls.clear()
            calls.update(before)

        names = [keys.file_name("keys", block.start) for block in keys.blocks]
        dealer.finish_others = finish_others
        verify_inputs(stage, keys, names, label="keys")
    return {"opens": calls["opens"] + calls["stats"] + calls["listings"], "bytes": hashed[0]}


def opens_of_a_rank(work: Path, *, num_positions: int = _FIVE_BILLION, ranks: int = 32) -> float:
    """Opens, stats and listings of one of the ranks, start and comparing of the keys."""
    return float(_verified(work, num_positions=num_positions, ranks=ranks)["opens"])


def bytes_hashed_by_a_rank(work: Path, *, num_positions: int = _FIVE_BILLION, ranks: int = 32) -> float:
    """Bytes that one of the ranks hashes, over its equal share of the keys and 1 GB."""
    hashed = _verified(work, num_positions=num_positions, ranks=ranks)["bytes"]
    return hashed / (num_positions * _BYTES["keys"] / ranks + 1e9)


def opens_of_a_start(work: Path, *, num_positions: int = _FIVE_BILLION) -> float:
    """Opens, stats and listings until a stage knows its keys."""
    write_sparse_keys(work / "keys", num_positions)
    with counted_calls(work) as calls:
        open_keys(work / "keys")
    return float(calls["opens"] + calls["stats"] + calls["listings"])


def seconds_of_a_start(work: Path, *, num_positions: int = _TWO_HUNDRED_BILLION) -> float:
    """Seconds until a stage knows its keys."""
    write_sparse_keys(work / "keys", num_positions)
    start = time.perf_counter()
    open_keys(work / "keys")
    return time.perf_counter() - start


def manifest_bytes(work: Path, *, num_positions: int = _TWO_HUNDRED_BILLION) -> float:
    """Bytes of the manifest that every rank parses."""
    write_sparse_keys(work / "keys", num_positions)
    return float((work / "keys" / "manifest.json").stat().st_size)


def calls_of_a_waiting_round(work: Path, *, ranks: int = 2048, rounds: int = 10) -> float:
    """Opens, stats and listings of a round of a rank that waits while each of the others is at a unit."""
    directory = _open(work / "stage", 0, ranks)
    units = [f"{number:04d}" for number in range(ranks)]
    others, passed = units[1:], 0
    total: dict[str, int] = {}

    def claim_the_others(unit: str, writer: UnitWriter) -> None:
        for other in others:
            path = directory.records.claim_path(other)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("elsewhere - 1", encoding="utf-8")

    def pass_a_round(seconds: float) -> None:
        nonlocal passed
        passed += 1
        if passed == rounds:
            total.update(calls)
            for unit in others:
                directory.records.publish(unit, [], {})

    directory.run_units(units, claim_the_others)
    with mock.patch.object(waiting.time, "sleep", pass_a_round), counted_calls(work) as calls:
        directory.wait_for(units)
    return (total["opens"] + total["stats"] + total["listings"]) / rounds


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="stats_per_wait_round_2048",
        function=calls_of_a_waiting_round,
        goal=10,
        direction="at most",
        meaning="opens, stats and listings of a round of waiting, 2,048 ranks at a unit each",
    ),
    Measure(
        name="opens_per_rank_5e9",
        function=opens_of_a_rank,
        goal=_FIVE_BILLION / (1 << 20) / 32 + 1000,
        direction="at most",
        meaning="opens, stats and listings of one of 32 ranks until 5e9 keys are compared",
    ),
    Measure(
        name="bytes_hashed_per_rank_5e9",
        function=bytes_hashed_by_a_rank,
        goal=1,
        direction="at most",
        meaning="bytes hashed by one of 32 ranks until 5e9 keys are compared, over 1/32 of them and 1 GB",
    ),
    Measure(
        name="opens_per_start_5e9",
        function=opens_of_a_start,
        goal=1000,
        direction="at most",
        meaning="opens, stats and listings until a rank knows 5e9 keys (19,076 files)",
    ),
    Measure(
        name="manifest_seconds_2e11",
        function=seconds_of_a_start,
        goal=2,
        direction="at most",
        meaning="seconds until a rank knows 2e11 keys (762,940 files)",
    ),
    Measure(
        name="manifest_bytes_2e11",
        function=manifest_bytes,
        goal=1e6,
        direction="at most",
        meaning="bytes of the manifest of 2e11 keys that every rank parses",
    ),
)
