"""Records as JSON and back; what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import canonical_json
from mlpmem_ds.core.typed_json import added_later, from_json, json_key, to_json


@dataclass(frozen=True, kw_only=True)
class Point:
    lmbda: float = field(metadata=json_key("lambda"))
    ppl: float | None


@dataclass(frozen=True, kw_only=True)
class Record:
    name: str
    kind: Literal["exact", "lists"]
    curve: tuple[Point, ...]
    interval: tuple[float, float] | None
    tokens: Mapping[str, int]
    is_done: bool
    settings: Mapping[str, Any]


RECORD = Record(
    name="a",
    kind="lists",
    curve=(Point(lmbda=0.5, ppl=None), Point(lmbda=1, ppl=2.5)),
    interval=(-0.5, 1.0),
    tokens={"test": 3},
    is_done=False,
    settings={"k": 3, "factors": [1, 2]},
)


def plain(**changes: Any) -> Any:
    import json

    return {**json.loads(canonical_json(to_json(RECORD))), **changes}


@dataclass(frozen=True, kw_only=True)
class Grown:
    name: str
    epochs: tuple[float, ...] = field(default=(), metadata=added_later())


def test_a_file_of_before_a_field_has_its_default() -> None:
    assert from_json(Grown, {"name": "a"}, where="x.json", version=1) == Grown(name="a")
    whole = Grown(name="a", epochs=(2.0,))
    assert from_json(Grown, {"name": "a", "epochs": [2.0]}, where="x.json", version=1) == whole
    with pytest.raises(DamagedDataError, match="key name is missing"):
        from_json(Grown, {"epochs": []}, where="x.json", version=1)


def test_a_record_comes_back() -> None:
    assert plain()["curve"] == [{"lambda": 0.5, "ppl": None}, {"lambda": 1, "ppl": 2.5}]
    assert from_json(Record, plain(), where="x.json", version=1) == RECORD
    assert from_json(Record, plain(interval=None), where="x.json", version=1).interval is None


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (plain(more=1), "x.json: unknown key more; this program reads version 7"),
        ({key: value for key, value in plain().items() if key != "tokens"}, "key tokens is missing;"),
        (plain(curve=[{"lambda": 0, "ppl": 1, "lmbda": 2}]), r"unknown key lmbda in curve\[0\]"),
        (plain(curve=[{"lambda": 0}]), r"key ppl is missing in curve\[0\]"),
        (plain(curve={}), "curve is '{}', not a list"),
        (plain(interval=[1.0]), r"interval is '\[1.0\]', not a list of 2"),
        (plain(name=3), "name is '3', not str"),
        (plain(is_done=0), "is_done is '0', not bool"),
        (plain(tokens={"test": True}), "tokens.test is 'True', not int"),
        (plain(tokens=[]), r"tokens is '\[\]', not an object"),
        (plain(interval=["a", 1]), r"interval\[0\] is 'a', not a number"),
        (plain(kind="index"), "kind is 'index', not one of exact, lists"),
        ([], r"the file is '\[\]', not an object"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(value: Any, fault: str) -> None:
    with pytest.raises(DamagedDataError, match=fault):
        from_json(Record, value, where="x.json", version=7)


@dataclass(frozen=True, kw_only=True)
class Checked:
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}")


def test_what_a_record_refuses_itself_is_refused_by_name() -> None:
    with pytest.raises(DamagedDataError, match="x.json: the file is refused .size is 0.; this program"):
        from_json(Checked, {"size": 0}, where="x.json", version=1)
