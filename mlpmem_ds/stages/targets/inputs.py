"""What `write_targets` reads, opened and checked before anything is written: keys, index, documents, sizes.

Everything here raises UserError with the remedy. N positions, V token ids.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mlpmem_ds.core.dealing import Dealer
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.run_description import reason_of_start, resolved_at_start
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank, memory_bytes
from mlpmem_ds.formats.corpus import open_corpus, token_dtype
from mlpmem_ds.formats.counted_rows import CountedRows
from mlpmem_ds.formats.index_directory import IndexDirectory, open_index
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.lists_directory import FOLDER
from mlpmem_ds.formats.target_encoding import frequency_order
from mlpmem_ds.formats.targets import ORDER_NAME
from mlpmem_ds.maths.exact_limit import max_keys_for_exact
from mlpmem_ds.stages.retrieval.key_lists import check_key_lists
from mlpmem_ds.stages.retrieval.neighbour_search import open_search
from mlpmem_ds.stages.targets.audit import open_truth
from mlpmem_ds.stages.targets.config import Config
from mlpmem_ds.stages.targets.teacher import Teacher
from mlpmem_ds.stages.targets.units import auto_shard_positions

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the targets are made from.

    Attributes:
        index: whose lists are searched; None with exact search.
        teacher: a search of the keys, and what a position may not find.
        truth: keys that an audit compares with; None without one.
        shard_positions: positions of a shard.
        device: where this rank compares.
        hashes: of each input, by its name.
    """

    keys: Keys
    index: IndexDirectory | None
    teacher: Teacher
    truth: Keys | None
    device: torch.device
    shard_positions: int
    hashes: Mapping[str, str]

    @property
    def search(self) -> Literal["exact", "ivf"]:
        return "exact" if self.index is None else "ivf"

    def write_order(self, unit: str, writer: UnitWriter) -> None:
        """The unit of the token ids by falling frequency as a value, for the encoding `compact`."""
        self.teacher.prepare()
        counts_V = self.teacher.count_values()
        writer.array(ORDER_NAME, frequency_order(counts_V, dtype=token_dtype(len(counts_V))))


def open_inputs(config: Config, world: World, dealer: Dealer | None = None) -> Inputs:
    """Open and check everything that the flags name; `dealer` deals the units of the lists."""
    keys = open_keys(config.keys)
    device = device_of_rank("auto", world)
    index = _open_index(config, keys, device)
    documents, hashes = _read_documents(config, keys)
    shard_positions = config.shard_positions or auto_shard_positions(keys.num_positions)
    _check_sizes(config, keys, shard_positions)
    lists = _check_lists(config, keys, index)
    search = open_search(
        keys,
        index,
        how="exact" if index is None else "lists",
        nprobe=config.nprobe,
        lists=lists,
        threads=config.threads,
        world=world,
        device=device,
        is_verified=True,
        dealer=dealer,
    )
    teacher = Teacher(
        keys=keys,
        search=search,
        k=config.k,
        window=config.exclude_window,
        documents=documents,
    )
    return Inputs(
        keys=keys,
        index=index,
        teacher=teacher,
        truth=None if config.audit is None else open_truth(config.raw_keys, keys),
        device=device,
        shard_positions=shard_positions,
        hashes=hashes | {"keys": keys.sha256} | ({} if index is None else {"index": index.sha256}),
    )


def _open_index(config: Config, keys: Keys, device: torch.device) -> IndexDirectory | None:
    """The index that is searched, which must be over these keys; None where all keys are compared."""
    search = _automatic_search(config, keys, device) if config.search == "auto" else config.search
    if search == "exact":
        if config.index is not None:
            _logger.info("exact search of %s keys leaves --index unused", f"{keys.num_positions:,}")
        return None
    if config.index is None:
        raise UserError(
            f"--search {config.search} of {keys.num_positions:,} keys needs --index: build one with"
            " build_index, or choose --search exact"
        )
    index = open_index(config.index)
    if index.keys_sha256 != keys.sha256:
        raise UserError(
            f"--index {config.index} was built over other keys than --keys {config.keys}: build it over these"
        )
    return index


def _automatic_search(config: Config, keys: Keys, device: torch.device) -> str:
    """What `--search auto` is: as the output was begun, else by the number of keys on this device."""
    key_bytes = keys.bytes_of("keys") // keys.num_positions
    limit = max_keys_for_exact(device.type, key_bytes, memory_bytes(device))
    now = "exact" if keys.num_positions <= limit else "ivf"
    started = resolved_at_start(config.output, "search")
    # Without an index there is no ivf to go on with: that is another run, and open_stage says so.
    can_go_on = started == "exact" or (started == "ivf" and config.index is not None)
    if started == now or not can_go_on:
        return now
    _logger.info("search %s (%s)", started, reason_of_start(now))
    return str(started)


def _read_documents(config: Config, keys: Keys) -> tuple[CountedRows | None, dict[str, str]]:
    """(the text's rows, whose documents bound what a position may find, or None where they do not matter; the
    input that this brings)."""
    if config.exclude == "none":
        if config.corpus is not None:
            _logger.warning("--corpus is not used without --exclude same-document")
        return None, {}
    assert config.corpus is not None
    corpus = open_corpus(config.corpus, keys.manifest.split)
    if corpus.sha256 != keys.corpus_sha256:
        raise UserError(
            f"--corpus {config.corpus} is not the one that --keys {config.keys} were extracted from: give"
            " that one"
        )
    documents = CountedRows(corpus)
    documents.document_bounds(np.zeros(1, np.int64))  # read before threads share them
    return documents, {"corpus": corpus.sha256}


def _check_lists(config: Config, keys: Keys, index: IndexDirectory | None) -> Path | None:
    """Where the keys will lie list by list; None with exact search."""
    if index is None:
        if config.lists is not None:
            _logger.info("exact search leaves --lists unused")
        return None
    if config.lists is None:
        return config.output / FOLDER
    check_key_lists(config.lists, keys, index)
    return config.lists


def _check_sizes(config: Config, keys: Keys, shard_positions: int) -> None:
    """Refuse shards that cut blocks, and a perplexity above the number of keys."""
    block_size = keys.manifest.block_size
    if shard_positions % block_size:
        nearest = max(block_size, round(shard_positions / block_size) * block_size)
        raise UserError(
            f"--shard-positions {shard_positions} is not a multiple of the corpus' block size "
            f"{block_size}: choose {nearest}"
        )
    others = keys.num_positions - 1
    if config.temperature == "auto" and others <= config.perplexity:
        raise UserError(
            f"--neighbour-perplexity {config.perplexity:g} cannot be reached with {others} other"
            " keys: choose a smaller one, or set --temperature"
        )
