"""The flags of `prepare_corpus`."""

from __future__ import annotations

import multiprocessing
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.collectives.opening import Exchange
from mlpmem_ds.formats.corpus import Counts, SpecialTokens
from mlpmem_ds.formats.input_names import FILE_PATTERNS
from mlpmem_ds.formats.text_encoding import known_encoding
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.corpus.near_duplicates import Mode

TRAIN = "train:"


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Tokenize text into a corpus with train, tuning and test splits.

    Reads text, Markdown, source code, JSON lines, Parquet, webdataset tars and data sets of `datasets`.
    """

    example: ClassVar[str] = (
        "python tools/prepare_corpus.py --input books/ --tokenizer train:4096 --output run/corpus"
        " --tuning-fraction .05 --test-fraction .05"
    )
    memory_flags: ClassVar[tuple[str, ...]] = ("--processes",)

    input: tuple[str, ...] = option(
        "files, directories, globs, saved data sets, datasets:NAME[:CONFIGURATION[:SPLIT]] or docs:PACKAGE"
        " (docstrings of an installed package; docs:python is the language reference) to read",
        identity="none",
        metavar="PATH",
    )
    weights: tuple[float, ...] | None = option(
        "share of each --input in the bytes of the text, in their order, such as .7 .3; each document is"
        " taken at most once (default: all documents)",
        None,
        above=0,
        identity="resolved",
    )
    documents: Literal["text", "chat"] = option(
        "what the inputs hold: texts, or conversations (objects with messages, conversations, prompt and"
        " completion, or instruction and output), which the tokenizer's chat template renders",
        "text",
    )
    chat_template: Path | None = option(
        "with chat: a file with a template of Jinja (default: the tokenizer's own)", None, identity="none"
    )
    train_on: Counts = option(
        "with chat: which tokens are learned, stored and scored: all, or those of the assistant's answers",
        "answers",
    )
    tokenizer: str = option(
        "a tokenizer directory or Hub name, or train:VOCAB for a new byte-level BPE of that size", by_url=True
    )
    special_tokens: SpecialTokens = shared_flags.special_tokens()
    output: Path = option("corpus directory to write")
    block_size: int = option("tokens that the base reads at once", 1024, at_least=1)
    stride: int = option("tokens between the starts of two blocks", 512, at_least=1)
    tuning_fraction: float = option("share of the documents for the tuning split", 0.0, at_least=0)
    test_fraction: float = option("share of the documents for the test split", 0.0, at_least=0)
    heldout_fraction: float = option("share of the groups kept apart as a second test split", 0.0, at_least=0)
    max_bytes: float | None = option(
        "bytes of text to take, group after group in the order of a hash (default: all)", None, above=0
    )
    max_train_bytes: float | None = option(
        "bytes of text in the training split, document after document in the order of a hash; the other"
        " splits stay as they are, so that trainings on more and on less text are judged on the same"
        " (default: all that is left for it)",
        None,
        above=0,
    )
    cut_documents: int | None = option(
        "characters: cut longer texts at ends of lines into documents of at most this length, each dealt to"
        " a split of its own (default: never)",
        None,
        at_least=100,
    )
    shorten_documents: int | None = option(
        "characters: take only the beginning of longer texts, at most this length, up to the end of a line"
        " (default: whole texts)",
        None,
        at_least=100,
    )
    include: tuple[str, ...] | None = option(
        f"patterns: which files of directories are read (default: {' '.join(FILE_PATTERNS)}, also in capital"
        " letters or compressed)",
        None,
        metavar="PATTERN",
    )
    exclude: tuple[str, ...] = option("paths or directory names left out (patterns)", (), metavar="PATTERN")
    encoding: str = option(
        "encoding of text files that are not UTF-8 and have no byte-order mark, such as latin-1",
        "utf-8",
        identity="resolved",
    )
    strict: bool = option(
        "refuse the inputs if anything that may hold text is left out", False, identity="none"
    )
    text_field: str = option("JSON lines, Parquet, data sets: the field with the text", "text")
    group_field: str | None = option("the same: the field that names the group", None)
    near_duplicates: Mode = option(
        "documents that nearly repeat another one: keep (no search), report, or remove them", "keep"
    )
    near_duplicate_threshold: float = option(
        "least Jaccard similarity of the n-grams of near duplicates", 0.8, above=0, at_most=1
    )
    near_duplicate_words: int = option("words of an n-gram of near duplicates", 5, at_least=1)
    near_duplicate_hashes: int = option(
        "minimum hashes by which the similarity is estimated: bytes of memory for each document",
        128,
        at_least=16,
    )
    seed: int = option(
        "seed of the hashes that deal documents to splits and find near duplicates", 0, at_least=0
    )
    processes: int | None = option(
        "processes that tokenize in this rank (default: the machine's cores for a single rank, else 1)",
        None,
        at_least=1,
        at_most=shared_flags.MAX_THREADS,
        identity="none",
    )
    exchange: Exchange = shared_flags.exchange()
    rank_timeout_seconds: float = shared_flags.rank_timeout_seconds()

    def check(self) -> None:
        self._check_inputs()
        if self.weights is not None and len(self.weights) != len(self.input):
            raise UserError(
                f"--weights has {len(self.weights)} numbers for {len(self.input)} --input: give one for each,"
                " in their order (a pattern in quotes is one input)"
            )
        if self.processes not in (None, 1) and "fork" not in multiprocessing.get_all_start_methods():
            raise UserError(
                f"--processes {self.processes}: this system cannot fork; start several ranks instead"
            )
        check_stride(self.block_size, self.stride)
        fractions = (self.tuning_fraction, self.test_fraction, self.heldout_fraction)
        if sum(fractions) >= 1:
            raise UserError(f"the fractions {fractions} must leave something for training")
        self._check_chat()
        if self.cut_documents is not None and self.shorten_documents is not None:
            raise UserError(
                "--cut-documents and --shorten-documents each say what to do with longer texts:"
                " give one of them"
            )
        if self.tokenizer.startswith(TRAIN):
            size = self.tokenizer.removeprefix(TRAIN)
            if not re.fullmatch("[0-9]{1,8}", size) or int(size) < 257:
                raise UserError(
                    f"--tokenizer {self.tokenizer}: a byte-level vocabulary needs at least 257 entries (and"
                    " has below 100 million), as in train:4096"
                )

    def _check_chat(self) -> None:
        if self.documents == "chat" and self.tokenizer.startswith(TRAIN):
            raise UserError(
                f"--documents chat needs a tokenizer that has the special tokens of its template, and"
                f" --tokenizer {self.tokenizer} makes one of text: give the base's own"
            )
        if self.documents == "chat":  # conversations stay whole
            self.refuse_unused("cut_documents", "shorten_documents", of="--documents text")
        if self.documents == "text":
            self.refuse_unused("train_on", "chat_template", of="--documents chat")

    def _check_inputs(self) -> None:
        for flag, words in (("input", self.input), ("include", self.include), ("exclude", self.exclude)):
            if words is not None and "" in words:
                raise UserError(f"--{flag} has an empty value, perhaps of a shell variable that is not set")
        try:
            known_encoding(self.encoding)
        except LookupError as error:
            raise UserError(
                f"--encoding {self.encoding}: Python knows no such encoding ({error}): name one of its list,"
                " such as latin-1, cp1252, shift_jis, gb18030 or utf-16-le"
            ) from error


def check_stride(block_size: int, stride: int) -> None:
    """Raises UserError where the blocks of a corpus would not begin at multiples of their distance."""
    if block_size % stride:
        raise UserError(f"--block-size {block_size} must be a multiple of --stride {stride}")
