"""Part of `convert_checkpoint` and `generate`: the tokenizer of a joint model, chosen and checked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import content_hash
from mlpmem_ds.engines.tokenizer import definition_sha256, open_encoder
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.formats.corpus import TokenizerFacts

_logger = logging.getLogger(__name__)


def choose_tokenizer(
    tokenizer: str | None, model: str, corpus: Path | None, memory: str | None
) -> tuple[Any, str]:
    """The first that there is of --tokenizer, the base's and the corpus's, and its name for messages.

    Args:
        tokenizer: the flag.
        model: the base, a directory or Hub name.
        corpus: of the training, where it is on this disk.
        memory: the trained memory's name for messages; None: a published one, which names no corpus.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    if tokenizer is not None:
        name, flag = tokenizer, "--tokenizer"
    elif _has_tokenizer(model):
        name, flag = model, "the tokenizer of --model"
    elif corpus is not None:
        name, flag = str(corpus / "tokenizer"), "the corpus's tokenizer"
    elif memory is None:
        raise UserError(f"--model {model} has no tokenizer: give --tokenizer, a directory or Hub name")
    else:
        raise UserError(
            f"--model {model} has no tokenizer, and the corpus of {memory} is not on this disk"
            ": give --tokenizer RUN/corpus/tokenizer"
        )
    return load_tokenizer(name, flag=flag), f"{flag} {name}"


def _has_tokenizer(model: str) -> bool:
    """Whether a model directory holds a tokenizer; a Hub name is assumed to."""
    root = Path(model)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")
    return not root.is_dir() or any((root / name).is_file() for name in names)


def check_begins(tokenizer: Any, corpus: TokenizerFacts, label: str) -> None:
    """Refuse a tokenizer that begins a prompt otherwise than the documents that the memory was trained on.

    Args:
        tokenizer: has the vocabulary of the corpus.
        corpus: what the corpus says of its own.
        label: the tokenizer's name for messages.

    Raises:
        UserError: it puts other tokens before a text.
    """
    if corpus.definition_sha256 in ("", definition_sha256(tokenizer)):
        return
    begin_ids = open_encoder(tokenizer, label=label).begin_ids
    if begin_ids != corpus.begin_of_document_ids:
        raise UserError(
            f"{label} puts the tokens {list(begin_ids)} before a text, and the documents of the corpus begin"
            f" with {list(corpus.begin_of_document_ids)}: give --tokenizer RUN/corpus/tokenizer"
        )
    _logger.warning(
        "%s has the words of the corpus's tokenizer and other rules, so that it may split some texts"
        " otherwise: --tokenizer RUN/corpus/tokenizer is the one that the memory was trained with",
        label,
    )


def rules_sha256(tokenizer: Any) -> str:
    """Of what a tokenizer does besides having a vocabulary: its rules, special tokens and chat template."""
    special = {name: str(tokens) for name, tokens in tokenizer.special_tokens_map.items()}
    return content_hash([definition_sha256(tokenizer), special, getattr(tokenizer, "chat_template", None)])
