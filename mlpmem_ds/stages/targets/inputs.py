"""What write_targets checks before it writes anything: the search, the index, the documents, the sizes.

Everything here raises UserError with the remedy. N positions.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.index_directory import IndexDirectory, open_index
from mlpmem_ds.formats.key_lists import FOLDER
from mlpmem_ds.formats.keys import Keys
from mlpmem_ds.maths.knn import max_keys_for_exact
from mlpmem_ds.stages.retrieval.key_lists import check_key_lists
from mlpmem_ds.stages.targets.config import Config

_logger = logging.getLogger(__name__)


def resolve_search(config: Config, keys: Keys) -> Literal["exact", "ivf"]:
    """What --search auto becomes.

    Raises:
        UserError: a search of lists without an index.
    """
    automatic: Literal["exact", "ivf"] = "exact" if keys.num_positions <= max_keys_for_exact() else "ivf"
    search = automatic if config.search == "auto" else config.search
    if search == "ivf" and config.index is None:
        raise UserError(
            f"--search {config.search} of {keys.num_positions:,} keys needs --index: build one with"
            " build_index, or choose --search exact"
        )
    if search == "exact" and config.index is not None:
        _logger.info("exact search of %s keys leaves --index unused", f"{keys.num_positions:,}")
    return search


def open_index_over(config: Config, keys: Keys) -> IndexDirectory:
    """The index of --index, which must be over these keys."""
    assert config.index is not None
    index = open_index(config.index)
    if index.keys_sha256 != keys.sha256:
        raise UserError(
            f"--index {config.index} was built over other keys than --keys {config.keys}: build it over these"
        )
    return index


def read_documents(config: Config, keys: Keys) -> tuple[np.ndarray | None, dict[str, str]]:
    """(document number of each position, int32 [N], or None where it does not matter; the input that this
    brings)."""
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
    return corpus.documents_of(np.arange(keys.num_positions)).astype(np.int32), {"corpus": corpus.sha256}


def check_lists(config: Config, keys: Keys, index: IndexDirectory | None) -> Path | None:
    """Where the keys will lie list by list; None with exact search."""
    if index is None:
        if config.lists is not None:
            _logger.info("exact search leaves --lists unused")
        return None
    if config.lists is None:
        return config.output / FOLDER
    check_key_lists(config.lists, keys, index)
    return config.lists


def check_sizes(config: Config, keys: Keys) -> None:
    """Refuse shards that cut blocks, and a perplexity above the number of keys."""
    block_size = keys.manifest.block_size
    if config.shard_positions % block_size:
        nearest = max(block_size, round(config.shard_positions / block_size) * block_size)
        raise UserError(
            f"--shard-positions {config.shard_positions} is not a multiple of the corpus' block size "
            f"{block_size}: choose {nearest}"
        )
    others = keys.num_positions - 1
    if config.temperature == "auto" and others <= config.perplexity:
        raise UserError(
            f"--neighbour-perplexity {config.perplexity:g} cannot be reached with {others} other"
            " keys: choose a smaller one, or set --temperature"
        )
