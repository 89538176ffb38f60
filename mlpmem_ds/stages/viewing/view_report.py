"""`view_report`: a report and passages of text as one HTML file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_bytes
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.tokenizer import open_encoder
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus, vocabulary_sha256
from mlpmem_ds.formats.evaluation import Report, open_report
from mlpmem_ds.formats.text_encoding import NotTextError, decode_text
from mlpmem_ds.formats.window_tokens import begins_with
from mlpmem_ds.stages.conversion.thresholds import warn_of_fixed_weights
from mlpmem_ds.stages.generation.exported_model import Source, open_source
from mlpmem_ds.stages.viewing.config import Config
from mlpmem_ds.stages.viewing.html import Passage, render_page, report_details, report_summary
from mlpmem_ds.stages.viewing.token_views import views_of

_logger = logging.getLogger(__name__)


def run(config: Config, world: World) -> None:
    """Write the page; another of the same name is replaced once the new one is whole.

    Raises:
        UserError: a report, model, corpus or text that is not one, or of another base or vocabulary.
    """
    report = open_report(config.report)
    evaluation = report.evaluation
    source = open_source(config, lmbda=config.lmbda)
    _check_base(config, report, source)
    texts = list(_texts(config, source.tokenizer, source.context))
    model = source.load(device=device_of_rank(config.device, world), dtype=config.dtype, device_map=None)
    warn_of_fixed_weights(config.base_only_threshold, [model.gate], len(model.memories))
    passages = []
    for number, (title, ids, num_context) in enumerate(texts, start=1):
        views = views_of(model, source.tokenizer, ids, num_context=num_context)
        passages.append(Passage(title=title, views=views))
        _logger.info("passage %d of %d: %d tokens", number, len(texts), len(views))
    page = render_page(
        f"{Path(evaluation.model).name}, with and without its memory, {evaluation.date[:10]}",
        passages,
        summary=report_summary(evaluation),
        details=report_details(evaluation, config.report),
    )
    publish_bytes(config.output, page.encode())
    _logger.info("the page is %s", config.output)


def _check_base(config: Config, report: Report, source: Source) -> None:
    own, given = report.inputs.get("model"), source.base_sha256
    if own is not None and given is not None and own != given:
        raise UserError(
            f"--report {config.report} is of the base {report.evaluation.model} ({own[:12]}…), and --model"
            f" {config.model} has another ({given[:12]}…): give the model that the report is of"
        )


def _texts(config: Config, tokenizer: Any, context: int | None) -> Iterator[tuple[str, list[int], int]]:
    """Title, ids, and how many ids at the beginning are not shown, of each passage."""
    if config.corpus is not None:
        corpus = open_corpus(config.corpus, config.split)
        own, given = corpus.vocabulary_sha256, vocabulary_sha256(tokenizer)
        if own != given:
            raise UserError(
                f"--corpus {config.corpus} has another vocabulary ({corpus.vocab_size} tokens, {own[:12]}…)"
                f" than --model {config.model} ({len(tokenizer)}, {given[:12]}…): give the corpus that was"
                " prepared with the model's tokenizer"
            )
        begin = len(corpus.begin_of_document_ids)
        yield from _passages(corpus, config.passages, _num_tokens(config, context, begin))
        return
    num_tokens = _num_tokens(config, context, 0)
    for path in config.text:
        ids = _ids_of_file(path, tokenizer)[:num_tokens]
        if len(ids) < 2:
            raise UserError(
                f"--text {path} has {len(ids)} tokens, and there is nothing to predict: give more"
            )
        yield path.name, ids, 0


def _num_tokens(config: Config, context: int | None, begin: int) -> int:
    """That are shown of a passage, which is read with `begin` tokens before it."""
    if context is None or config.tokens <= context - max(begin, 1):
        return config.tokens
    most = context - max(begin, 1)
    _logger.warning("--tokens %d are more than the model reads: %d are shown", config.tokens, most)
    return most


def _passages(
    corpus: CorpusSplit, num_passages: int, num_tokens: int
) -> Iterator[tuple[str, list[int], int]]:
    num_tokens = min(num_tokens, corpus.num_tokens)
    starts = np.linspace(0, corpus.num_tokens - num_tokens, num_passages + 2).astype(int)[1:-1]
    for start in starts.tolist():
        ids = corpus.tokens(start, start + num_tokens).tolist()
        begin: Sequence[int] = corpus.begin_of_document_ids
        begin = () if begins_with(np.array(ids), corpus.begin_of_document_ids) else begin
        title = f"{corpus.name} split, tokens {start:,} to {start + num_tokens:,}"
        yield title, [*begin, *ids], len(begin)


def _ids_of_file(path: Path, tokenizer: Any) -> list[int]:
    try:
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise UserError(f"--text {path} cannot be read ({error.strerror}): give a text file") from error
    except NotTextError as error:
        raise UserError(f"--text {path}: {error}: convert it to UTF-8 first") from error
    encoder = open_encoder(tokenizer, label="the tokenizer of --model")
    return list(encoder.encode_prompts([text], [str(path)])[0])
