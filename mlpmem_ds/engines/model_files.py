"""A model's files, in a directory or fetched from the Hub: its fingerprint, its vocabulary, its directory,
without loading it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from mlpmem_ds.core.errors import DamagedDataError, UserError, first_line
from mlpmem_ds.core.once import computed_once
from mlpmem_ds.engines.model_kinds import reason_against_config, reason_against_path
from mlpmem_ds.engines.tokenizer_loading import library_fault
from mlpmem_ds.formats.corpus import CorpusSplit, vocabulary_sha256
from mlpmem_ds.formats.json_lines import parse_json
from mlpmem_ds.formats.model_directory import (
    absence_of,
    check_model_files,
    recorded_files,
    remedy_of_model,
)
from mlpmem_ds.formats.weight_shards import fault_of_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GENERATION_FILE = "generation_config.json"
NO_LIMIT = 1 << 30
"""tokens that a model reads, where its configuration names no limit"""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def vocabulary_of_model(name_or_path: str) -> str | None:
    """SHA-256 of a model's vocabulary, as a corpus gives its own; None where the model comes without
    `tokenizer.json`.

    Raises:
        UserError: that file cannot be read.
    """
    path = model_file(name_or_path, "tokenizer.json")
    return None if path is None else vocabulary_sha256(_tokenizer_of(name_or_path, path, "--model"))


def _tokenizer_of(name_or_path: str, path: Path, flag: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except BaseException as error:
        reason = first_line(library_fault(error))
        raise UserError(
            f"{flag} {name_or_path}: its tokenizer.json is cut short or damaged ({reason}): download or save"
            " the tokenizer again"
        ) from error


def max_context_of(config: PretrainedConfig) -> int:
    """The most tokens that a model reads at once; practically endless where its configuration names no
    limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT


def max_context_of_model(name_or_path: str) -> int:
    """The same of a model in a directory or of the Hub, from its configuration alone."""
    from transformers import AutoConfig

    name = str(Path(name_or_path).expanduser()) if name_or_path.startswith("~") else name_or_path
    return max_context_of(AutoConfig.from_pretrained(name, trust_remote_code=False))


def check_generation_file(name_or_path: str) -> None:
    """Refuse a damaged generation_config.json, which transformers passes over in silence, and token ids in it
    or in config.json that are none.

    Raises:
        UserError: with the file and what is wrong.
    """
    files = (GENERATION_FILE, "config.json")
    check_model_files(name_or_path, flag="--model", names=files)
    for file in files:
        path = model_file(name_or_path, file)
        if path is None:
            continue
        try:
            settings = parse_json(path.read_text(encoding="utf-8"))
        except ValueError as error:  # not UTF-8, or not JSON
            raise UserError(f"--model {name_or_path}: {file} is damaged ({error}): restore it") from error
        if not isinstance(settings, dict):
            raise UserError(f"--model {name_or_path}: {file} is damaged (it holds no object): restore it")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = settings.get(name)
            listed = ids if isinstance(ids, list) and name == "eos_token_id" else [ids]
            if ids is not None and any(isinstance(one, bool) or not isinstance(one, int) for one in listed):
                raise UserError(
                    f"--model {name_or_path}: {file} has {str(ids)[:40]!r} as {name}, which is no token id:"
                    " write a whole number there"
                )


def check_model_reads(
    name_or_path: str,
    splits: Sequence[CorpusSplit],
    *,
    vocab_size: int,
    max_context: int,
    flag: str = "--model",
    shared: Path | None = None,
) -> None:
    """Refuse a corpus that this model cannot read: other tokens, tokens that it has no row for, or longer
    blocks than its context.

    Args:
        name_or_path: the model.
        splits: those that it is to read, of one corpus or of several.
        vocab_size: rows of the model's output head, which may be more or fewer than the tokenizer has
            entries.
        max_context: tokens.
        flag: of the command line, for the messages.
        shared: as in `fingerprint_model`.

    Raises:
        UserError: with what differs.
    """
    for corpus in {split.root: split for split in splits}.values():
        _check_same_tokens(name_or_path, corpus, flag)
        if corpus.read_length > max_context:
            begin = len(corpus.begin_of_document_ids)
            raise UserError(
                f"the corpus {corpus.root} has blocks of {corpus.block_size} tokens"
                f"{f' and {begin} begin tokens before each' if begin else ''}, the model reads at most"
                f" {max_context} ({flag} {name_or_path}): prepare it with a smaller --block-size"
            )
    for split in splits:
        if split.vocab_size > vocab_size:
            _check_rows(name_or_path, split, vocab_size, flag, shared)


def _check_rows(name_or_path: str, split: CorpusSplit, num_rows: int, flag: str, shared: Path | None) -> None:
    """Each token of the text has a row in the model.

    A tokenizer often has a padding token more than its model has rows, which no text holds.
    """

    def compute() -> dict[str, int]:
        return {"token": split.largest_token()}

    largest = (
        compute()
        if shared is None
        else computed_once(shared, "largest-token", [split.sha256, split.name], compute)
    )["token"]
    if largest >= num_rows:
        raise UserError(
            f"{flag} {name_or_path} has rows for {num_rows:,} tokens, and the {split.name} split of the"
            f" corpus {split.root} holds token {largest:,}{_spelling(split, largest)}: give the model rows"
            f" for it (transformers' resize_token_embeddings({split.vocab_size})), or prepare the corpus with"
            " a tokenizer without it"
        )


def _spelling(corpus: CorpusSplit, token: int) -> str:
    """How a token is written, in brackets, where the corpus's tokenizer says so."""
    path = corpus.tokenizer_path / "tokenizer.json"
    spelt = Tokenizer.from_file(str(path)).id_to_token(token) if path.is_file() else None
    return "" if spelt is None else f" ({spelt})"


def _check_same_tokens(name_or_path: str, corpus: CorpusSplit, flag: str) -> None:
    own, common = model_file(name_or_path, "tokenizer.json"), corpus.tokenizer_path / "tokenizer.json"
    if own is None or not common.is_file():
        return
    corpus_ids = Tokenizer.from_file(str(common)).get_vocab()
    model_ids = _tokenizer_of(name_or_path, own, flag).get_vocab()
    token_of = {number: token for token, number in model_ids.items()}
    for token, number in corpus_ids.items():
        # Either may have more tokens (added ones); but what both name must be the same.
        if model_ids.get(token, number) != number or token_of.get(number, token) != token:
            raise UserError(
                f"{flag} {name_or_path} has another vocabulary than the corpus {corpus.root}: {token!r} is"
                f" {number} in the corpus, and in the model it is {model_ids.get(token, 'no token')} and"
                f" {number} is {token_of.get(number, 'no token')!r}; prepare the corpus with the model's own"
                " tokenizer"
            )


def fingerprint_model(name_or_path: str, *, flag: str = "--model", shared: Path | None = None) -> str:
    """SHA-256 of a model's configuration and weight files, not of its directory's name; fetches them
    from the Hub.

    Args:
        name_or_path: the model.
        flag: of the command line, for the messages.
        shared: the output of a stage of several ranks: one of them reads the files, and the others take its
            answer where they gave the same model and see files of the same names, sizes and times. None: this
            process reads them.

    Raises:
        UserError: neither a model directory nor a Hub name that can be reached, or one without weights.
    """
    config = _config_file(name_or_path, flag)
    paths = [config, *_weight_files(name_or_path, flag)]

    def compute() -> dict[str, str]:
        for path in paths[1:]:
            if reason := fault_of_weights(path):
                raise UserError(f"{flag} {name_or_path}: {reason}")
        return {"sha256": _sha256_of_files(paths, name_or_path, flag)}

    if shared is None:
        return compute()["sha256"]
    states = [(path.name, path.stat()) for path in paths]
    # A model next to it may have files of the same names, sizes and (in whole seconds) times.
    seen = [name_or_path, *([name, state.st_size, state.st_mtime_ns] for name, state in states)]
    return str(computed_once(shared, "fingerprint", seen, compute)["sha256"])


def _config_file(name_or_path: str, flag: str) -> Path:
    """The configuration of a causal language model; fetched if need be."""
    if reason := reason_against_path(name_or_path):
        raise UserError(f"{flag} {name_or_path}: {reason}")
    config = model_file(name_or_path, "config.json")
    if config is None:
        raise UserError(
            f"{flag} {name_or_path}: {absence_of(name_or_path)}; a model of the Hub that asks for consent"
            " needs `hf auth login`"
        )
    if reason := reason_against_config(config):
        raise UserError(f"{flag} {name_or_path}: {reason}")
    return config


def _sha256_of_files(paths: Sequence[Path], name_or_path: str, flag: str) -> str:
    """Of names, sizes and contents; a file that this package wrote is compared with its record on the way."""
    root = Path(name_or_path)
    records = recorded_files(root) if root.is_dir() else {}
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + str(path.stat().st_size).encode() + b"\0")
        own, record = hashlib.sha256(), records.get(path.name)
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
                if record is not None:
                    own.update(chunk)
        if record is not None and own.hexdigest() != record.sha256:
            raise DamagedDataError(
                f"{flag}: {path} does not have the checksum of its record: {remedy_of_model(root)}"
            )
    return digest.hexdigest()


def fetch_directory(name_or_path: str, *, flag: str, subdirectory: str | None = None) -> Path:
    """Of a Hub name (OWNER/NAME), the directory with its configuration and weights, fetched if need be; else
    the path as it is.

    Args:
        name_or_path: what the user gave.
        flag: of the command line, for the messages.
        subdirectory: of the Hub's repository, where the files may lie instead.

    Raises:
        UserError: neither there nor given by the Hub.
    """
    if Path(name_or_path).exists() or not _HUB_NAME.fullmatch(name_or_path):
        return Path(name_or_path)
    for prefix in ("", f"{subdirectory}/") if subdirectory else ("",):
        config = model_file(name_or_path, f"{prefix}config.json")
        if config is not None:
            _weight_files(name_or_path, flag, prefix)
            return config.parent
    raise UserError(
        f"{flag} {name_or_path} does not exist here, and the Hub gave no such model: check the path or the"
        f" name, the network and HF_HUB_OFFLINE; or fetch it elsewhere (hf download {name_or_path}"
        " --local-dir DIR) and give that directory"
    )


def _weight_files(name_or_path: str, flag: str, prefix: str = "") -> list[Path]:
    """The files that transformers would load, in the order of their names."""
    for single in (f"{prefix}model.safetensors", f"{prefix}pytorch_model.bin"):
        if path := model_file(name_or_path, single):
            return [path]
        if index := model_file(name_or_path, f"{single}.index.json"):
            return _shards_of(index, name_or_path, flag, prefix)
    raise UserError(
        f"{flag} {name_or_path} has no weights (model.safetensors or its shards, else pytorch_model.bin):"
        " download or save it again"
    )


def _shards_of(index: Path, name_or_path: str, flag: str, prefix: str) -> list[Path]:
    """The weights files that an index names, all of them."""
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"{flag} {name_or_path}: {index.name} is not an index of weights ({type(error).__name__}:"
            f" {error}): download or save it again"
        ) from error
    shards = {name: model_file(name_or_path, f"{prefix}{name}") for name in names}
    missing = [name for name, path in shards.items() if path is None]
    if missing or not shards:
        named = f"{missing[0]} is missing, which" if missing else "no file is what"
        raise UserError(
            f"{flag} {name_or_path}: {named} {index.name} names ({len(missing)} of {len(shards)} files"
            " missing): download or save it again"
        )
    return [path for path in shards.values() if path is not None]


def model_file(name_or_path: str, name: str) -> Path | None:
    """A file of a model directory, or of a Hub model (fetched if need be); None where there is none."""
    if Path(name_or_path).exists():
        path = Path(name_or_path) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
    except Exception:  # transformers, the Hub and its network raise families of their own
        return None
    return None if found is None else Path(str(found))
