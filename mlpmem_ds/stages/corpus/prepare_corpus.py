"""`prepare_corpus`: text → tokens. Documents are sampled, dealt to splits, tokenized and written in shards.

The inputs are read twice, as streams and in several processes (workers.py): once to name the units
(survey.py) and deal the documents (splits.py), once to tokenize them (tokenization.py). Memory holds
some tens of bytes a document and a few batches of text.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.core.log import Progress, log_for_all
from mlpmem_ds.core.once import shared_place
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.formats.corpus import (
    SPLITS,
    CorpusManifest,
    CorpusUnit,
    SplitManifest,
    TokenizerFacts,
    token_dtype,
    vocabulary_sha256,
)
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.omissions import Omission, count_by_reason
from mlpmem_ds.formats.records import ReadRules
from mlpmem_ds.formats.text_encoding import known_encoding
from mlpmem_ds.stages.corpus.config import Config
from mlpmem_ds.stages.corpus.ledger import (
    LEFT_OUT_FILE,
    count_sources,
    refuse_lost_text,
    table_lines,
    write_left_out,
)
from mlpmem_ds.stages.corpus.splits import SplitRules
from mlpmem_ds.stages.corpus.survey import Survey, survey_files
from mlpmem_ds.stages.corpus.tokenization import TokenizerPool, documents_of_unit, read_document, vocab_size
from mlpmem_ds.stages.corpus.workers import choose_processes
from mlpmem_ds.stages.stage_ranks import open_stage_ranks

_logger = logging.getLogger(__name__)
_UNIT_BYTES = 32 << 20
_END_OF_DOCUMENT = "<|endoftext|>"
_TOKENIZER_UNIT, _LEFT_OUT_UNIT = "tokenizer", "left_out"


def run(config: Config, world: World) -> None:
    """Write the corpus; see formats/README.md. Ranks share the units; the tokenizer is made once."""
    tokenizer = None if config.tokenizer.startswith("train:") else _load_tokenizer(config.tokenizer)
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise UserError(
            f"--tokenizer {config.tokenizer} has no end-of-text token: set eos_token in its"
            " tokenizer_config.json"
        )
    with open_stage_ranks(config.output, config.exchange, world, stage=CorpusManifest.FORMAT) as ranks:
        _prepare(config, world, tokenizer, ranks)


def _prepare(config: Config, world: World, tokenizer: Any | None, ranks: Ranks) -> None:
    survey = _survey(config, world)
    if config.strict:
        refuse_lost_text(survey.omissions)
    vocabulary = None if tokenizer is None else vocabulary_sha256(tokenizer)
    inputs = {"text": survey.sha256, **({} if vocabulary is None else {"vocabulary": vocabulary})}
    directory = open_stage(
        config.output,
        stage=CorpusManifest.FORMAT,
        version=CorpusManifest.VERSION,
        config=config,
        inputs=inputs,
        resolved={"encoding": known_encoding(config.encoding)},
        world=world,
        dealer=ranks,
    )

    directory.run_phase(
        [_TOKENIZER_UNIT], lambda _, writer: _write_tokenizer(config, survey, tokenizer, writer)
    )
    if tokenizer is None:
        tokenizer = _load_tokenizer(str(config.output / "tokenizer"))
    vocabulary = vocabulary or vocabulary_sha256(tokenizer)

    names = [f"{number:05d}" for number in range(len(survey.units))]
    progress = Progress(survey.num_taken, label="documents", unit="documents", world=world)
    processes = choose_processes(config.processes, world, survey.num_bytes)
    with TokenizerPool(tokenizer, token_dtype(vocab_size(tokenizer)), _read_rules(config), processes) as pool:

        def tokenize(name: str, writer: UnitWriter) -> dict[str, Any]:
            return _tokenize_unit(config, survey, int(name), pool, writer, progress)

        directory.run_units(names, tokenize)
    progress.close()
    directory.run_units([_LEFT_OUT_UNIT], lambda _, writer: write_left_out(survey.omissions, writer))
    directory.complete(
        [_TOKENIZER_UNIT, *names, _LEFT_OUT_UNIT],
        lambda: _describe(config, directory, survey, names, tokenizer, vocabulary),
    )


def _read_rules(config: Config) -> ReadRules:
    return ReadRules(
        text_field=config.text_field,
        group_field=config.group_field,
        encoding=known_encoding(config.encoding),
    )


def _survey(config: Config, world: World) -> Survey:
    rules = SplitRules(
        tuning_fraction=config.tuning_fraction,
        test_fraction=config.test_fraction,
        heldout_fraction=config.heldout_fraction,
        max_bytes=config.max_bytes,
        seed=config.seed,
    )
    found = find_files(config.input, config.include, config.exclude, output=config.output)
    processes = choose_processes(config.processes, world, sum(file.num_bytes for file in found.files))
    survey = survey_files(
        found.files,
        _read_rules(config),
        rules,
        unit_bytes=_UNIT_BYTES,
        processes=processes,
        shared=shared_place(config.output, world),
        world=world,
    )
    num_left = len(survey.split_of) - survey.num_taken
    beyond = [Omission(name="", reason="not sampled", count=num_left)] if num_left else []
    return replace(survey, omissions=[*found.omissions, *survey.omissions, *beyond])


def _load_tokenizer(name_or_path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer {name_or_path} cannot be loaded ({first_line(error)}): give a tokenizer "
            "directory, a Hub name, or train:VOCAB"
        ) from error


def _write_tokenizer(
    config: Config, survey: Survey, tokenizer: Any | None, writer: UnitWriter
) -> dict[str, Any]:
    tokenizer = tokenizer or _train_tokenizer(config, survey)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            with writer.file(f"tokenizer/{path.name}") as published:
                shutil.copyfile(path, published)
    return {}


def _train_tokenizer(config: Config, survey: Survey) -> PreTrainedTokenizerFast:
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
    rules = _read_rules(config)
    texts = (
        read_document(rules, item).text
        for unit in survey.units
        for item in documents_of_unit(rules, survey, unit)
        if SPLITS[item.split] == "train"
    )
    trained.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token=_END_OF_DOCUMENT, bos_token=_END_OF_DOCUMENT
    )


def _tokenize_unit(
    config: Config, survey: Survey, number: int, pool: TokenizerPool, writer: UnitWriter, progress: Progress
) -> dict[str, Any]:
    """Write the token shard and the document list of each split that the unit's files have documents of."""
    unit, name = survey.units[number], f"{number:05d}"
    splits = [split for split in range(len(SPLITS)) if split in survey.split_of[unit.first : unit.stop]]
    summary = {SPLITS[split]: {"tokens": 0, "documents": 0, "bytes": 0} for split in splits}
    with ExitStack() as stack:
        outputs = {
            split: [
                _open_output(stack, writer, f"{SPLITS[split]}/{file}")
                for file in (f"tokens-{name}.bin", f"documents-{name}.jsonl")
            ]
            for split in splits
        }
        for parts in pool.tokenize(survey, unit):
            for split, part in parts.items():
                outputs[split][0].write(part.ids)
                outputs[split][1].write("".join(part.lines).encode())
                counts = summary[SPLITS[split]]
                counts["tokens"] += part.tokens
                counts["documents"] += len(part.lines)
                counts["bytes"] += part.num_bytes
                progress.advance(len(part.lines))
    return summary


def _open_output(stack: ExitStack, writer: UnitWriter, name: str) -> BinaryIO:
    """A file that is closed, and then published, when the stack unwinds."""
    path = stack.enter_context(writer.file(name))
    return stack.enter_context(open(path, "wb"))


def _warn_of_small_splits(splits: Mapping[str, SplitManifest]) -> None:
    small = [name for name in ("tuning", "test") if splits[name].num_documents < 2]
    if small:
        _logger.warning(
            "%s: train validates on tuning and evaluate reports on test; to use them, prepare the corpus"
            " again with %s",
            ", ".join(
                f"{name} has {'one document' if splits[name].num_documents else 'no document'}"
                for name in small
            ),
            " and ".join(f"--{name}-fraction, such as .05" for name in small),
        )


def _describe(
    config: Config,
    directory: StageDirectory,
    survey: Survey,
    names: Sequence[str],
    tokenizer: Any,
    vocabulary: str,
) -> CorpusManifest:
    """The manifest's own fields, from the units' summaries."""
    splits = {}
    for split in SPLITS:
        splits[split] = SplitManifest.from_units(
            [
                CorpusUnit(unit=name, **summary[split])
                for name, summary in zip(names, directory.summaries(names), strict=True)
                if split in summary
            ]
        )
    log_for_all(
        _logger,
        directory.world,
        "; ".join(
            f"{name}: {entry.num_tokens:,} tokens of {entry.num_documents:,} documents"
            for name, entry in splits.items()
        ),
    )
    _warn_of_small_splits(splits)
    sources = count_sources(survey)
    for line in table_lines(sources, survey.omissions):
        log_for_all(_logger, directory.world, "%s", line)
    if survey.omissions:
        log_for_all(_logger, directory.world, "all that was left out: %s", config.output / LEFT_OUT_FILE)
    num_entries = vocab_size(tokenizer)
    return CorpusManifest(
        tokenizer=TokenizerFacts(
            vocabulary_sha256=vocabulary,
            vocab_size=num_entries,
            end_of_document_id=tokenizer.eos_token_id,
        ),
        token_dtype=token_dtype(num_entries).str,
        block_size=config.block_size,
        stride=config.stride,
        splits=splits,
        sources=sources,
        left_out=count_by_reason(survey.omissions),
    )
