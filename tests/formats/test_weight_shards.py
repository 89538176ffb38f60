"""Sharded safetensors of our own writing: what safetensors reads back, in shards of the wanted size,
continued by records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlpmem_ds.formats import weight_shards
from mlpmem_ds.formats.weight_shards import Weight, plan_shards, write_weights_in_shards

TENSORS = {
    "a.weight": torch.randn(7, 5),
    "b.half": torch.randn(3, 3).to(torch.bfloat16),
    "c.flag": torch.tensor([True, False, True]),
    "d.scalar": torch.tensor(3, dtype=torch.int64),
    "e.transposed": torch.randn(4, 6).T,
    "f.empty": torch.empty(0, 4, dtype=torch.float16),
    "g.byte": torch.arange(5, dtype=torch.uint8),
}


def weights_of(tensors: dict[str, torch.Tensor]) -> dict[str, Weight]:
    return {
        name: Weight(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }


def write(root: Path, max_bytes: int, tensors: dict[str, torch.Tensor] = TENSORS) -> int:
    (root / "records").mkdir(parents=True, exist_ok=True)
    return write_weights_in_shards(root, weights_of(tensors), max_bytes=max_bytes, records=root / "records")


def read(root: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in root.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("max_bytes", [1 << 20, 200, 1])
def test_safetensors_reads_back_every_tensor(max_bytes: int, tmp_path: Path) -> None:
    num_files = write(tmp_path, max_bytes)
    assert (
        num_files
        == len(list(tmp_path.glob("*.safetensors")))
        == {1 << 20: 1, 200: 2, 1: len(TENSORS)}[max_bytes]
    )
    found = read(tmp_path)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    if num_files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(TENSORS)
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_shards_hold_as_much_as_fits() -> None:
    assert plan_shards({"a": 3, "b": 3, "c": 4, "d": 20, "e": 1}, 10) == [["a", "b", "c"], ["d"], ["e"]]
    assert plan_shards({"a": 99}, 10) == [["a"]]


def test_finished_shards_are_kept_and_damaged_ones_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        weight_shards, "write_safetensors", _stop_at("00003-of", weight_shards.write_safetensors)
    )
    with pytest.raises(RuntimeError, match="stopped"):
        write(tmp_path, 1)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    (tmp_path / "model-00002-of-00007.safetensors").write_bytes(b"damaged")
    assert write(tmp_path, 1) == len(TENSORS) - 1
    assert write(tmp_path, 1) == 0
    assert {name: tensor.tolist() for name, tensor in read(tmp_path).items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


def _stop_at(part: str, function):  # type: ignore[no-untyped-def]
    def wrapped(path, weights):  # type: ignore[no-untyped-def]
        if part in path.name:
            raise RuntimeError("stopped")
        function(path, weights)

    return wrapped
