"""The flags of `write_targets`, and the checks that need nothing but them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.targets import Container, Encoding
from mlpmem_ds.maths.knn import max_keys_for_exact
from mlpmem_ds.maths.weighting import DEFAULT_PERPLEXITY, default_perplexity

_MAX_COUNTS = 2**16 - 1  # entries of a row are counted in uint16


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of tools/write_targets.py."""

    keys: Path = option("key directory of extract_keys")
    output: Path = option("target directory to write")
    index: Path | None = option(
        "index directory of build_index over the same keys; not needed for exact search",
        None,
        identity="none",
    )
    k: int = option("neighbours of a position", 1024)
    temperature: str = option("of the weights exp(-d²/T), in squared key units, or auto", "auto")
    neighbour_perplexity: float = option(
        "with auto: how many neighbours shall count, exp of the weights' entropy; "
        f"0 is {DEFAULT_PERPLEXITY:g}, or half of --k where that is less",
        0.0,
    )
    mass: float = option("probability to keep of each row, above 0 and at most 1", 0.999)
    search: Literal["auto", "exact", "ivf"] = option(
        "compare with all keys, or with those of the nearest lists; auto = exact up to "
        f"{max_keys_for_exact('cpu'):,} keys, {max_keys_for_exact('cuda'):,} with a GPU",
        "auto",
    )
    nprobe: int = option("with ivf: lists that a query probes", 32)
    exclude: Literal["none", "same-document"] = option(
        "which neighbours a position may not have besides itself", "none"
    )
    exclude_window: int = option("positions on either side that are no neighbours", 0)
    corpus: Path | None = option(
        "corpus directory of the keys, for --exclude same-document", None, identity="none"
    )
    shard_positions: int = option("positions in a shard file, a multiple of the corpus' block size", 131072)
    batch_positions: int = option("queries searched at once", 16384, identity="none")
    lists: Path | None = option(
        "with ivf: directory for the keys in the order of the lists, on a disk that all ranks share; kept for"
        " further runs (default: inside --output, removed at the end)",
        None,
        identity="none",
    )
    encoding: Encoding = option(
        "compact = half the bytes, within .0025 of total variation; exact = ids and float16 probabilities",
        "compact",
        identity="none",
    )
    container: Container = option(
        "tar.zst = multi-frame zstd, smaller; tar = plain tar of zstd members", "tar.zst", identity="none"
    )
    audit: int = option(
        "positions to compare with exact search over all keys when the targets are written, 0 = none",
        0,
        identity="none",
    )
    raw_keys: Path | None = option(
        "with --audit: key directory of --codec raw over the same corpus and model, as the truth",
        None,
        identity="none",
    )
    threads: int = option("CPU threads of each rank, 0 = as the environment says", 0, identity="none")

    def __post_init__(self) -> None:
        if not 1 <= self.k <= _MAX_COUNTS:
            raise UserError(f"--k {self.k} must be 1 to {_MAX_COUNTS}")
        if self.temperature != "auto" and not _positive(self.temperature):
            raise UserError(f"--temperature {self.temperature} must be auto or a number above 0")
        if self.neighbour_perplexity == 0:
            object.__setattr__(self, "neighbour_perplexity", default_perplexity(self.k))
        if self.temperature == "auto" and self.k == 1:
            raise UserError(
                "--k 1: one neighbour has all the weight at any temperature: give --temperature 1"
            )
        if self.temperature == "auto" and not 1 < self.neighbour_perplexity < self.k:
            raise UserError(
                f"--neighbour-perplexity {self.neighbour_perplexity:g} must lie between 1 and --k {self.k}:"
                " give --neighbour-perplexity, such as half of --k"
            )
        if not 0 < self.mass <= 1:
            raise UserError(f"--mass {self.mass:g} must be above 0 and at most 1")
        for name in ("nprobe", "shard_positions", "batch_positions"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        for name in ("exclude_window", "audit", "threads"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 0 or more")
        if self.exclude == "same-document" and self.corpus is None:
            raise UserError("--exclude same-document needs to know the documents: give --corpus")
        if self.raw_keys is not None and not self.audit:
            raise UserError("--raw-keys is what an audit compares with: say --audit 10000, or leave it out")


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
