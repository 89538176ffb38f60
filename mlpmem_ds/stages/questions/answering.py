"""Part of `answer_questions`: one question and one model → an answer in words, or the choices' scores.

Questions are asked one by one, as a user asks them: the time to the first token and the tokens a second are
those of a batch of one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.engines.tokenizer import TextEncoder
from mlpmem_ds.models.generation_settings import end_tokens
from mlpmem_ds.stages.generation.generate import own_settings
from mlpmem_ds.stages.generation.text import text_after

_LINE_END = "\n"


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A model that answers."""

    model: Any
    """a causal language model, or base and memory in one"""
    encoder: TextEncoder
    tokens: dict[str, Any]
    """settings of generation that name tokens"""
    context: int
    """most tokens that the model reads"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A continuation in words, and what it took."""

    text: str
    num_tokens: int
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a model says of one continuation: its natural log-probability, and whether each of its tokens is
    the likeliest one."""

    log_probability: float
    is_greedy: bool


def answer(answerer: Answerer, prompt: str, max_new_tokens: int) -> Answer:
    """Go on with a prompt, greedily, to the end of the first line that is not blank."""
    [ids] = answerer.encoder.encode_prompts([prompt])
    ids = _cut(ids, answerer.context - max_new_tokens, answerer.encoder)
    generation = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **answerer.tokens)
    tokens_BS = torch.tensor([ids], device=answerer.model.device)
    tokenizer, clock = answerer.encoder.tokenizer, _Clock()
    with own_settings(answerer.model, generation):
        generated = answerer.model.generate(
            tokens_BS,
            attention_mask=torch.ones_like(tokens_BS),
            generation_config=generation,
            streamer=clock,
            stopping_criteria=StoppingCriteriaList([_LineEnds(tokenizer, len(ids))]),
        )
    row, ends = generated[0, len(ids) :].tolist(), end_tokens(generation.eos_token_id)
    stop = next((at for at, token in enumerate(row) if token in ends), len(row))
    return Answer(
        text=text_after(tokenizer, ids, row[:stop]).strip().partition(_LINE_END)[0],
        num_tokens=len(row),
        first_token_seconds=clock.times[0],
        seconds=clock.times[-1],
    )


@torch.no_grad()
def score_choices(answerer: Answerer, prompt: str, choices: Sequence[str]) -> list[Choice]:
    """How likely each choice is after the prompt and a blank, by the harness's convention of tokens."""
    scored = []
    for choice in choices:
        before, after = encode_pair(answerer.encoder, prompt, f" {choice}")
        after = after[: answerer.context - 1 - len(answerer.encoder.begin_ids)]
        ids = _cut([*before, *after], answerer.context, answerer.encoder)
        tokens_BS = torch.tensor([ids], device=answerer.model.device)
        logits_SV = answerer.model(input_ids=tokens_BS).logits[0, -len(after) - 1 : -1]
        log_SV = logits_SV.float().log_softmax(dim=-1)
        continuation_S = tokens_BS[0, -len(after) :]
        log_p = float(log_SV.gather(1, continuation_S[:, None]).double().sum())
        scored.append(
            Choice(log_probability=log_p, is_greedy=bool((log_SV.argmax(dim=-1) == continuation_S).all()))
        )
    return scored


def _cut(ids: list[int], num_tokens: int, encoder: TextEncoder) -> list[int]:
    """The last `num_tokens` ids; what is cut off stands after the begin tokens."""
    if len(ids) <= num_tokens:
        return ids
    begin = list(encoder.begin_ids)
    return [*begin, *ids[len(ids) - num_tokens + len(begin) :]]


class _Clock(BaseStreamer):
    """Seconds from its making to each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._start, self._has_prompt = time.perf_counter(), False

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:  # transformers puts the prompt first
            self._has_prompt = True
            return
        self.times.append(time.perf_counter() - self._start)

    def end(self) -> None:
        return


class _LineEnds(StoppingCriteria):
    """Whether a line has ended after some text of the answer; a batch of one."""

    def __init__(self, tokenizer: Any, num_prompt_tokens: int) -> None:
        self._tokenizer, self._num_prompt_tokens = tokenizer, num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        text = self._tokenizer.decode(input_ids[0, self._num_prompt_tokens :])
        has_ended = _LINE_END in text.lstrip()
        return torch.tensor([has_ended], device=input_ids.device)
