import json
from pathlib import Path

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.stages.inspection.tail import LineTail


def add(path: Path, text: str) -> None:
    with open(path, "a") as stream:
        stream.write(text)


def test_each_line_is_given_once_and_one_that_is_half_written_later(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = LineTail(path)
    assert tail.read() == ([], False)
    add(path, '{"a": 1}\n{"a"')
    assert tail.read() == ([{"a": 1}], False)
    assert tail.read() == ([], False)
    add(path, ': 2}\nnonsense\n{"a": 3}\n')
    assert tail.read() == ([{"a": 2}, {"a": 3}], False)


def test_a_file_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    add(path, '{"a": 1}\n{"a": 2}\n')
    tail = LineTail(path)
    tail.read()
    path.write_text('{"b": 1}\n')
    assert tail.read() == ([{"b": 1}], True)
    other = tmp_path / "other"
    other.write_text('{"c": 1}\n' * 9)
    other.replace(path)
    assert tail.read() == ([{"c": 1}] * 9, True)


def test_a_look_is_one_open_however_long_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(5000)))
    tail = LineTail(path)
    assert len(tail.read()[0]) == 5000
    with counted_calls(tmp_path) as calls:
        tail.read()
    assert calls["opens"] == 1 and calls["stats"] == 1 and calls["listings"] == 0
