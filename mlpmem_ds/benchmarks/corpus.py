"""tools/prepare_corpus.py against the bare tokenizer: the same texts, the same tokenizer, as many processes.

The comparator holds every text in memory beforehand, in one list of batches a process, and calls
`encode_batch_fast` on each; what it gives is dropped in the process. Ours reads the files twice, deals the
documents to splits, writes token shards with checksums, and starts its processes within the clock, as the
comparator does.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlpmem_ds.benchmarks.common import Report, Row, check_output, interleave, median_of, row_of, timing_rows
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.documents import Document, read_documents
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.records import ReadRules
from mlpmem_ds.stages.corpus import prepare_corpus

_logger = logging.getLogger("mlpmem_ds.benchmarks")
BARE, OURS = "bare tokenizer", "prepare_corpus"
_BATCH_BYTES = 1 << 19
_texts: list[list[str]] = []  # batches, inherited by the comparator's processes


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Preparing a corpus against the bare tokenizer.

    About a minute on 2 cores at the default size.
    """

    example: ClassVar[str] = "python tools/bench.py corpus --output corpus.json"

    output: Path = option("JSON file to write")
    input: tuple[str, ...] = option("files, directories or globs (default: Python's standard library)", ())
    megabytes: float = option("text to take, in MB", 48.0, above=0)
    tokenizer: str | None = option(
        "tokenizer directory or Hub name (default: one trained on a tenth of the text)", None
    )
    vocab_size: int = option(
        "otherwise: entries of the byte-level vocabulary that is trained", 8192, at_least=257
    )
    processes: int | None = option("processes of each arm (default: the machine's cores)", None, at_least=1)
    runs: int = option("runs of each arm", 3, at_least=1)


def run(config: Config, world: World) -> None:
    """Measure both arms and write the JSON."""
    check_output(config.output)
    report = Report("corpus", config)
    processes = config.processes or len(os.sched_getaffinity(0))
    inputs = config.input or (str(Path(os.__file__).parent),)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        texts = _copy_texts(inputs, config.megabytes * 1e6, place / "text")
        tokenizer = config.tokenizer or str(_train_tokenizer(config, place))
        num_bytes = sum(len(text.encode()) for text in texts)
        _texts[:] = _batches(texts)
        tokens: list[int] = []

        def ours() -> None:
            shutil.rmtree(place / "corpus", ignore_errors=True)
            prepare_corpus.run(_config(place, tokenizer, processes), World())

        def bare() -> None:
            tokens.append(_encode_all(tokenizer, processes))

        timings = interleave({BARE: bare, OURS: ours}, config.runs)
        corpus = open_corpus(place / "corpus")
        bounds = len(corpus.manifest.tokenizer.begin_of_document_ids) + 1  # and an end token
        if corpus.num_tokens != tokens[0] + bounds * len(corpus.documents):
            raise AssertionError(
                f"the arms differ: {corpus.num_tokens} tokens, the bare tokenizer {tokens[0]}"
            )
    rows: list[Row] = timing_rows(timings)
    for arm, values in timings.items():
        rows.append(
            row_of(arm, "megabytes_per_second", "MB/s", [num_bytes / timing.wall / 1e6 for timing in values])
        )
        rows.append(
            row_of(arm, "tokens_per_second", "1/s", [corpus.num_tokens / timing.wall for timing in values])
        )
    speed = median_of(rows, BARE, "wall_seconds") / median_of(rows, OURS, "wall_seconds")
    report.publish(config.output, rows, {"speed_over_tokenizer": speed})


def _copy_texts(inputs: Sequence[str], num_bytes: float, place: Path) -> list[str]:
    """Whole documents up to `num_bytes` bytes, written as files for `prepare_corpus` to read."""
    place.mkdir()
    texts: list[str] = []
    size = 0
    for file in find_files(inputs, None, ()).files:
        for document in read_documents(file, ReadRules()):
            if not isinstance(document, Document):
                continue
            if size >= num_bytes:
                return texts
            text = document.text.replace("\r\n", "\n").replace("\r", "\n")  # as a text file is read
            (place / f"{len(texts):06d}.txt").write_text(text, encoding="utf-8")
            texts.append(text)
            size += document.num_bytes
    if size < num_bytes:
        _logger.warning("the inputs hold %.1f MB, less than --megabytes", size / 1e6)
    return texts


def _train_tokenizer(config: Config, place: Path) -> Path:
    prepare_corpus.run(
        prepare_corpus.Config(
            input=(str(place / "text"),),
            tokenizer=f"train:{config.vocab_size}",
            output=place / "sample",
            max_bytes=config.megabytes * 1e5,
            block_size=64,
            stride=32,
            processes=1,
        ),
        World(),
    )
    return place / "sample" / "tokenizer"


def _config(place: Path, tokenizer: str, processes: int) -> prepare_corpus.Config:
    return prepare_corpus.Config(
        input=(str(place / "text"),), tokenizer=tokenizer, output=place / "corpus", processes=processes
    )


def _batches(texts: Sequence[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size >= _BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches


def _encode_all(tokenizer: str, processes: int) -> int:
    """The comparator: the number of tokens of all batches, each encoded by one of the processes."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_load, initargs=(tokenizer,)) as pool:
        return sum(pool.map(_encode_batch, range(len(_texts))))


_loaded: list[Any] = []


def _load(tokenizer: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = load_tokenizer(tokenizer).backend_tokenizer
    backend.encode_special_tokens = True  # text is text, as in ours
    _loaded[:] = [backend]


def _encode_batch(number: int) -> int:
    encodings = _loaded[0].encode_batch_fast(_texts[number], add_special_tokens=False)
    return sum(len(encoding) for encoding in encodings)
