"""Read a key directory: keys, values, log-probabilities and memory inputs by position. See README.md.

N, n positions, D width of the keys' base, E size of a stored key, I input size, G groups of an input's
numbers.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import numpy as np

from mlpmem_ds.core.array_files import read_array
from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.core.folders import folder_of
from mlpmem_ds.core.manifest import CompleteStage, Manifest, read_stage
from mlpmem_ds.core.typed_json import from_json
from mlpmem_ds.formats.corpus import Counts
from mlpmem_ds.formats.rows_by_file import rows_by_file
from mlpmem_ds.maths.codec import MassiveDimension, clip_massive

Point: TypeAlias = Literal["ffn_input", "layer_output", "final_norm"]
"""where in a layer a vector was read, as `models.backbone` has it (which must not import this)"""
CODEC_FILES = ("codec/codec.json", "codec/mean.npy", "codec/rotation.npy")
INPUT_GROUP = 128
"""numbers of an int8 input that share a scale"""
_MIN_MAPPED, _MAX_MAPPED = 64, 8192
"""files mapped at a time: Linux allows a process 65,530 maps, each holds an open file, and a large directory
has more units; a training window of 1,024 blocks may lie in 1,024 of them"""


def unit_name(first: int) -> str:
    """The unit that starts at position `first`, as in its file names."""
    return f"{first:012d}"


def file_name(array: str, first: int, *, unit_positions: int, total: int) -> str:
    """The file of an array of the unit that starts at position `first` of `total`: above 1,000 units in a
    folder of the array, a thousand a folder."""
    folder = folder_of(first // unit_positions, -(-total // unit_positions))
    return f"{array}/{folder}{array}-{unit_name(first)}.npy" if folder else f"{array}-{unit_name(first)}.npy"


@dataclass(frozen=True, kw_only=True)
class CodecFile:
    """codec/codec.json: what an int8 codec was fitted on, and what it keeps of it."""

    scale: float
    energy_kept: float
    positions: int
    massive_dimensions: tuple[MassiveDimension, ...]


@dataclass(frozen=True, kw_only=True)
class CodecManifest:
    """How keys are stored.

    `dim` numbers a key; `scale` 1 for raw keys, `raw_dtype` None for int8 ones; `energy_kept` of the sample's
    variance, `clipped_share` of the stored numbers.
    """

    name: Literal["int8", "raw"]
    dim: int
    scale: float
    raw_dtype: Literal["float16", "bfloat16"] | None
    energy_kept: float
    clipped_share: float
    massive_dimensions: tuple[MassiveDimension, ...]


@dataclass(frozen=True, kw_only=True)
class KeysManifest(Manifest):
    """Keys: their positions, and where in which model keys and memory inputs were read.

    `key_size` and `input_width` numbers in a state of the keys' model and in a memory input; `input_size` the
    latter, or 0 where inputs are not stored; `num_layers` and `layers_path` of the keys' model,
    `input_num_layers` and `input_layers_path` of the base; `head_size` rows of the base's output head;
    `dtype` and `attention` of the forward passes, None where they were not ours.
    """

    FORMAT: ClassVar[str] = "keys"
    VERSION: ClassVar[int] = 1

    codec: CodecManifest
    num_positions: int
    unit_positions: int
    split: str
    block_size: int
    vocab_size: int
    vocabulary_sha256: str
    key_size: int
    key_layer: int
    key_point: Point
    num_layers: int
    layers_path: str | None
    input_codec: Literal["none", "bf16", "int8"]
    input_size: int
    input_width: int
    input_layer: int
    input_point: Point
    input_num_layers: int
    input_layers_path: str | None
    head_size: int
    dtype: str | None
    attention: str | None
    input_earlier_layers: tuple[int, ...] = ()
    """layers whose states stand in an input before that of `input_layer`; see `CapturePoint`"""
    begin_of_window_ids: tuple[int, ...] | None = ()
    """tokens that the base read before each window that does not begin with them; None where the forward
    passes were not ours"""
    counts: Counts = "all"
    """of the corpus: with `answers` a row is a position whose value is of an answer (counted_rows.py)"""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How a key is stored: int8 codes by mean [D] and rotation [D, E]; where both are None the key itself in
    `raw_dtype`."""

    mean_D: np.ndarray | None
    rotation_DE: np.ndarray | None
    scale: float
    massive: tuple[MassiveDimension, ...] = ()
    raw_dtype: str = "float16"

    def store(self, states_nD: np.ndarray) -> tuple[np.ndarray, int]:
        """Rows of `keys-*.npy` for states [n, D], and how many numbers were clipped.

        int8 codes, float16 (infinite where a number is beyond 65,504), or bit patterns of bfloat16.
        """
        if self.mean_D is not None and self.rotation_DE is not None:
            return encode(clip_massive(states_nD, self.massive), self.mean_D, self.rotation_DE, self.scale)
        if self.raw_dtype == "bfloat16":
            return bfloat16_bits(states_nD), 0
        with np.errstate(over="ignore"):
            return states_nD.astype(np.float16), 0

    def encode(self, states_nD: np.ndarray) -> np.ndarray:
        """States as `Keys.read("keys")` gives stored ones: int8, float16, or float32 with bfloat16's
        values."""
        stored, _ = self.store(states_nD)
        return bfloat16_values(stored) if stored.dtype == np.uint16 else stored


@dataclass(frozen=True, kw_only=True)
class Keys(CompleteStage[KeysManifest]):
    """A complete key directory; arrays are memory-mapped until asked for."""

    _arrays: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def num_positions(self) -> int:
        return self.manifest.num_positions

    @property
    def codec(self) -> str:
        """`int8` or `raw`."""
        return self.manifest.codec.name

    @property
    def raw_dtype(self) -> str:
        """`float16` or `bfloat16`, of the codec `raw`."""
        return self.manifest.codec.raw_dtype or "float16"

    @property
    def dim(self) -> int:
        """Numbers in a key on disk."""
        return self.manifest.codec.dim

    @property
    def scale(self) -> float:
        """Squared key units = scale² x squared distance of the stored vectors (1 for raw keys)."""
        return self.manifest.codec.scale

    @property
    def input_codec(self) -> str:
        """`bf16`, `int8`, or `none` where the memory's inputs are not stored."""
        return self.manifest.input_codec

    @property
    def input_size(self) -> int:
        """Numbers in a stored memory input; 0 where inputs are not stored."""
        return self.manifest.input_size

    @property
    def has_log_probabilities(self) -> bool:
        """Whether the base's log-probabilities are stored; an imported datastore has none."""
        return self.files.find(self.file_name("log_probabilities", 0)) is not None

    @property
    def input_point(self) -> Point:
        """Where in the input layer the memory's inputs are read."""
        return self.manifest.input_point

    @property
    def corpus_sha256(self) -> str:
        return self.inputs["corpus"]

    @property
    def model_sha256(self) -> str:
        """Fingerprint of the model that gave the keys."""
        return self.inputs["model"]

    @property
    def base_sha256(self) -> str:
        """Fingerprint of the base that the memory joins: it gave the memory's inputs and the
        log-probabilities."""
        return self.inputs.get("input_model", self.model_sha256)

    @property
    def blocks(self) -> list[Block]:
        """The units as ranges of positions."""
        return split_blocks(self.num_positions, self.manifest.unit_positions)

    def unit(self, array: str, first: int) -> np.ndarray:
        """One unit's array, memory-mapped: `keys`, `values`, `log_probabilities`, `inputs`, `input_scales` or
        (where answers alone count) `positions`.

        Raw keys in bfloat16 come as float32, in memory.
        """
        return self._decoded(array, self._stored(array, first))

    def read(self, array: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """An array's rows [start, stop) across units, copied to memory."""
        stop = self.num_positions if stop is None else min(stop, self.num_positions)
        size = self.manifest.unit_positions
        sample = self._stored(array, 0)
        rows = np.empty((max(stop - start, 0), *sample.shape[1:]), sample.dtype)
        for first in range(start // size * size, stop, size):
            part = self._stored(array, first)[max(start - first, 0) : stop - first]
            place = max(first - start, 0)
            rows[place : place + len(part)] = part
        return self._decoded(array, rows)

    def gather(self, array: str, positions_N: np.ndarray) -> np.ndarray:
        """An array's rows at any positions, in their order."""
        positions_N = np.asarray(positions_N, dtype=np.int64)
        unit_of_N = positions_N // self.manifest.unit_positions
        sample = self._stored(array, 0)
        rows = np.empty((len(positions_N), *sample.shape[1:]), dtype=sample.dtype)
        whole_rows_N = _whole_rows(rows)
        for unit, chosen in rows_by_file(unit_of_N):
            first = unit * self.manifest.unit_positions
            whole_rows_N[chosen] = _whole_rows(self._stored(array, first))[positions_N[chosen] - first]
        return self._decoded(array, rows)

    def bytes_of(self, *arrays: str) -> int:
        """Bytes on disk of these arrays; `codec` counts as one."""
        starts = [start for array in arrays for start in (f"{array}/", f"{array}-")]
        return sum(record.bytes for start in starts for record in self.files.starting_with(start))

    def check(self, array: str, block: Block | None = None) -> None:
        """Compare an array's files, all of them or that of one unit, with their checksums.

        Raises:
            DamagedDataError: one has another.
        """
        units = self.blocks if block is None else [block]
        self.check_files(self.file_name(array, unit.start) for unit in units)

    def array_files(self, *arrays: str) -> list[str]:
        """Names of the files of these arrays, as far as they are stored, unit by unit."""
        names = (self.file_name(array, unit.start) for unit in self.blocks for array in arrays)
        return [name for name in names if self.files.find(name) is not None]

    def file_name(self, array: str, first: int) -> str:
        """The file of an array of the unit that starts at position `first`."""
        return file_name(array, first, unit_positions=self.manifest.unit_positions, total=self.num_positions)

    def read_inputs(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The memory's inputs of the positions [start, stop) as bit patterns of bfloat16, uint16 [n, I],
        for any codec.

        Raises:
            UserError: they are not stored.
        """
        if self.input_codec == "none":
            raise UserError(
                f"{self.root} holds no memory inputs: extract the keys with --input-codec bf16 or int8, or"
                " train online"
            )
        stored_nI = self.read("inputs", start, stop)
        if self.input_codec == "bf16":
            return stored_nI
        return bfloat16_bits(dequantize_inputs(stored_nI, self.read("input_scales", start, stop)))

    def gather_inputs(self, positions_n: np.ndarray) -> np.ndarray:
        """The memory's inputs at any positions, in their order, as `read_inputs` gives them."""
        stored_nI = self.gather("inputs", positions_n)
        if self.input_codec == "bf16":
            return stored_nI
        return bfloat16_bits(dequantize_inputs(stored_nI, self.gather("input_scales", positions_n)))

    def read_inputs_ahead(self, start: int, stop: int) -> None:
        """Tell the system that the inputs of the positions [start, stop) are needed soon: it then reads them
        in one piece, into memory that it may take back. Where it does not know how, nothing happens."""
        size = self.manifest.unit_positions
        for array in ("inputs",) if self.input_codec == "bf16" else ("inputs", "input_scales"):
            for first in range(start // size * size, min(stop, self.num_positions), size):
                mapped = self._stored(array, first)
                begin, end = max(start - first, 0), min(stop - first, len(mapped))
                row_bytes, header = mapped.strides[0], mapped.offset  # type: ignore[attr-defined]
                place, count = header + begin * row_bytes, (end - begin) * row_bytes
                with contextlib.suppress(OSError), open(mapped.filename, "rb") as stream:  # type: ignore[attr-defined]
                    os.posix_fadvise(stream.fileno(), place, count, os.POSIX_FADV_WILLNEED)

    def load_codec(self) -> Codec:
        """How a state becomes a key of this directory.

        Raises:
            DamagedDataError: a file of the codec does not have its checksum.
        """
        if self.codec == "raw":
            return Codec(mean_D=None, rotation_DE=None, scale=1.0, raw_dtype=self.raw_dtype)
        self.check_files(CODEC_FILES)
        return read_codec(self.root)

    def _stored(self, array: str, first: int) -> np.ndarray:
        """One unit's array as it is on disk, memory-mapped."""
        name = self.file_name(array, first)
        with self._lock:
            if name in self._arrays:
                self._arrays.move_to_end(name)
                return self._arrays[name]
        mapped = read_array(self.path_of(name), mapped=True)
        with self._lock:
            while len(self._arrays) >= _max_mapped():
                self._arrays.popitem(last=False)
            self._arrays[name] = mapped
        return mapped

    def _decoded(self, array: str, rows: np.ndarray) -> np.ndarray:
        return bfloat16_values(rows) if array == "keys" and rows.dtype == np.uint16 else rows


@cache
def _max_mapped() -> int:
    """Files that may be mapped at a time: half of those that this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_MAPPED if limit < 0 else max(_MIN_MAPPED, min(limit // 2, _MAX_MAPPED))


def _whole_rows(rows: np.ndarray) -> np.ndarray:
    """The same memory with a row as one item: rows are then copied whole, in half the time."""
    if rows.ndim == 1:
        return rows
    return np.asarray(rows).view(f"V{rows.shape[1] * rows.itemsize}")[:, 0]


def open_keys(root: Path, *, flag: str = "--keys") -> Keys:
    """Open a complete key directory.

    Raises:
        UserError: no keys there.
        DamagedDataError: files missing, of another size or version.
    """
    return read_stage(Keys, KeysManifest, root, flag=flag)


def read_codec(root: Path) -> Codec:
    """The int8 codec of a key directory, complete or not."""
    path = root / "codec/codec.json"
    fitted = from_json(CodecFile, read_json(path), where=str(path), version=KeysManifest.VERSION)
    return Codec(
        mean_D=read_array(root / "codec/mean.npy"),
        rotation_DE=read_array(root / "codec/rotation.npy"),
        scale=fitted.scale,
        massive=fitted.massive_dimensions,
    )


def encode(
    states_ND: np.ndarray, mean_D: np.ndarray, rotation_DE: np.ndarray, scale: float
) -> tuple[np.ndarray, int]:
    """int8 codes [N, E] of states [N, D], and how many numbers were clipped."""
    scaled_NE = np.rint((states_ND.astype(np.float32) - mean_D) @ rotation_DE / np.float32(scale))
    return np.clip(scaled_NE, -127, 127).astype(np.int8), int((np.abs(scaled_NE) > 127).sum())


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 → bit patterns of bfloat16 as uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16 as uint16 → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def num_input_groups(input_size: int) -> int:
    """Scales of an int8 input."""
    return -(-input_size // INPUT_GROUP)


def dequantize_inputs(codes_nI: np.ndarray, scales_nG: np.ndarray) -> np.ndarray:
    """The inputs that these codes and scales stand for, float32 [n, I]."""
    values_nGg = _grouped(codes_nI.astype(np.float32)) * scales_nG[:, :, None]
    return np.ascontiguousarray(values_nGg.reshape(len(codes_nI), -1)[:, : codes_nI.shape[1]])


def _grouped(rows_nI: np.ndarray) -> np.ndarray:
    """[n, I] → [n, G, INPUT_GROUP], filled up with zeros."""
    num_rows, size = rows_nI.shape
    num_groups = num_input_groups(size)
    padding = num_groups * INPUT_GROUP - size
    padded = np.pad(rows_nI, ((0, 0), (0, padding))) if padding else rows_nI
    return padded.reshape(num_rows, num_groups, INPUT_GROUP)
