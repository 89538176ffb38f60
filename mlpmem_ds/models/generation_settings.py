"""Where generation with a joint model stops, and which rows of its head it never takes.

Place in the pipeline: `convert_checkpoint` writes the settings into the export's generation_config.json, so
that plain transformers follows them; `generate`, `run_lm_eval` and the samples of `evaluate` do too.

Two things that a base's own settings often lack. The end token that the corpus puts after each document is
the tokenizer's, and the base's files may name others (chat models, Qwen's base models): generation stops at
all of them. And a head often has more rows than the tokenizer has entries (it is padded to a multiple of 64,
or has holes): such a row has no text, so it is never taken. Its probability stays where it is, in the logits:
they are the mixture's over all rows, as the base was trained, and only the choice is restricted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TokenIds = int | Sequence[int] | None
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
# These of a model's own settings choose no token: the caller says how long, and the others change nothing.
_NO_CHOICE = {
    *_TOKENS,
    "_from_model_config",
    "cache_implementation",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
}


def complete_settings(
    own: GenerationConfig | None,
    *,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    further_ends: Sequence[int] = (),
) -> GenerationConfig:
    """A copy of a model's settings with every end token, a padding token, and the rows that are not taken.

    Args:
        own: of the model, None = it has none.
        base: its configuration may name end tokens.
        num_rows: of the head.
        further_ends: such as the corpus's end of documents.
    """
    settings = GenerationConfig() if own is None else copy.deepcopy(own)
    named = end_tokens(settings.eos_token_id, *_ends_of(base.config), tokenizer.eos_token_id, further_ends)
    ends = [end for end in named if end < num_rows]
    settings.eos_token_id = (ends[0] if len(ends) == 1 else ends) if ends else None
    # Padding is masked, so that any row will do; one that the head lacks would be read from beyond its end.
    candidates = (settings.pad_token_id, tokenizer.pad_token_id, *ends, 0)
    settings.pad_token_id = next(token for token in candidates if token is not None and 0 <= token < num_rows)
    unused = {*(settings.suppress_tokens or ()), *rows_without_token(tokenizer, num_rows)}
    settings.suppress_tokens = sorted(unused) or None
    return settings


def token_settings(settings: GenerationConfig) -> dict[str, Any]:
    """The settings that name tokens, without those that choose among them: greedy, unless more is said."""
    return {name: getattr(settings, name) for name in _TOKENS}


def choosing_settings(settings: GenerationConfig | None) -> dict[str, Any]:
    """What of a model's own settings changes the choice of tokens: temperature, penalties, forced tokens."""
    if settings is None:
        return {}
    return {name: value for name, value in settings.to_diff_dict().items() if name not in _NO_CHOICE}


def end_tokens(*given: TokenIds) -> list[int]:
    """All end tokens that are given, each once, in order; None and negative numbers name none."""
    return list(dict.fromkeys(end for ids in given for end in _listed(ids) if end >= 0))


def rows_without_token(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> list[int]:
    """The rows of a head, in order, that no entry of the tokenizer has."""
    entries = set(tokenizer.get_vocab().values())
    return [row for row in range(num_rows) if row not in entries]


def _ends_of(config: PreTrainedConfig) -> list[TokenIds]:
    """What config.json says. What it leaves out has the family's default, perhaps of another vocabulary."""
    texts = {id(text): text for text in (config, config.get_text_config(decoder=True))}.values()
    ends = [(text, getattr(text, "eos_token_id", None)) for text in texts]
    return [end for text, end in ends if end != getattr(type(text), "eos_token_id", None)]


def _listed(ids: TokenIds) -> Iterator[int]:
    if isinstance(ids, int):
        yield ids
    elif ids is not None:
        yield from ids
