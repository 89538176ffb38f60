"""First stage: text → tokens. Documents are read, sampled, dealt to splits, tokenized and written as token shards.

Two texts that are equal to the letter get the same hash and so the same split: nothing of the test text is trained on.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import content_hash
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import StageDirectory, UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import FORMAT, SPLITS, VERSION, token_dtype
from mlpmem_ds.formats.documents import TEXT_PATTERNS, Document, SourceFile, find_files, read_documents

_logger = logging.getLogger(__name__)
_UNIT_BYTES = 32 << 20
_BATCH_BYTES = 4 << 20
_END_OF_DOCUMENT = "<|endoftext|>"
_TOKENIZER_UNIT = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Config:
    """How text becomes a corpus."""

    input: tuple[str, ...] = option("files, directories or globs to read", identity=False, metavar="PATH")
    tokenizer: str = option("a tokenizer directory or Hub name, or train:VOCAB for a new byte-level BPE of that size")
    output: Path = option("corpus directory to write")
    block_size: int = option("tokens that the base reads at once", 1024)
    stride: int = option("tokens between the starts of two blocks", 512)
    tuning_fraction: float = option("share of the documents for the tuning split", 0.0)
    test_fraction: float = option("share of the documents for the test split", 0.0)
    heldout_fraction: float = option("share of the groups kept apart as a second test split", 0.0)
    max_bytes: float = option("bytes of text to take, group after group in the order of a hash; 0 = all", 0.0)
    include: tuple[str, ...] = option("names that count in directories (patterns)", TEXT_PATTERNS, metavar="PATTERN")
    exclude: tuple[str, ...] = option("paths or directory names left out (patterns)", (), metavar="PATTERN")
    text_field: str = option("JSON lines: the field with the text", "text")
    group_field: str | None = option("JSON lines: the field that names the group", None)
    seed: int = option("seed of the hashes that deal documents to splits", 0)

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.block_size:
            raise UserError(f"--stride {self.stride} must lie between 1 and --block-size {self.block_size}")
        if self.block_size % self.stride:
            raise UserError(f"--block-size {self.block_size} must be a multiple of --stride {self.stride}")
        fractions = (self.tuning_fraction, self.test_fraction, self.heldout_fraction)
        if min(fractions) < 0 or sum(fractions) >= 1:
            raise UserError(f"the fractions {fractions} must not be negative and must leave something for training")
        if self.tokenizer.startswith("train:"):
            size = self.tokenizer.removeprefix("train:")
            if not size.isdigit() or int(size) < 257:
                raise UserError(
                    f"--tokenizer {self.tokenizer}: a byte-level vocabulary needs at least 257 entries, "
                    "as in train:4096"
                )


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What the inputs hold, found by one reading: files by unit, and each wanted document's split."""

    units: list[list[SourceFile]]
    split_of: dict[str, str]  # document name → split
    sha256: str


def run(config: Config, world: World) -> None:
    """Write the corpus; see formats/README.md. Ranks share the units; the tokenizer is made once."""
    tokenizer = None if config.tokenizer.startswith("train:") else _load_tokenizer(config.tokenizer)
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise UserError(
            f"--tokenizer {config.tokenizer} has no end-of-text token: set eos_token in its tokenizer_config.json"
        )
    survey = _survey(config)
    inputs = {"text": survey.sha256}
    if tokenizer is not None:
        inputs["vocabulary"] = vocabulary_sha256(tokenizer)
    directory = open_stage(config.output, stage=FORMAT, version=VERSION, config=config, inputs=inputs, world=world)

    directory.run_units([_TOKENIZER_UNIT], lambda _, writer: _write_tokenizer(config, survey, tokenizer, writer))
    directory.wait_for([_TOKENIZER_UNIT])
    tokenizer = _load_tokenizer(str(config.output / "tokenizer"))

    names = [f"{number:05d}" for number in range(len(survey.units))]
    progress = Progress(len(survey.split_of), label="documents", unit="documents", world=world)

    def tokenize(unit: str, writer: UnitWriter) -> dict[str, Any]:
        return _tokenize_unit(config, survey, survey.units[int(unit)], unit, tokenizer, writer, progress)

    directory.run_units(names, tokenize)
    progress.close()
    directory.finish([_TOKENIZER_UNIT, *names], lambda: _describe(config, directory, names, tokenizer))


def _survey(config: Config) -> _Survey:
    """Read the inputs once: hash every document, sample whole groups, deal documents to splits."""
    files = find_files(config.input, config.include, config.exclude)
    documents: list[tuple[str, str, str, int]] = []  # name, group, sha256, bytes
    units: list[list[SourceFile]] = [[]]
    unit_bytes = 0
    for file in files:
        if unit_bytes >= _UNIT_BYTES:
            units.append([])
            unit_bytes = 0
        units[-1].append(file)
        for document in _read(config, file):
            size = len(document.text.encode())
            documents.append((document.name, document.group, document.sha256, size))
            unit_bytes += size
    if len({name for name, *_ in documents}) != len(documents):
        raise UserError("two inputs hold documents of the same name: give their common parent directory as one --input")
    wanted = _sample_groups(documents, config)
    split_of = _deal_splits(wanted, config)
    fractions = {"tuning": config.tuning_fraction, "test": config.test_fraction, "heldout": config.heldout_fraction}
    for split, fraction in fractions.items():
        if fraction and split not in split_of.values():
            _logger.warning("the %s split is empty: every document is larger than its share of the text", split)
    if "train" not in split_of.values():
        raise UserError(
            f"the inputs hold {len(documents)} documents with text, {len(wanted)} of them wanted, and none fell "
            "in the training split: give more text or smaller fractions"
        )
    return _Survey(units=units, split_of=split_of, sha256=content_hash([[name, sha] for name, _, sha, _ in documents]))


def _read(config: Config, file: SourceFile) -> Iterator[Document]:
    return read_documents(file, text_field=config.text_field, group_field=config.group_field)


def _sample_groups(documents: list[tuple[str, str, str, int]], config: Config) -> list[tuple[str, str, str, int]]:
    """Documents in hash order of their groups, as long as they fit in `max_bytes`; what does not fit is passed over."""
    if not config.max_bytes:
        return documents
    ordered = sorted(documents, key=lambda item: (hash_fraction(f"sample:{item[1]}", config.seed), item[1], item[0]))
    taken, total = [], 0
    for item in ordered:
        if total + item[3] <= config.max_bytes:
            taken.append(item)
            total += item[3]
    return taken


def _deal_splits(documents: list[tuple[str, str, str, int]], config: Config) -> dict[str, str]:
    """Document name → split. Held-out groups first, then tuning and test documents, each in the order of a hash.

    What would overfill a split's share of the bytes is passed over, so that one long document does not decide its size.
    """
    total = sum(size for *_, size in documents)
    by_group: dict[str, int] = {}
    for _, group, _, size in documents:
        by_group[group] = by_group.get(group, 0) + size
    heldout = _fill(by_group, config.heldout_fraction * total, f"group:{config.seed}")
    by_text: dict[str, int] = {}
    for _, group, sha256, size in documents:
        if group not in heldout:
            by_text[sha256] = by_text.get(sha256, 0) + size
    tuning = _fill(by_text, config.tuning_fraction * total, f"tuning:{config.seed}")
    test = _fill({text: size for text, size in by_text.items() if text not in tuning}, config.test_fraction * total,
                 f"test:{config.seed}")  # fmt: skip
    in_heldout = {sha256 for _, group, sha256, _ in documents if group in heldout}

    def split(group: str, sha256: str) -> str:
        if group in heldout or sha256 in in_heldout:
            return "heldout"
        return "tuning" if sha256 in tuning else "test" if sha256 in test else "train"

    return {name: split(group, sha256) for name, group, sha256, _ in documents}


def _fill(sizes: Mapping[str, int], quota: float, salt: str) -> set[str]:
    """Keys in the order of a hash, as long as they fit in the quota of bytes."""
    taken, total = set(), 0
    for key in sorted(sizes, key=lambda key: (hash_fraction(f"{salt}:{key}"), key)):
        if total + sizes[key] <= quota:
            taken.add(key)
            total += sizes[key]
    return taken


def _load_tokenizer(name_or_path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer {name_or_path} cannot be loaded ({str(error).splitlines()[0]}): give a tokenizer "
            "directory, a Hub name, or train:VOCAB"
        ) from error


def vocabulary_sha256(tokenizer: Any) -> str:
    """What two tokenizers must share to be exchangeable here: every token and its id."""
    return content_hash(sorted(tokenizer.get_vocab().items()))


def _write_tokenizer(config: Config, survey: _Survey, tokenizer: Any | None, writer: UnitWriter) -> dict[str, Any]:
    tokenizer = tokenizer or _train_tokenizer(config, survey)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            with writer.file(f"tokenizer/{path.name}") as published:
                shutil.copyfile(path, published)
    return {}


def _train_tokenizer(config: Config, survey: _Survey) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training split's documents."""
    size = int(config.tokenizer.removeprefix("train:"))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_END_OF_DOCUMENT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    files = [file for unit in survey.units for file in unit]
    texts = (
        document.text
        for file in files
        for document in _read(config, file)
        if survey.split_of.get(document.name) == "train"
    )
    trained.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=_END_OF_DOCUMENT, bos_token=_END_OF_DOCUMENT)


def _tokenize_unit(
    config: Config,
    survey: _Survey,
    files: Sequence[SourceFile],
    unit: str,
    tokenizer: Any,
    writer: UnitWriter,
    progress: Progress,
) -> dict[str, Any]:
    """Write the token shard and the document list of each split that the unit's files have documents of."""
    dtype = token_dtype(_vocab_size(tokenizer))
    splits = sorted(
        {
            survey.split_of[document.name]
            for file in files
            for document in _read(config, file)
            if document.name in survey.split_of
        },
        key=SPLITS.index,
    )
    summary = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in splits}
    with ExitStack() as stack:
        outputs = {
            split: [
                _open_output(stack, writer, f"{split}/{name}")
                for name in (f"tokens-{unit}.bin", f"documents-{unit}.jsonl")
            ]
            for split in splits
        }
        for batch in _batches(config, survey, files):
            for document, ids in zip(batch, _encode(tokenizer, [document.text for document in batch]), strict=True):
                tokens = np.array([*ids, tokenizer.eos_token_id], dtype=dtype)
                split = survey.split_of[document.name]
                num_bytes = len(document.text.encode())
                entry = {"name": document.name, "group": document.group, "bytes": num_bytes, "tokens": len(tokens)}
                outputs[split][0].write(tokens.tobytes())
                outputs[split][1].write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
                counts = summary[split]
                counts["tokens"] += len(tokens)
                counts["documents"] += 1
                counts["bytes"] += num_bytes
            progress.advance(len(batch))
    return summary


def _open_output(stack: ExitStack, writer: UnitWriter, name: str) -> BinaryIO:
    """A file that is closed, and then published, when the stack unwinds."""
    path = stack.enter_context(writer.file(name))
    return stack.enter_context(open(path, "wb"))


def _batches(config: Config, survey: _Survey, files: Sequence[SourceFile]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for file in files:
        for document in _read(config, file):
            if document.name in survey.split_of:
                batch.append(document)
                size += len(document.text)
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _vocab_size(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _describe(config: Config, directory: StageDirectory, names: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """The manifest's own fields, from the units' summaries."""
    splits = {}
    for split in SPLITS:
        units = [
            {"unit": name, **summary[split]}
            for name, summary in zip(names, directory.summaries(names), strict=True)
            if split in summary
        ]
        splits[split] = {
            "num_tokens": sum(unit["tokens"] for unit in units),
            "num_documents": sum(unit["documents"] for unit in units),
            "num_bytes": sum(unit["bytes"] for unit in units),
            "units": units,
        }
    _logger.info(
        "; ".join(
            f"{name}: {entry['num_tokens']:,} tokens of {entry['num_documents']:,} documents"
            for name, entry in splits.items()
        )
    )
    vocab_size = _vocab_size(tokenizer)
    return {
        "tokenizer": {
            "vocabulary_sha256": vocabulary_sha256(tokenizer),
            "vocab_size": vocab_size,
            "end_of_document_id": tokenizer.eos_token_id,
        },
        "token_dtype": token_dtype(vocab_size).str,
        "block_size": config.block_size,
        "stride": config.stride,
        "splits": splits,
    }
