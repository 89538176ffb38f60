"""`generate`: a joint model and prompts → text, with the memory, without it, or both next to each other.

Shapes: B prompts of a batch, S tokens of the longest.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.chat_template import ChatEncoder, chat_template_of
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.finite_scores import refuse_overflow
from mlpmem_ds.engines.tokenizer import TextEncoder, open_encoder
from mlpmem_ds.formats.chats import Conversation
from mlpmem_ds.models.generation_settings import (
    choosing_settings,
    end_tokens,
    token_settings,
)
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.left_padding import padded_on_the_left, reads_padding
from mlpmem_ds.models.mixture import Constant, StoredGate
from mlpmem_ds.models.quantized_base import bits_config
from mlpmem_ds.stages.conversion.thresholds import warn_of_fixed_weights
from mlpmem_ds.stages.generation.config import Config
from mlpmem_ds.stages.generation.exported_model import (
    QuantizationError,
    Source,
    open_source,
    settings_of_export,
)
from mlpmem_ds.stages.generation.prompts import read_conversations, read_prompts
from mlpmem_ds.stages.generation.text import Writer, side_by_side, text_after
from mlpmem_ds.stages.shared_flags import device_map_of
from mlpmem_ds.stages.viewing.generated import write_generated

_logger = logging.getLogger(__name__)


def run(config: Config, world: World, *, write: Callable[[str], object] | None = None) -> str:
    """The prompts with their continuations, as text for a terminal.

    Args:
        write: receives what is returned, and a line end: with `--stream` in pieces as they are generated,
            else at once.

    Raises:
        UserError: the model, its parts or the prompts are not there, or do not fit each other.
    """
    asked = read_conversations(config) if config.chat else read_prompts(config)
    if config.stream and len(asked) > 1:
        raise UserError(
            f"--stream writes one text as it is generated, and there are {len(asked)} prompts: give one"
        )
    if config.temperature == 0 and config.top_p < 1:
        _logger.warning(
            "--top-p %g is ignored: --temperature 0 always takes the likeliest token", config.top_p
        )
    source = open_source(config, lmbda=config.lmbda)
    tokenizer, context = source.tokenizer, source.context or math.inf
    encoder = open_encoder(
        tokenizer,
        label="the tokenizer of --model",
        special_tokens="parse" if config.chat else config.special_tokens,
    )
    prompts, further_end = _rendered(encoder, config, asked)
    ids = _encode(encoder, prompts, context, config.max_new_tokens)
    model = _load(config, source, world)
    if config.memory_weights == "int8":
        model.quantize_memory()
    gate = model.gate
    warn_of_fixed_weights(config.base_only_threshold, [gate], len(model.memories))
    generation = _generation_config(config, model, tokenizer, further_end)
    if config.stream and write is not None:
        write(prompts[0])
    *rows_of_base, rows = [
        _continue_all(config, model, tokenizer, ids, each, generation, write if config.stream else None)
        for each in ([Constant(0.0), gate] if config.compare else [gate])
    ]
    *texts_of_base, texts = [
        [text_after(tokenizer, prompt, row) for prompt, row in zip(ids, found, strict=True)]
        for found in (*rows_of_base, rows)
    ]
    if model.base_only_threshold is not None:
        _logger.info("%s", model.base_only)
    shown = _shown(config, gate, prompts, texts_of_base, texts)
    try:
        if write is not None:
            write("\n" if config.stream else f"{shown}\n")
    finally:  # an error of the one does not take the other
        if config.html is not None:
            write_generated(config.html, model, tokenizer, ids, rows)
    return shown


def run_on_terminal(config: Config, world: World) -> None:
    """As `run`; the text goes to standard output, before the page of `--html` is made."""

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    run(config, world, write=write)


def continue_batch(
    model: Any,
    ids: Sequence[Sequence[int]],
    generation: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without its end token; `model` is a MemoryAugmentedLM or any model with
    `generate`.

    Prompts are padded on the left to one length; a model that would read the padding is given them one by
    one. Only these settings count, not those of the model's own file, from which transformers takes what is
    not given.
    """
    if len(ids) > 1 and reads_padding(model):
        return [continue_batch(model, [row], generation, streamer=streamer)[0] for row in ids]
    ends = end_tokens(generation.eos_token_id)
    tokens_BS, mask_BS = padded_on_the_left(ids, generation.pad_token_id, model.device)
    with own_settings(model, generation):
        generated = model.generate(
            tokens_BS,
            attention_mask=mask_BS,
            logits_processor=[refuse_overflow],
            generation_config=generation,
            **({"streamer": streamer} if streamer else {}),
        )
    rows: list[list[int]] = generated[:, tokens_BS.shape[1] :].tolist()
    stops = [next((at for at, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


@contextlib.contextmanager
def own_settings(model: Any, generation: GenerationConfig) -> Iterator[None]:
    """Let these be the model's own settings of generation for a while."""
    before, model.generation_config = model.generation_config, generation
    try:
        yield
    finally:
        model.generation_config = before


def _shown(
    config: Config,
    gate: StoredGate,
    prompts: Sequence[str],
    texts_of_base: Sequence[Sequence[str]],
    texts: Sequence[str],
) -> str:
    if config.compare:
        header = ("base", f"base + memory, {gate}")
        blocks = [
            f"{prompt}\n\n{side_by_side(header, pair)}"
            for prompt, *pair in zip(prompts, *texts_of_base, texts, strict=True)
        ]
    else:
        blocks = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    if len(blocks) == 1:
        return blocks[0]
    return "\n\n".join(
        f"[{number} of {len(blocks)}]\n{block}" for number, block in enumerate(blocks, start=1)
    )


def _load(config: Config, source: Source, world: World) -> MemoryAugmentedLM:
    try:
        return source.load(
            device=device_of_rank(config.device, world),
            dtype=config.dtype,
            device_map=device_map_of(config.device_map),
            quantization=_quantization(config),
        )
    except QuantizationError as error:
        raise UserError(f"--base-weights {config.base_weights}: {error}") from error


def _quantization(config: Config) -> BitsAndBytesConfig | None:
    if config.base_weights == "float":
        return None
    try:
        return bits_config(int(config.base_weights.removesuffix("bit")))
    except ValueError as error:
        raise UserError(f"--base-weights {config.base_weights}: {error}") from error


def _rendered(
    encoder: TextEncoder, config: Config, asked: Sequence[str | Conversation]
) -> tuple[list[str], int | None]:
    """The prompts as texts; and with --chat the token by which the template ends an answer, if it has one."""
    if not config.chat:
        return [str(prompt) for prompt in asked], None
    chats = ChatEncoder(encoder=encoder, template=chat_template_of(encoder, config.chat_template))
    texts = [
        chats.render_prompt(one, f"prompt {number}")
        for number, one in enumerate(asked, start=1)
        if isinstance(one, Conversation)
    ]
    return texts, chats.end_of_answer


def _encode(
    encoder: TextEncoder, prompts: Sequence[str], context: float, max_new_tokens: int
) -> list[list[int]]:
    """Token ids of each prompt: the tokenizer's begin tokens, once, then the text; no end token.

    Raises:
        UserError: a prompt is empty, or does not fit the base's context together with the new tokens.
    """
    names = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    ids = encoder.encode_prompts(prompts, names)
    for name, prompt, row in zip(names, prompts, ids, strict=True):
        if not row or (not prompt.strip() and len(row) == len(encoder.begin_ids)):
            what = "holds only blanks, for which the tokenizer has no token" if prompt else "is empty"
            raise UserError(f"{name} {what}: give at least one word")
        if len(row) >= context:
            raise UserError(
                f"{name} has {len(row):,} tokens, and the model reads {context:,}: shorten it to "
                f"{max(context - max_new_tokens, 1):,} or fewer"
            )
        if len(row) + max_new_tokens > context:
            raise UserError(
                f"{name} has {len(row):,} tokens, and with --max-new-tokens {max_new_tokens:,}"
                f" passes the {context:,} that the model reads: shorten it, or ask for at most"
                f" {context - len(row):,}"
            )
        if encoder.unknown_id is not None and (count := row.count(encoder.unknown_id)):
            _logger.warning(
                "%s: %d of its %d tokens are the tokenizer's unknown token", name, count, len(row)
            )
    return ids


def _continue_all(
    config: Config,
    model: MemoryAugmentedLM,
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    gate: StoredGate,
    generation: GenerationConfig,
    write: Callable[[str], object] | None,
) -> list[list[int]]:
    """The new tokens of each prompt with this gate; the same seed for each gate."""
    model.set_gate(gate)
    torch.manual_seed(config.seed)
    streamer = (
        None if write is None else Writer(tokenizer, ids[0], end_tokens(generation.eos_token_id), write)
    )
    rows: list[list[int]] = [[] for _ in ids]
    limits_repetition = config.no_repeat_ngram_size > 0 or config.repetition_penalty != 1
    for places in _batches(ids, config.batch_size, equal_lengths=limits_repetition):
        batch = continue_batch(model, [ids[place] for place in places], generation, streamer=streamer)
        for place, row in zip(places, batch, strict=True):
            rows[place] = row
    return rows


def _batches(ids: Sequence[Sequence[int]], size: int, *, equal_lengths: bool) -> list[list[int]]:
    """The places of the prompts that are continued together, in their order.

    transformers counts padding among the runs of tokens that are not to be repeated, and in releases as late
    as 5.20 among the tokens of the repetition penalty: an end token that pads would be held back. So there is
    no padding with `equal_lengths`.
    """
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(ids):
        groups.setdefault(len(row) if equal_lengths else 0, []).append(place)
    return [places[at : at + size] for places in groups.values() for at in range(0, len(places), size)]


def _generation_config(
    config: Config, model: MemoryAugmentedLM, tokenizer: Any, further_end: int | None = None
) -> GenerationConfig:
    """What the flags say, and the export's end tokens; nothing else of its generation_config.json."""
    if ignored := choosing_settings(model.generation_config):
        _logger.info(
            "the flags say how tokens are chosen; not taken from the export's generation_config.json: %s",
            ", ".join(f"{name} {value}" for name, value in ignored.items()),
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    tokens = token_settings(settings_of_export(model, tokenizer))
    if further_end is not None:
        tokens["eos_token_id"] = end_tokens(tokens["eos_token_id"], further_end)
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        repetition_penalty=config.repetition_penalty,
        **tokens,
        **sampling,
    )
