"""The flags of `build_index`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.engines.collectives.opening import Exchange
from mlpmem_ds.stages import shared_flags


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Build a sharded inverted-file index (faiss) over a key directory."""

    example: ClassVar[str] = "mpirun -n 4 python tools/build_index.py --keys RUN/keys --output RUN/index"

    keys: Path = option("key directory of extract_keys", by_url=True)
    output: Path = option("index directory to write")
    factory: str = option(
        "faiss index factory that holds IVF, such as IVF1024,PQ64; without a code, as IVF1024, lists alone,"
        " which is all that write_targets reads; auto = chosen; lists = chosen, without a code",
        "auto",
        identity="resolved",
    )
    num_shards: int | None = option(
        "files that the keys are spread over, each filled by one rank (default: 4; from some millions of keys"
        " on so many that a file has 128 keys for each list; the same for any number of ranks)",
        None,
        at_least=1,
    )
    threads: int | None = shared_flags.threads()
    exchange: Exchange = shared_flags.exchange()
    rank_timeout_seconds: float = shared_flags.rank_timeout_seconds()
