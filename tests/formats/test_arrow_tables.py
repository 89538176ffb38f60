"""Datastores and targets in Arrow: any list and number type that holds them gives the same numbers; the rest
is refused with its row or its type. The whole way, in and out: tests/stages/exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.arrow_tables import DATASTORE, TARGETS, key_width, open_arrow, read_keys, read_rows

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

KEYS = [[1.0, 2.0, -3.0, 0.5], [0.0, 4.0, 5.0, 6.0], [7.0, 8.0, 9.0, 10.0]]
TOKENS, PROBABILITIES = [[7, 2], [3], [4, 5]], [[0.75, 0.25], [1.0], [0.5, 0.25]]


def write(path: Path, table: Any, *, as_file: bool = False, rows: int = 2) -> Path:
    with (pa.ipc.new_file if as_file else pa.ipc.new_stream)(path, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)
    return path


KINDS: dict[str, Any] = {
    "keys": pa.list_(pa.float16(), 4),
    "vals": pa.int32(),
    "id_cnt": pa.int32(),
    "token_id": pa.list_(pa.int32()),
    "prob": pa.list_(pa.float16()),
    "label": pa.int32(),
}
VALUES: dict[str, Any] = {
    "keys": KEYS,
    "vals": [1, 2, 3],
    "id_cnt": [2, 1, 2],
    "token_id": TOKENS,
    "prob": PROBABILITIES,
    "label": [0, 1, 2],
}


def table_of(names: tuple[str, ...], changes: dict[str, Any] | None = None, **kinds: Any) -> Any:
    """The columns with other values, or of other types."""
    values, kinds = {**VALUES, **(changes or {})}, {**KINDS, **kinds}
    return pa.table({name: pa.array(values[name], kinds[name]) for name in names})


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float16(), 4),
        pa.list_(pa.float32(), 4),
        pa.list_(pa.float64(), 4),
        pa.list_(pa.float16()),
        pa.large_list(pa.float32()),
    ],
    ids=str,
)
def test_keys_of_any_list_are_the_same(kind: Any, as_file: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "d.arrow", table_of(DATASTORE, keys=kind), as_file=as_file)
    table = open_arrow([path, path], DATASTORE, flag="--datastore")
    assert table.num_rows == 6 and key_width(table) == 4
    found_nD = read_keys(table, 1, 5)
    assert found_nD.dtype == np.float16 and found_nD.tolist() == [KEYS[1], KEYS[2], KEYS[0], KEYS[1]]
    assert table.numbers("vals", 1, 5).tolist() == [2, 3, 1, 2]


@pytest.mark.parametrize(
    "kinds",
    [
        {},
        {"token_id": pa.large_list(pa.int64()), "prob": pa.large_list(pa.float32())},
        {"token_id": pa.list_(pa.uint16()), "prob": pa.list_(pa.float64()), "id_cnt": pa.int64()},
    ],
)
def test_targets_of_any_list_are_the_same(kinds: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "t.arrow", table_of(TARGETS, **kinds))
    rows, labels_n = read_rows(open_arrow([path], TARGETS, flag="--targets"), 0, 3, 10)
    assert rows.counts_n.tolist() == [2, 1, 2] and rows.ids.tolist() == [2, 7, 3, 4, 5]
    assert rows.probabilities.tolist() == [0.25, 0.75, 1.0, 0.5, 0.25] and labels_n.tolist() == [0, 1, 2]
    assert rows.dropped.tolist() == [0, 0, 0.25]


def test_lists_of_one_length_and_rows_without_neighbours(tmp_path: Path) -> None:
    fixed = table_of(
        TARGETS,
        {"id_cnt": [2, 2, 2], "token_id": [[7, 2]] * 3, "prob": [[0.5, 0.5]] * 3},
        token_id=pa.list_(pa.int32(), 2),
        prob=pa.list_(pa.float16(), 2),
    )
    rows, _ = read_rows(open_arrow([write(tmp_path / "f.arrow", fixed)], TARGETS, flag="--t"), 1, 3, 10)
    assert rows.ids.tolist() == [2, 7, 2, 7]
    empty = table_of(TARGETS, {"id_cnt": [0, 1, 0], "token_id": [None, [3], []], "prob": [None, [1.0], []]})
    rows, _ = read_rows(open_arrow([write(tmp_path / "e.arrow", empty)], TARGETS, flag="--t"), 0, 3, 10)
    assert rows.counts_n.tolist() == [0, 1, 0] and rows.dropped.tolist() == [0, 0, 0]


def holed(values: list[Any], place: tuple[int, ...]) -> list[Any]:
    """The values with a null in a place."""
    first, *rest = place
    return [
        (holed(value, tuple(rest)) if rest else None) if number == first else value
        for number, value in enumerate(values)
    ]


BAD_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "null key": ({"keys": holed(KEYS, (1,))}, {}, "row 1: its key has 0 numbers, not 4"),
    "null number": ({"keys": holed(KEYS, (2, 0))}, {}, "row 2: keys has an element without a value"),
    "lengths": (
        {"keys": [*KEYS[:2], [1.0]]}, {"keys": pa.list_(pa.float16())}, "row 2: its key has 1 numbers, not 4"
    ),
    "beyond float16": (
        {"keys": [[1e6, 0, 0, 0], *KEYS[1:]]}, {"keys": pa.list_(pa.float32(), 4)}, "row 0: .*65,504"
    ),
    "null value": ({"vals": [1, None, 3]}, {}, "row 1: vals has no value"),
    "integers": ({}, {"keys": pa.list_(pa.int32(), 4)}, "its keys are fixed_size_list.*lists of floating"),
    "no lists": ({"keys": [1.0, 2.0, 3.0]}, {"keys": pa.float32()}, "its keys are float, not lists of"),
    "texts": ({"vals": ["1", "2", "3"]}, {"vals": pa.string()}, "its vals are string, not integer"),
    "no rows": ({"keys": [], "vals": []}, {"keys": pa.list_(pa.float16())}, "has no keys"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_KEYS)
def test_keys_that_cannot_be_read_are_named(name: str, tmp_path: Path) -> None:
    values, kinds, message = BAD_KEYS[name]
    path = write(tmp_path / "d.arrow", table_of(DATASTORE, values, **kinds))
    with pytest.raises(UserError, match=message):
        table = open_arrow([path], DATASTORE, flag="--datastore")
        key_width(table)
        table.numbers("vals", 0, 3)
        read_keys(table, 0, 3)


BAD_TARGETS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "null token": ({"token_id": holed(TOKENS, (2, 1))}, {}, "row 2: token_id has an element without"),
    "null probability": ({"prob": holed(PROBABILITIES, (1, 0))}, {}, "row 1: prob has an element without"),
    "null row": ({"token_id": holed(TOKENS, (1,))}, {}, "row 1: id_cnt is not the length"),
    "null count": ({"id_cnt": [2, None, 2]}, {}, "row 1: id_cnt has no value"),
    "null label": ({"label": [0, 1, None]}, {}, "row 2: label has no value"),
    "fractions": ({}, {"token_id": pa.list_(pa.float32())}, "its token_id are list<.*lists of integer"),
    "huge": (
        {"token_id": [[2**40, 1], [3], [4, 5]]}, {"token_id": pa.list_(pa.int64())}, "row 0: a token is not"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_targets_that_cannot_be_read_are_named(name: str, tmp_path: Path) -> None:
    values, kinds, message = BAD_TARGETS[name]
    path = write(tmp_path / "t.arrow", table_of(TARGETS, values, **kinds))
    with pytest.raises(UserError, match=message):
        read_rows(open_arrow([path], TARGETS, flag="--targets"), 0, 3, 10)


def test_files_that_are_something_else_are_said_to_be(tmp_path: Path) -> None:
    good = write(tmp_path / "good.arrow", table_of(DATASTORE))
    other = write(tmp_path / "other.arrow", table_of(DATASTORE, keys=pa.list_(pa.float32(), 4)))
    parquet.write_table(table_of(DATASTORE), tmp_path / "called.arrow")
    (tmp_path / "empty.arrow").write_bytes(b"")
    twice = pa.Table.from_arrays([*table_of(DATASTORE).columns, pa.array([1, 2, 3])], [*DATASTORE, "vals"])
    for paths, message in (
        ([good, other], "--d .*other.arrow has columns of other types than good.arrow"),
        ([tmp_path / "called.arrow"], "--d .*called.arrow is no table, but a Parquet file"),
        ([tmp_path / "empty.arrow"], "is no table, but empty"),
        ([tmp_path], "is a directory: give the .arrow files"),
        ([write(tmp_path / "twice.arrow", twice)], "has 2 columns 'vals'"),
    ):
        with pytest.raises(UserError, match=message):
            open_arrow(paths, DATASTORE, flag="--d")


@pytest.mark.parametrize("names", [DATASTORE, TARGETS])
def test_a_byte_that_was_altered_is_read_or_refused_and_nothing_else(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    """Lengths and offsets that point beyond the file would be followed into other memory."""
    path = write(tmp_path / "x.arrow", table_of(names, keys=pa.list_(pa.float16())))
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            table = open_arrow([path], names, flag="--d")
            if table.num_rows and names == DATASTORE:
                read_keys(table, 0, table.num_rows)
            elif table.num_rows:
                read_rows(table, 0, table.num_rows, 10)
        except UserError:
            refused += 1
    assert refused > len(whole) // 6
