"""Part of `train`: a memory whose weights a training starts from (`--init-from`), opened and checked.

    OUTPUT of a training     its weights/ is taken
    OUTPUT/weights           config.json, model.safetensors
    EXPORT                   config.json, model*.safetensors; only the tensors of the memory are read; one of
                             several memories (a bank) is refused

A training in bfloat16 starts from the weights as bfloat16 holds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import content_hash, read_json_object
from mlpmem_ds.core.manifest import format_of
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.model_files import fetch_directory
from mlpmem_ds.engines.processes import gather_values
from mlpmem_ds.formats.model_directory import check_model_files
from mlpmem_ds.formats.trained_models import MemoryManifest, read_memory_description
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

_EXPORT_PREFIX = "memory."
_FLAG = "--init-from"


@dataclass(frozen=True, kw_only=True)
class InitialMemory:
    """A memory on disk; each tensor is read when it is asked for."""

    root: Path
    memory: MemoryConfig
    vocabulary_sha256: str | None
    """None where an export does not say it"""
    _places: Mapping[str, tuple[Path, str]] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """Of its tensors, in order."""
        return sorted(self._places)

    def file_of(self, name: str) -> Path:
        """Where a tensor is."""
        return self._places[name][0]

    def tensor(self, name: str) -> torch.Tensor:
        """float32, by the name that it has in a plain `Memory`."""
        return _read(*self._places[name])


def open_initial_memory(root: Path, *, flag: str = _FLAG) -> InitialMemory:
    """Find the memory and check that every tensor is there and of its shape; no numbers are read.

    Raises:
        UserError: no memory there, one that is not finished, or an export of several.
        DamagedDataError: its files contradict each other or cannot be read.
    """
    root = fetch_directory(str(root), flag=flag)
    place = root / "weights" if (root / "weights").is_dir() else root
    if not (place / "config.json").is_file():
        is_unfinished = format_of(root) == MemoryManifest.FORMAT
        raise UserError(
            f"{flag} {root} is a training that has not finished: run its launch/train.py command again, or"
            " convert its newest checkpoint with tools/convert_checkpoint.py and give that"
            if is_unfinished
            else (
                f"{flag} {root} holds no memory: give an output of launch/train.py, its weights/, or an"
                " export"
            )
        )
    check_model_files(place, flag=flag, names=["config.json"])
    description = read_json_object(place / "config.json")
    shape: Any
    if description.get("format") == f"mlpmem-{MemoryManifest.FORMAT}":
        described = read_memory_description(place / "config.json")
        vocabulary: str | None = described.provenance.vocabulary_sha256
        shape, prefix = dict(described.memory), ""
    elif description.get("model_type") == "mlpmem":
        if description.get("further_memories"):
            raise UserError(
                f"{flag} {root} is an export of several memories (a bank): give the output of one of their"
                " trainings"
            )
        shape, prefix = description.get("memory_config"), _EXPORT_PREFIX
        vocabulary = description.get("vocabulary_sha256") or None
    else:
        raise UserError(
            f"{flag} {root} is another model, not a memory: give an output of launch/train.py or an export"
        )
    try:
        memory = MemoryConfig.from_dict(shape)
    except (ValueError, TypeError) as error:
        raise DamagedDataError(f"{flag} {root}: {error}: make it again") from error
    places, shapes = _locate(place, prefix, flag)
    _check_shapes(f"{flag} {root}", memory, shapes)
    return InitialMemory(root=root, memory=memory, vocabulary_sha256=vocabulary, _places=places)


def _locate(
    place: Path, prefix: str, flag: str
) -> tuple[dict[str, tuple[Path, str]], dict[str, tuple[int, ...]]]:
    """Our name → (file, its name there), and → its shape."""
    places: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.startswith(prefix):
                        own = name.removeprefix(prefix)
                        places[own], shapes[own] = (path, name), tuple(file.get_slice(name).get_shape())
        except Exception as error:  # safetensors raises a family of its own
            raise _damaged(path, error, flag) from error
    return places, shapes


def _check_shapes(name: str, memory: MemoryConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Memory(memory).state_dict().items()}
    if set(expected) != set(shapes):
        differing = sorted(set(expected) ^ set(shapes))
        raise DamagedDataError(
            f"{name}: {len(differing)} tensors are missing or too many, the first is {differing[0]}:"
            " make it again"
        )
    for tensor, shape in sorted(expected.items()):
        if shapes[tensor] != shape:
            raise DamagedDataError(
                f"{name}: {tensor} is of shape {list(shapes[tensor])}, expected is {list(shape)}:"
                " make it again"
            )


def hash_initial_memory(initial: InitialMemory, world: World) -> str:
    """SHA-256 of shape and float32 numbers, which are read once: each rank takes its share of the tensors.

    It is the same for a training's output, its weights/ and a float32 export of it. Collective.

    Raises:
        DamagedDataError: numbers that are not finite, or a file that cannot be read.
    """
    shares = gather_values(_hash_share(initial, deal(initial.names, world.rank, world.size)), world)
    for said in (share for share in shares if isinstance(share, str)):
        raise DamagedDataError(said)
    hashes = sorted(pair for share in shares for pair in share)
    return content_hash([initial.memory.to_dict(), hashes])


def _hash_share(initial: InitialMemory, names: Sequence[str]) -> list[list[str]] | str:
    """Name and hash of these tensors; what is wrong with one of them, for all ranks to say."""
    hashes = []
    files = sorted({initial.file_of(name) for name in names})
    try:
        for path in files:  # a large memory has many, of which a rank reads its share
            check_model_files(path.parent, flag=_FLAG, names=[path.name])
        for name in names:
            tensor = initial.tensor(name)
            if not tensor.isfinite().all():
                return f"{_FLAG} {initial.root}: {name} is not finite: make it again"
            hashes.append([name, hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()])
    except DamagedDataError as error:
        return str(error)
    return hashes


def _read(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name).float()
    except Exception as error:  # as above
        raise _damaged(path, error) from error
    return tensor


def _damaged(path: Path, error: Exception, flag: str = _FLAG) -> DamagedDataError:
    return DamagedDataError(f"{flag}: {path} cannot be read ({error}): make it again, or copy it again")


def check_fits(
    initial: InitialMemory, *, required: Mapping[str, tuple[str, object]], vocabulary_sha256: str
) -> None:
    """Make sure that a training can start from this memory.

    Args:
        initial: the memory.
        required: field of MemoryConfig → (what asks for it, the value).
        vocabulary_sha256: of the corpus.

    Raises:
        UserError: says what differs.
    """
    for name, (who, value) in required.items():
        own_value = getattr(initial.memory, name)
        if own_value != value:
            raise UserError(
                f"{_FLAG} {initial.root} has {name.replace('_', ' ')} {own_value}, and {who} {value}: give a"
                " memory that fits, or leave out the flag"
            )
    own_vocabulary = initial.vocabulary_sha256
    if own_vocabulary not in (None, vocabulary_sha256):
        raise UserError(
            f"{_FLAG} {initial.root} was trained with another vocabulary ({str(own_vocabulary)[:12]}…) than"
            f" --corpus has ({vocabulary_sha256[:12]}…): its outputs mean other tokens; leave out the flag"
        )
