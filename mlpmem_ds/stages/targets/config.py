"""The flags of `write_targets`, and what decides its audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.collectives.opening import Exchange
from mlpmem_ds.formats.target_encoding import Encoding
from mlpmem_ds.formats.target_shards import Container
from mlpmem_ds.maths.exact_limit import MAX_KEYS_FOR_EXACT
from mlpmem_ds.maths.weighting import DEFAULT_PERPLEXITY, Kind, default_perplexity
from mlpmem_ds.stages import shared_flags

_MAX_NEIGHBOURS = 2**16 - 1
"""entries of a row are counted in uint16"""


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Search each key's neighbours among all keys and write them as sparse next-token distributions."""

    example: ClassVar[str] = (
        "mpirun -n 4 python tools/write_targets.py --keys RUN/keys --index RUN/index --output RUN/targets"
        " --k 1024"
    )
    memory_flags: ClassVar[tuple[str, ...]] = ("--batch-positions",)

    keys: Path = option("key directory of extract_keys", by_url=True)
    output: Path = option("target directory to write")
    index: Path | None = option(
        "index directory of build_index over the same keys; not needed for exact search", None, by_url=True
    )
    k: int = option("neighbours of a position", 1024, at_least=1, at_most=_MAX_NEIGHBOURS)
    weighting: Kind = option(
        "how a neighbour's weight falls with its distance d: softmax = exp(-d²/T); inverse-distance ="
        " 1/(1 + (d² - d₁²)/T), with d₁ of the nearest one, which leaves far ones more",
        "softmax",
    )
    temperature: str = option("T of --weighting, in squared key units, or auto", "auto", identity="resolved")
    neighbour_perplexity: float | None = option(
        "with auto: how many neighbours count, as exp of the entropy of their weights (default:"
        f" {DEFAULT_PERPLEXITY:g}, or half of --k where that is less)",
        None,
        above=1,
        identity="resolved",
    )
    mass: float = option("probability to keep of each row", 0.999, above=0, at_most=1)
    search: Literal["auto", "exact", "ivf"] = option(
        "compare with all keys, or with those of the nearest lists; auto = exact up to "
        f"{MAX_KEYS_FOR_EXACT['cpu']:,} keys, {MAX_KEYS_FOR_EXACT['cuda']:,} with a GPU",
        "auto",
        identity="resolved",
    )
    nprobe: int = option("with ivf: lists that a query probes", 32, at_least=1, identity="resolved")
    exclude: Literal["none", "same-document"] = option(
        "which neighbours are left out, in addition to the position itself", "none"
    )
    exclude_window: int = option("positions on either side that are no neighbours", 0, at_least=0)
    corpus: Path | None = option(
        "corpus directory of the keys, for --exclude same-document", None, by_url=True
    )
    shard_positions: int | None = option(
        "positions in a shard file, a multiple of the corpus' block size (default: 131072; above 262 million"
        " positions the power of two that gives 1,000 shards or more, at most 1048576)",
        None,
        at_least=1,
        identity="resolved",
    )
    batch_positions: int = option("queries searched at once", 16384, at_least=1, identity="none")
    lists: Path | None = option(
        "with ivf: directory for the keys in the order of the lists, on a disk that all ranks share; kept for"
        " further runs (default: inside --output, removed at the end)",
        None,
        identity="none",
    )
    encoding: Encoding = option(
        "compact = half the bytes, within .00275 of total variation; exact = ids and float16 probabilities",
        "compact",
    )
    container: Container = option(
        "tar.zst = multi-frame zstd, smaller; tar = plain tar of zstd members", "tar.zst"
    )
    audit: int | None = option(
        "positions to compare with exact search over all keys when the targets are written (default: none)",
        None,
        at_least=1,
        identity="none",
    )
    raw_keys: Path | None = option(
        "with --audit: key directory of extract_keys --codec raw of the same corpus and model, as the truth",
        None,
        identity="none",
        by_url=True,
    )
    threads: int | None = shared_flags.threads()
    exchange: Exchange = shared_flags.exchange()
    rank_timeout_seconds: float = shared_flags.rank_timeout_seconds()

    def check(self) -> None:
        if self.temperature != "auto" and not _is_positive(self.temperature):
            raise UserError(f"--temperature must be auto or a number above 0, not {self.temperature}")
        if self.temperature != "auto" and self.neighbour_perplexity is not None:
            raise UserError(
                f"--neighbour-perplexity {self.neighbour_perplexity:g} is what --temperature auto aims at,"
                f" and --temperature {self.temperature} is given: leave one of them out"
            )
        if self.temperature == "auto" and self.k == 1:
            raise UserError(
                "--k 1: one neighbour has all the weight at any temperature: give --temperature 1"
            )
        if self.temperature == "auto":
            check_perplexity(self.perplexity, self.k)
        if self.exclude == "same-document" and self.corpus is None:
            raise UserError("--exclude same-document needs to know the documents: give --corpus")
        if self.audit is None:
            self.refuse_unused("raw_keys", of="--audit")

    @property
    def fixed_temperature(self) -> float | None:
        """--temperature as a number; None where it is fitted."""
        return None if self.temperature == "auto" else float(self.temperature)

    @property
    def perplexity(self) -> float:
        """The perplexity of the neighbours' weights that --temperature auto aims at."""
        return default_perplexity(self.k) if self.neighbour_perplexity is None else self.neighbour_perplexity


def check_perplexity(perplexity: float, k: int, *, flag: str = "--neighbour-perplexity") -> None:
    """Raises UserError where the weights of `k` neighbours cannot have this perplexity, which is above 1."""
    if perplexity >= k:
        raise UserError(
            f"{flag} {perplexity:g} must lie between 1 and --k {k}: give {flag}, such as half of --k"
        )


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Flags):
    """What decides an audit of targets."""

    targets: Path = option("target directory", identity="none")
    positions: int = option("sampled positions", 10_000, at_least=1)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
