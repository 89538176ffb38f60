"""Every stage loads its tokenizers here: as they encode texts whole, and with a remedy where one cannot be.

Truncation and padding that a tokenizer was saved with are off, and so is dropout.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.formats.model_directory import absence_of, check_model_files

_logger = logging.getLogger(__name__)
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja"),
)


def load_tokenizer(name_or_path: str, *, flag: str = "--tokenizer") -> Any:
    """A tokenizer of transformers, which encodes texts whole: no truncation, no padding, no dropout.

    Its own code, where it brings some, is not run.

    Args:
        name_or_path: a directory or a Hub name.
        flag: of the command line, for the messages.

    Raises:
        UserError: there is none, its files are damaged, or it needs a package that is not installed.
        DamagedDataError: this package wrote its files, and one does not have its checksum.
    """
    from transformers import AutoTokenizer

    check_model_files(name_or_path, flag=flag, names=_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    except BaseException as error:
        fault = library_fault(error)
        if absence := absence_of(name_or_path, what="tokenizer", error=fault):
            raise UserError(f"{flag} {name_or_path}: {absence}") from error
        raise UserError(
            f"{flag} {name_or_path}: its tokenizer cannot be loaded ({first_line(fault)}):"
            f" {_remedy(name_or_path, fault)}"
        ) from error
    if not words:  # where the files of the words are missing, transformers gives a tokenizer without words
        raise UserError(
            f"{flag} {name_or_path} holds no tokenizer with words in it (its tokenizer.json or vocabulary is"
            " missing): give the directory that save_pretrained of the tokenizer wrote, or a Hub name"
        )
    backend = backend_of(tokenizer)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        for sampling in ("dropout", "alpha", "nbest_size"):
            if getattr(backend.model, sampling, None) is not None:
                _logger.warning(
                    "%s %s splits words at random (%s), as for training a model: this is switched off",
                    flag, name_or_path, sampling,
                )  # fmt: skip
                setattr(backend.model, sampling, None)
    return tokenizer


def backend_of(tokenizer: Any) -> Any | None:
    """The tokenizer of the library `tokenizers` below it; None where it is written in Python."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    return tokenizer.backend_tokenizer if isinstance(tokenizer, TokenizersBackend) else None


def library_fault(error: BaseException) -> BaseException:
    """A fault of a library, which may be a panic of its Rust code and is then no Exception; raises all else
    again."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return error
    raise error


def _remedy(name_or_path: str, error: BaseException) -> str:
    text = str(error).lower()
    folder = Path(name_or_path)
    has_words = (folder / "tokenizer.json").exists() or importlib.util.find_spec("sentencepiece") is not None
    if not has_words and any(folder.glob("*.model")):
        # transformers then tries to read the file as one of tiktoken, and asks for that
        return (
            "it is a model of sentencepiece: pip install sentencepiece protobuf, or save it elsewhere as a"
            " tokenizer.json and give that directory"
        )
    for package in ("sentencepiece", "tiktoken", "protobuf", "mistral-common", "mistral_common"):
        if isinstance(error, ImportError) and package in text or f"install {package}" in text:
            return f"pip install {package}, or save it elsewhere as a tokenizer.json and give that directory"
    if "trust_remote_code" in text:
        return "it needs code of its own, which is not run: save it elsewhere as a tokenizer.json"
    if folder.is_dir():
        return "give the directory that save_pretrained of the tokenizer wrote, with its tokenizer.json"
    return "give a tokenizer directory or a Hub name, and check the path, the network and HF_HUB_OFFLINE"
