"""`prepare_corpus`: text → tokens. Documents are sampled, dealt to splits, tokenized and written in shards.

The inputs are read twice, as streams and in several processes (workers.py): once to name the units
(survey.py) and deal the documents (splits.py), once to tokenize them (tokenization.py). Memory holds
some tens of bytes a document and a few batches of text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO

from mlpmem_ds.core.log import Progress, log_for_all
from mlpmem_ds.core.once import shared_place
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.chat_template import ChatEncoder, open_chat_encoder
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.engines.minhash import SignatureRules, require_minhash
from mlpmem_ds.engines.tokenizer import TextEncoder, require_end
from mlpmem_ds.formats.corpus import (
    SPLITS,
    BlendedInput,
    CorpusManifest,
    CorpusUnit,
    Counts,
    NearDuplicates,
    SourceCounts,
    SplitManifest,
    TokenizerFacts,
    token_dtype,
)
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.records import ReadRules
from mlpmem_ds.formats.text_encoding import known_encoding
from mlpmem_ds.stages.corpus.blend import count_blend, describe_blend, warn_of_blend
from mlpmem_ds.stages.corpus.config import TRAIN, Config
from mlpmem_ds.stages.corpus.corpus_tokenizer import (
    given_encoder,
    train_tokenizer,
    trained_encoder,
    write_tokenizer,
)
from mlpmem_ds.stages.corpus.ledger import (
    LEFT_OUT_FILE,
    count_sources,
    lists_others,
    refuse_lost_text,
    table_lines,
    write_ledger,
)
from mlpmem_ds.stages.corpus.near_duplicates import (
    NearDuplicateRules,
    count_repetitions,
    describe_near_duplicates,
)
from mlpmem_ds.stages.corpus.splits import SplitRules
from mlpmem_ds.stages.corpus.survey import Survey, survey_files
from mlpmem_ds.stages.corpus.tokenization import TokenizerPool, documents_of_unit, read_document
from mlpmem_ds.stages.corpus.workers import choose_processes
from mlpmem_ds.stages.stage_ranks import open_stage_ranks

_logger = logging.getLogger(__name__)
_UNIT_BYTES = 32 << 20
_TOKENIZER_UNIT, _LEFT_OUT_UNIT = "tokenizer", "left_out"


def run(config: Config, world: World) -> None:
    """Write the corpus; see formats/README.md. Ranks share the units; the tokenizer is made once."""
    if config.near_duplicates != "keep":
        require_minhash("--near-duplicates")
    _warn_of_unused(config)
    encoder = given_encoder(config)
    chats = None
    if config.documents == "chat":
        assert encoder is not None  # the configuration has refused train:VOCAB
        chats = open_chat_encoder(encoder, config.chat_template)
    with open_stage_ranks(config, world, stage=CorpusManifest.FORMAT) as ranks:
        _prepare(config, world, encoder, chats, ranks)


def _warn_of_unused(config: Config) -> None:
    unused = []
    if config.near_duplicates == "keep":
        names = ("near_duplicate_threshold", "near_duplicate_words", "near_duplicate_hashes")
        unused += [(name, "--near-duplicates is keep") for name in names]
    if config.documents == "chat":
        unused.append(("text_field", "--documents is chat, whose fields are known"))
    for name, why in unused:
        for flag in config.given(name):
            _logger.warning("%s is not used: %s", flag, why)


def _prepare(
    config: Config, world: World, encoder: TextEncoder | None, chats: ChatEncoder | None, ranks: Ranks
) -> None:
    survey = _survey(config, world)
    if config.strict:
        refuse_lost_text(survey.omissions)
    inputs = {"text": survey.sha256}
    if survey.groups_sha256 is not None:
        inputs["groups"] = survey.groups_sha256
    if encoder is not None:
        inputs["vocabulary"] = encoder.vocabulary_sha256
        inputs["tokenizer"] = encoder.documents_sha256
    if chats is not None:
        inputs["chat_template"] = chats.sha256
    directory = open_stage(
        config.output,
        stage=CorpusManifest.FORMAT,
        version=CorpusManifest.VERSION,
        config=config,
        inputs=inputs,
        resolved={"encoding": known_encoding(config.encoding), "weights": _bound_weights(config, survey)},
        world=world,
        dealer=ranks,
    )

    directory.run_phase(
        [_TOKENIZER_UNIT], lambda _, writer: _write_tokenizer(config, survey, encoder, writer)
    )
    encoder = encoder or trained_encoder(config)
    log_for_all(_logger, world, "%s", encoder.describe_bounds())

    names = [f"{number:05d}" for number in range(len(survey.units))]
    progress = Progress(survey.num_taken, label="documents", unit="documents", world=world)
    processes = choose_processes(config.processes, world, survey.num_bytes)
    with TokenizerPool(
        chats or encoder, _read_rules(config), processes, counts=_counts(config), strict=config.strict
    ) as pool:

        def tokenize(name: str, writer: UnitWriter) -> dict[str, Any]:
            return _tokenize_unit(config, survey, int(name), pool, writer, progress)

        directory.run_units(names, tokenize)
    progress.close()
    directory.run_units([_LEFT_OUT_UNIT], lambda _, writer: write_ledger(survey, writer))
    directory.complete(
        [_TOKENIZER_UNIT, *names, _LEFT_OUT_UNIT],
        lambda: _describe(config, directory, survey, names, encoder),
    )


def _bound_weights(config: Config, survey: Survey) -> list[list[float]] | None:
    """The weights with the number of documents of each: the text's hash does not say which input has them."""
    if config.weights is None:
        return None
    return [[weight, count] for weight, (count, _) in zip(config.weights, survey.available, strict=True)]


def _counts(config: Config) -> Counts:
    return config.train_on if config.documents == "chat" else "all"


def _read_rules(config: Config) -> ReadRules:
    return ReadRules(
        text_field=config.text_field,
        group_field=config.group_field,
        encoding=known_encoding(config.encoding),
        chats=config.documents == "chat",
        piece=config.cut_documents or config.shorten_documents,
        first_piece_only=config.shorten_documents is not None,
    )


def _survey(config: Config, world: World) -> Survey:
    rules = SplitRules(
        tuning_fraction=config.tuning_fraction,
        test_fraction=config.test_fraction,
        heldout_fraction=config.heldout_fraction,
        max_bytes=config.max_bytes,
        max_train_bytes=config.max_train_bytes,
        seed=config.seed,
        weights=config.weights or (),
    )
    found = find_files(config.input, config.include, config.exclude, output=config.output)
    processes = choose_processes(config.processes, world, sum(file.num_bytes for file in found.files))
    if world.is_first:
        for pattern in found.unused_patterns:
            _logger.warning("%s matches nothing in the inputs: check how it is spelled", pattern)
    return survey_files(
        found.files,
        _read_rules(config),
        rules,
        unit_bytes=_UNIT_BYTES,
        processes=processes,
        shared=shared_place(config.output, world),
        world=world,
        left_out=found.omissions,
        input_stops=found.input_stops,
        near=_near_duplicate_rules(config),
    )


def _near_duplicate_rules(config: Config) -> NearDuplicateRules | None:
    if config.near_duplicates == "keep":
        return None
    return NearDuplicateRules(
        mode=config.near_duplicates,
        threshold=config.near_duplicate_threshold,
        signatures=SignatureRules(
            words=config.near_duplicate_words, hashes=config.near_duplicate_hashes, seed=config.seed
        ),
    )


def _write_tokenizer(
    config: Config, survey: Survey, encoder: TextEncoder | None, writer: UnitWriter
) -> dict[str, Any]:
    tokenizer = _train_tokenizer(config, survey) if encoder is None else encoder.tokenizer
    write_tokenizer(tokenizer, writer)
    return {}


def _train_tokenizer(config: Config, survey: Survey) -> Any:
    """A byte-level BPE of the training split's documents."""
    rules = _read_rules(config)
    texts = (
        read_document(rules, item).text
        for unit in survey.units
        for item in documents_of_unit(rules, survey, unit)
        if SPLITS[item.split] == "train"
    )
    return train_tokenizer(int(config.tokenizer.removeprefix(TRAIN)), texts)


def _tokenize_unit(
    config: Config, survey: Survey, number: int, pool: TokenizerPool, writer: UnitWriter, progress: Progress
) -> dict[str, Any]:
    """Write the token shard and the document list of each split that the unit's files have documents of."""
    unit, name = survey.units[number], f"{number:05d}"
    splits = [split for split in range(len(SPLITS)) if split in survey.split_of[unit.first : unit.stop]]
    with_answers = _counts(config) == "answers"
    fields = ["tokens", "documents", "bytes", "unknown", "dropped"]
    fields += ["answers", "answer_bytes"] if with_answers else []
    files = [f"tokens-{name}.bin", f"documents-{name}.jsonl"]
    files += [f"answers-{name}.bin"] if with_answers else []
    summary = {SPLITS[split]: dict.fromkeys(fields, 0) for split in splits}
    with ExitStack() as stack:
        outputs = {
            split: [_open_output(stack, writer, f"{SPLITS[split]}/{file}") for file in files]
            for split in splits
        }
        for parts in pool.tokenize(survey, unit):
            for split, part in parts.items():
                contents = (bytes(part.ids), "".join(part.lines).encode(), bytes(part.is_answer))
                for output, content in zip(outputs[split], contents, strict=False):
                    output.write(content)
                counts = summary[SPLITS[split]]
                found = (
                    part.tokens, len(part.lines), part.num_bytes, part.unknown, part.dropped, part.answers,
                    part.answer_bytes,
                )  # fmt: skip
                for field, count in zip(fields, found, strict=False):
                    counts[field] += count
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


def _warn_of_lost_text(encoder: TextEncoder, splits: Mapping[str, SplitManifest]) -> None:
    unknown, tokens, dropped = (
        sum(getattr(split, name) for split in splits.values())
        for name in ("num_unknown", "num_tokens", "num_dropped")
    )
    if unknown:
        _logger.warning(
            "%s has no token for some of the text: %d of %d tokens (%.2g %%) are its unknown token",
            encoder.label, unknown, tokens, 100 * unknown / tokens,
        )  # fmt: skip
    if dropped:
        _logger.warning(
            "%s has no token for %d characters of the text, nor an unknown token: they are left out; a"
            " byte-level tokenizer (such as train:VOCAB) has all, and --strict refuses such text",
            encoder.label, dropped,
        )  # fmt: skip


def _describe(
    config: Config,
    directory: StageDirectory,
    survey: Survey,
    names: Sequence[str],
    encoder: TextEncoder,
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
            + (f", {entry.num_answers:,} of answers" if _counts(config) == "answers" else "")
            for name, entry in splits.items()
        ),
    )
    _warn_of_small_splits(splits)
    rules = _near_duplicate_rules(config)
    near_duplicates = None if rules is None else count_repetitions(survey.repetitions, rules)
    blend = _blend(config, survey, directory.summaries(names))
    _log_table(config, directory, survey, blend, near_duplicates)
    _warn_of_lost_text(encoder, splits)
    num_entries = encoder.vocab_size
    (ledger,) = directory.summaries([_LEFT_OUT_UNIT])  # of the run that wrote it: see `lists_others`
    return CorpusManifest(
        tokenizer=TokenizerFacts(
            vocabulary_sha256=encoder.vocabulary_sha256,
            vocab_size=num_entries,
            end_of_document_id=require_end(encoder),
            begin_of_document_ids=encoder.begin_ids,
            special_tokens=encoder.special_tokens,
            definition_sha256=encoder.definition_sha256,
        ),
        token_dtype=token_dtype(num_entries).str,
        block_size=config.block_size,
        stride=config.stride,
        splits=splits,
        sources={kind: SourceCounts(**counts) for kind, counts in ledger["sources"].items()},
        left_out=ledger["left_out"],
        blend=blend,
        near_duplicates=near_duplicates,
        counts=_counts(config),
    )


def _blend(
    config: Config, survey: Survey, summaries: Sequence[Mapping[str, Any]]
) -> tuple[BlendedInput, ...]:
    """What of each input is in the corpus, where they have weights."""
    if config.weights is None:
        return ()
    units_of_inputs: list[list[Mapping[str, Any]]] = [[] for _ in config.input]
    for unit, summary in zip(survey.units, summaries, strict=True):
        units_of_inputs[unit.input_number].append(summary)
    blend = count_blend(config.input, config.weights, survey.available, units_of_inputs)
    warn_of_blend(blend, config.max_bytes if config.max_train_bytes is None else None)
    return blend


def _log_table(
    config: Config,
    directory: StageDirectory,
    survey: Survey,
    blend: Sequence[BlendedInput],
    near_duplicates: NearDuplicates | None,
) -> None:
    lines = table_lines(count_sources(survey), survey.omissions)
    if near_duplicates is not None:
        lines.append(describe_near_duplicates(near_duplicates))
    for line in [*lines, *describe_blend(blend)]:
        log_for_all(_logger, directory.world, "%s", line)
    left_out = config.output / LEFT_OUT_FILE
    if survey.omissions:
        log_for_all(_logger, directory.world, "all that was left out: %s", left_out)
    if lists_others(left_out, survey.omissions):
        _logger.warning(
            "since %s was written, what the inputs leave out has changed, and their text has not: the lines"
            " above are of now, the corpus keeps those of then",
            left_out,
        )
