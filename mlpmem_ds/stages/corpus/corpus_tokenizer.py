"""Part of `prepare_corpus`: the tokenizer of a corpus, loaded or trained, and kept in its directory."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.engines.tokenizer import TextEncoder, open_encoder, require_end
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.stages.corpus.config import TRAIN, Config

_logger = logging.getLogger(__name__)
_END_OF_DOCUMENT = "<|endoftext|>"
FOLDER = "tokenizer"


def given_encoder(config: Config) -> TextEncoder | None:
    """The encoder of `--tokenizer`; None where the corpus trains its own.

    Raises:
        UserError: it cannot be loaded, or cannot end a document.
    """
    return None if config.tokenizer.startswith(TRAIN) else _open(config, config.tokenizer)


def trained_encoder(config: Config) -> TextEncoder:
    """The encoder of the tokenizer that the corpus has trained."""
    return _open(config, str(config.output / FOLDER))


def _open(config: Config, name_or_path: str) -> TextEncoder:
    encoder = open_encoder(
        load_tokenizer(name_or_path),
        label=f"--tokenizer {config.tokenizer}",
        # Templates are written with special tokens.
        special_tokens="parse" if config.documents == "chat" else config.special_tokens,
    )
    require_end(encoder)
    return encoder


def write_tokenizer(tokenizer: Any, writer: UnitWriter) -> None:
    """Write its files into the corpus."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        writer.copy_folder(Path(scratch), FOLDER)


def train_tokenizer(size: int, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some texts, of `size` entries or, where they hold too few words, fewer."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_END_OF_DOCUMENT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(texts, trainer)
    if trained.get_vocab_size() < size:
        _logger.warning(
            "--tokenizer %s%d: the training split holds words for %d entries, so that the vocabulary has no"
            " more",
            TRAIN, size, trained.get_vocab_size(),
        )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token=_END_OF_DOCUMENT, bos_token=_END_OF_DOCUMENT
    )
