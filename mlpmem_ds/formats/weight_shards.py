"""Weights as safetensors in one file or several, written with one tensor in memory at a time.

    model.safetensors                                   where one file is enough
    model-00001-of-00003.safetensors, …                 else, with model.safetensors.index.json

The bytes depend on the tensors, their order and the largest shard alone. A shard appears whole, and a record
of it then; a later call with the same directory of records keeps the shards that match theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import (
    FileRecord,
    fault_of_file,
    link_or_copy,
    publish,
    publish_json,
    read_json,
    read_json_object,
    record_file,
)
from mlpmem_ds.formats.file_marks import LFS_POINTER

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor that is not made before it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, packed into shards of at most `max_bytes`; a larger tensor has a shard of its
    own."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if shards[-1] and total + size > max_bytes:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def write_weights_in_shards(
    root: Path,
    weights: Mapping[str, Weight],
    *,
    max_bytes: int,
    records: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write `root`/model*.safetensors (and the index); the number of shards that had to be written.

    Args:
        root: an existing directory.
        weights: name → tensor, in the order of the files.
        max_bytes: of a shard.
        records: an existing directory for the records of finished shards.
        progress: called with the bytes of each shard that is there.
    """
    shards = plan_shards({name: weight.num_bytes for name, weight in weights.items()}, max_bytes)
    names = shard_names("model", len(shards))
    num_written = 0
    for file, members in zip(names, shards, strict=True):
        if not _is_done(root, records / f"{file}.json"):
            with publish(root / file) as temporary:
                write_safetensors(temporary, {name: weights[name] for name in members})
            publish_json(records / f"{file}.json", record_file(root, file).to_json())
            num_written += 1
        progress((root / file).stat().st_size)
    total = sum(weight.num_bytes for weight in weights.values())
    publish_index(root, "model", dict(zip(names, shards, strict=True)), total)
    return num_written


def shard_names(stem: str, count: int) -> list[str]:
    """`model.safetensors`, or `model-00001-of-00003.safetensors` and so on."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def publish_index(root: Path, stem: str, members_of: Mapping[str, Sequence[str]], num_bytes: int) -> None:
    """Write which file holds which weight, where there are several: the last file, without which they are
    not whole."""
    if len(members_of) > 1:
        weight_map = {name: file for file, members in members_of.items() for name in members}
        publish_json(
            root / f"{stem}.safetensors.index.json",
            {"metadata": {"total_size": num_bytes}, "weight_map": weight_map},
        )


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Weights on disk, in `root`/`stem`.safetensors or in several files with an index."""

    root: Path
    stem: str = "model"

    def paths(self) -> list[Path]:
        """All files, the index last.

        Raises:
            FileNotFoundError: there are none.
            DamagedDataError: the index cannot be read.
        """
        index = self.root / f"{self.stem}.safetensors.index.json"
        if not index.is_file():
            single = self.root / f"{self.stem}.safetensors"
            if not single.is_file():
                raise FileNotFoundError(single)
            return [single]
        files = sorted(set(read_json_object(index).get("weight_map", {}).values()))
        return [*(self.root / file for file in files), index]

    def missing(self) -> Path | None:
        """A file of them that is not there; None where all are.

        Raises:
            DamagedDataError: the index cannot be read.
        """
        try:
            return next((path for path in self.paths() if not path.is_file()), None)
        except FileNotFoundError:
            return self.root / f"{self.stem}.safetensors"

    def link_to(self, folder: Path) -> None:
        """Give the files second names in a folder, the index last; copies where the file system has no links.

        Raises:
            OSError: a file is missing, or cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.paths():
            with publish(folder / path.name) as temporary:
                link_or_copy(path, temporary)

    def read(self) -> dict[str, torch.Tensor]:
        """By name; mapped from the files, so that what is not used is not read.

        Raises:
            FileNotFoundError: a file is missing.
            DamagedDataError: one cannot be read.
        """
        weights: dict[str, torch.Tensor] = {}
        for path in self.paths():
            if path.suffix == ".safetensors":
                try:
                    weights |= load_file(path)
                except FileNotFoundError:
                    raise
                except Exception as error:  # safetensors raises its own family, which is not an OSError
                    raise DamagedDataError(f"{path} cannot be read ({error})") from error
        return weights


def fault_of_weights(path: Path) -> str | None:
    """What is wrong with a weights file, safetensors or pickled, as far as its first bytes tell."""
    with open(path, "rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return (
            f"{path.name} is a pointer of Git LFS, not the weights: fetch them (git lfs pull, or hf download)"
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except (SafetensorError, ValueError) as error:
            return f"{path.name} is cut short or damaged ({error}): download or save it again"
    if not start.startswith((b"PK", b"\x80")):
        return f"{path.name} is not a file of torch.save: download or save it again"
    return None


def _is_done(root: Path, record: Path) -> bool:
    if not record.is_file():
        return False
    try:
        return fault_of_file(root, FileRecord(**read_json(record))) is None
    except (TypeError, ValueError):  # a damaged one too
        return False


def write_safetensors(path: Path, weights: Mapping[str, Weight]) -> None:
    """One file, tensor by tensor.

    The length of the header (uint64), the header (JSON, padded to 8 bytes), then the tensors' bytes in a row.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # By falling size of their numbers, so that every tensor is aligned to its own.
    order: Sequence[str] = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    for name in order:
        weight = weights[name]
        end = offset + weight.num_bytes
        header[name] = {
            "dtype": _DTYPES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = weights[name].read().contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != (weights[name].dtype, weights[name].shape):
                raise AssertionError(f"{name} is not as it was announced")
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
