"""Read a key directory: keys, values, log-probabilities and memory inputs by position. See README.md.

N = positions, D = key size on disk, I = input size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.stage_directory import read_manifest

FORMAT, VERSION = "keys", 1


def unit_name(first: int) -> str:
    """The unit that starts at position `first`, as in its file names."""
    return f"{first:012d}"


@dataclass(frozen=True, kw_only=True)
class Keys:
    """A complete key directory; arrays are memory-mapped until asked for."""

    root: Path
    sha256: str
    manifest: dict[str, Any] = field(repr=False, hash=False)
    _arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_positions(self) -> int:
        return self.manifest["num_positions"]

    @property
    def codec(self) -> str:
        """`int8` or `raw`."""
        return self.manifest["codec"]["name"]

    @property
    def dim(self) -> int:
        """Numbers in a key on disk."""
        return self.manifest["codec"]["dim"]

    @property
    def scale(self) -> float:
        """Squared key units = scale² x squared distance of the stored vectors (1 for raw keys)."""
        return self.manifest["codec"]["scale"]

    @property
    def input_size(self) -> int:
        """Numbers in a memory input; 0 where inputs are not stored."""
        return self.manifest["input_size"]

    @property
    def corpus_sha256(self) -> str:
        return self.manifest["inputs"]["corpus"]

    @property
    def blocks(self) -> list[Block]:
        """The units as ranges of positions."""
        return split_blocks(self.num_positions, self.manifest["unit_positions"])

    def unit(self, array: str, first: int) -> np.ndarray:
        """One unit's array, memory-mapped: `keys`, `values`, `log_probabilities` or `inputs`."""
        name = f"{array}-{unit_name(first)}.npy"
        if name not in self._arrays:
            self._arrays[name] = np.load(self.root / name, mmap_mode="r", allow_pickle=False)
        return self._arrays[name]

    def read(self, array: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """An array's rows [start, stop) across units, copied to memory."""
        stop = self.num_positions if stop is None else stop
        parts = [
            self.unit(array, block.start)[max(start - block.start, 0) : stop - block.start]
            for block in self.blocks
            if block.start < stop and block.stop > start
        ]
        return np.concatenate(parts) if len(parts) != 1 else np.array(parts[0])

    def gather(self, array: str, positions_N: np.ndarray) -> np.ndarray:
        """An array's rows at any positions, in their order."""
        positions_N = np.asarray(positions_N, dtype=np.int64)
        unit_of_N = positions_N // self.manifest["unit_positions"]
        sample = self.unit(array, 0)
        rows = np.empty((len(positions_N), *sample.shape[1:]), dtype=sample.dtype)
        for unit in np.unique(unit_of_N):
            chosen = np.flatnonzero(unit_of_N == unit)
            first = int(unit) * self.manifest["unit_positions"]
            rows[chosen] = self.unit(array, first)[positions_N[chosen] - first]
        return rows


def open_keys(root: Path, *, flag: str = "--keys") -> Keys:
    """Open a complete key directory.

    Raises:
        UserError: no keys there.
        DamagedDataError: files missing, of another size or version.
    """
    manifest, sha256 = read_manifest(root, stage=FORMAT, version=VERSION, flag=flag)
    return Keys(root=root, sha256=sha256, manifest=manifest)


def encode(states_ND: np.ndarray, mean_D: np.ndarray, rotation_DE: np.ndarray, scale: float) -> tuple[np.ndarray, int]:
    """int8 codes [N, E] of states [N, D], and how many numbers were clipped."""
    scaled_NE = np.rint((states_ND.astype(np.float32) - mean_D) @ rotation_DE / np.float32(scale))
    return np.clip(scaled_NE, -127, 127).astype(np.int8), int((np.abs(scaled_NE) > 127).sum())


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 → bit patterns of bfloat16 as uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
