"""`generate`: an exported model and prompts → text, with the memory, without it, or both next to each other.

Shapes: B prompts of a batch, S tokens of the longest.
"""

from __future__ import annotations

import logging
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, TextStreamer

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.hidden_states import DTYPES, resolve_dtype
from mlpmem_ds.formats.corpus import vocabulary_sha256
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.hf_config import MemoryAugmentedConfig
from mlpmem_ds.models.mixture import Constant, StoredGate
from mlpmem_ds.models.mixture_on_device import mixture_on_device
from mlpmem_ds.stages.generation.config import Config
from mlpmem_ds.stages.shared_flags import device_map_of

_logger = logging.getLogger(__name__)
_COLUMN_WIDTH = 58


class _Writer(TextStreamer):
    """Gives whole words to a function as they are generated, the prompt first."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def run(config: Config, world: World, *, write: Callable[[str], object] | None = None) -> str:
    """The prompts with their continuations, as text for a terminal.

    Args:
        write: receives the pieces of the one text if `--stream` is given; the returned text is whole in any
            case.
    """
    prompts = _read_prompts(config)
    if config.stream and len(prompts) > 1:
        raise UserError(
            f"--stream writes one text as it is generated, and there are {len(prompts)} prompts: give one"
        )
    if config.temperature == 0 and config.top_p < 1:
        _logger.warning(
            "--top-p %g is ignored: --temperature 0 always takes the likeliest token", config.top_p
        )
    settings, tokenizer = read_export(config.model)
    context = getattr(settings, "max_position_embeddings", None) or math.inf
    ids = _encode(tokenizer, prompts, context, config.max_new_tokens)
    model = load_model(
        config.model,
        device=device_of_rank(config.device, world),
        dtype=config.dtype,
        device_map=device_map_of(config.device_map),
    )
    if config.memory_weights == "int8":
        model.quantize_memory()
    gate = model.gate if config.lmbda is None else Constant(config.lmbda)
    *texts_of_base, texts = [
        _continue_all(config, model, tokenizer, ids, each, write if config.stream else None)
        for each in ([Constant(0.0), gate] if config.compare else [gate])
    ]
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


def run_on_terminal(config: Config, world: World) -> str | None:
    """As `run`; with `--stream` the text is on standard output when this returns, and None is given."""
    if not config.stream:
        return run(config, world)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    run(config, world, write=write)
    write("\n")
    return None


def continue_batch(
    model: Any,
    ids: Sequence[Sequence[int]],
    generation: GenerationConfig,
    *,
    streamer: TextStreamer | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without its end token; `model` is a MemoryAugmentedLM or any model with
    `generate`.

    Prompts are padded on the left to one length.
    """
    num_tokens = max(map(len, ids))
    padding, ends = generation.pad_token_id, _as_list(generation.eos_token_id)
    tokens_BS = torch.tensor(
        [[padding] * (num_tokens - len(row)) + list(row) for row in ids], device=model.device
    )
    mask_BS = torch.tensor(
        [[0] * (num_tokens - len(row)) + [1] * len(row) for row in ids], device=model.device
    )
    generated = model.generate(
        tokens_BS,
        attention_mask=mask_BS,
        generation_config=generation,
        **({"streamer": streamer} if streamer else {}),
    )
    rows: list[list[int]] = generated[:, num_tokens:].tolist()
    stops = [next((at for at, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


def side_by_side(headers: tuple[str, str], texts: Sequence[str]) -> str:
    """Two texts in two columns; their own line ends are kept, long lines are wrapped."""
    columns = [
        [header, "-" * _COLUMN_WIDTH, *_wrap(text)] for header, text in zip(headers, texts, strict=True)
    ]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(f"{left.ljust(_COLUMN_WIDTH)}  {right}".rstrip() for left, right in rows)


def _wrap(text: str) -> list[str]:
    lines = text.expandtabs(4).split("\n")
    return [
        piece
        for line in lines
        for piece in textwrap.wrap(line, _COLUMN_WIDTH, replace_whitespace=False, drop_whitespace=False)
        or [""]
    ]


def _read_prompts(config: Config) -> list[str]:
    if config.prompts_file is None:
        return list(config.prompt)
    if not config.prompts_file.exists():
        raise UserError(
            f"--prompts-file {config.prompts_file} does not exist: give a text file with one prompt a line"
        )
    try:
        lines = config.prompts_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts-file {config.prompts_file} cannot be read as UTF-8 text ({error}): give a text file"
            " with one prompt a line"
        ) from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {config.prompts_file} holds no prompt: write one a line")
    return prompts


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> MemoryAugmentedLM:
    """The joint model by this package's classes: no code from the export is run.

    Its weights are read straight to `device`, or spread over devices by `device_map`.

    Raises:
        DamagedDataError: it is not an export, or its files lack weights (transformers would fill them at
            random and continue).
    """
    weights_dtype = DTYPES[resolve_dtype(dtype, device)]
    # A CPU needs no map, and then no accelerate.
    placement = device_map or (None if device.type == "cpu" else {"": device})
    remedy = "run tools/convert_checkpoint.py again"
    try:
        loaded: Any = MemoryAugmentedLM.from_pretrained(
            name, dtype=weights_dtype, device_map=placement, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library under the loader raises a family of its own
        raise DamagedDataError(f"--model {name} cannot be loaded ({error}): {remedy}") from error
    model, report = loaded
    if faults := {kind: sorted(map(str, values)) for kind, values in report.items() if values}:
        raise DamagedDataError(f"--model {name} does not hold the whole model ({faults}): {remedy}")
    joint: MemoryAugmentedLM = model.eval()
    joint.mixture = mixture_on_device
    return joint


def read_export(model: str) -> tuple[MemoryAugmentedConfig, Any]:
    """The export's configuration and tokenizer.

    Raises:
        UserError: there is no export of that name, or its tokenizer is missing or another one.
    """
    try:
        settings = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # each library under these raises a family of its own
        raise UserError(
            f"--model {model} cannot be read ({str(error).splitlines()[0]}): give the output of "
            "tools/convert_checkpoint.py, or check the network for a Hub name"
        ) from error
    if not isinstance(settings, MemoryAugmentedConfig):
        raise UserError(
            f"--model {model} holds a {settings.model_type} model without a memory: give the output of "
            "tools/convert_checkpoint.py"
        )
    # Where the files are missing, transformers gives a tokenizer without words.
    if settings.vocabulary_sha256 and vocabulary_sha256(tokenizer) != settings.vocabulary_sha256:
        raise UserError(
            f"--model {model} has a tokenizer of {len(tokenizer)} tokens that is not the one it was made"
            " with: run tools/convert_checkpoint.py again"
        )
    return settings, tokenizer


def _encode(tokenizer: Any, prompts: Sequence[str], context: float, max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        UserError: a prompt is empty, or does not fit the base's context together with the new tokens.
    """
    ids: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    for number, row in enumerate(ids, start=1):
        if not row:
            raise UserError(f"prompt {number} is empty: give at least one word")
        if len(row) >= context:
            raise UserError(
                f"prompt {number} has {len(row):,} tokens, and the model reads {context:,}: shorten it to "
                f"{max(context - max_new_tokens, 1):,} or fewer"
            )
        if len(row) + max_new_tokens > context:
            raise UserError(
                f"prompt {number} has {len(row):,} tokens, and with --max-new-tokens {max_new_tokens:,}"
                f" passes the {context:,} that the model reads: shorten it, or ask for at most"
                f" {context - len(row):,}"
            )
    return ids


def _continue_all(
    config: Config,
    model: MemoryAugmentedLM,
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    gate: StoredGate,
    write: Callable[[str], object] | None,
) -> list[str]:
    """The continuation of each prompt with this gate; the same seed for each gate."""
    model.set_gate(gate)
    generation = _generation_config(config, model, tokenizer)
    torch.manual_seed(config.seed)
    streamer = None if write is None else _Writer(tokenizer, write)
    rows = [
        row
        for at in range(0, len(ids), config.batch_size)
        for row in continue_batch(model, ids[at : at + config.batch_size], generation, streamer=streamer)
    ]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def _generation_config(config: Config, model: MemoryAugmentedLM, tokenizer: Any) -> GenerationConfig:
    own: Any = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    candidates = (
        own.pad_token_id,
        tokenizer.pad_token_id,
        *_as_list(ends),
        0,
    )  # masked, so that any token does
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        eos_token_id=ends,
        bos_token_id=own.bos_token_id,
        pad_token_id=next(token for token in candidates if token is not None),
        **sampling,
    )


def _as_list(tokens: int | list[int] | None) -> list[int]:
    if tokens is None:
        return []
    return tokens if isinstance(tokens, list) else [tokens]
