"""Part of `answer_questions`: questions and one model → answers in words, or the choices' scores.

Asked one by one, as a user asks them, the time to the first token and the tokens a second are those of a
batch of one. In a batch the answers are the same, but where rounding decides between two tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.finite_scores import check_distributions, refuse_overflow
from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.engines.tokenizer import TextEncoder
from mlpmem_ds.models.generation_settings import end_tokens
from mlpmem_ds.models.left_padding import padded_on_the_left, reads_padding
from mlpmem_ds.stages.generation.generate import own_settings
from mlpmem_ds.stages.generation.text import text_after
from mlpmem_ds.stages.questions.lengths import ContextLimit, fault_of_answers, too_long

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

    @property
    def context_limit(self) -> ContextLimit:
        return ContextLimit(flag="--model", encoder=self.encoder, context=self.context)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A continuation in words, and what it took."""

    text: str
    num_tokens: int
    first_token_seconds: float
    seconds: float
    is_cut: bool
    """whether the prompt lost its beginning"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a model says of one continuation: its natural log-probability, and whether each of its tokens is
    the likeliest one."""

    log_probability: float
    is_greedy: bool
    is_cut: bool
    """whether the prompt lost its beginning"""


def answer(
    answerer: Answerer, prompts: Sequence[str], max_new_tokens: int, *, stops: Sequence[str] = (_LINE_END,)
) -> list[Answer]:
    """Go on with each prompt of a batch, greedily, to the first of these texts after one that is not blank.

    The time to the first token is the batch's, and each answer has an equal share of its seconds. A model
    that would read the padding of a batch answers one by one.

    Raises:
        UserError: the model reads too few tokens for a prompt and an answer, or says what is no number.
    """
    if fault := fault_of_answers(answerer.context_limit, max_new_tokens):
        raise UserError(fault)
    if len(prompts) > 1 and reads_padding(answerer.model):
        return [answer(answerer, [prompt], max_new_tokens, stops=stops)[0] for prompt in prompts]
    max_tokens = answerer.context - max_new_tokens
    whole = answerer.encoder.encode_prompts(list(prompts))
    ids = [cut_ids(row, max_tokens, answerer.encoder) for row in whole]
    generation = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **answerer.tokens)
    tokens_BS, mask_BS = padded_on_the_left(ids, generation.pad_token_id, answerer.model.device)
    num_given, ends = tokens_BS.shape[1], end_tokens(generation.eos_token_id)
    tokenizer, clock = answerer.encoder.tokenizer, _Clock()
    ends_of_answers = _Stops(tokenizer, num_given, len(ids), stops)
    with own_settings(answerer.model, generation):
        generated = answerer.model.generate(
            tokens_BS,
            attention_mask=mask_BS,
            generation_config=generation,
            streamer=clock,
            logits_processor=[refuse_overflow],
            stopping_criteria=StoppingCriteriaList([ends_of_answers]),
        )
    answers = []
    rows = generated[:, num_given:].tolist()
    for given, prompt, row, length in zip(whole, ids, rows, ends_of_answers.lengths, strict=True):
        row = row[:length]  # what follows in a batch is padding
        stop = next((at for at, token in enumerate(row) if token in ends), len(row))
        answers.append(
            Answer(
                text=_before(text_after(tokenizer, prompt, row[:stop]).strip(), stops),
                num_tokens=min(stop + 1, len(row)),
                first_token_seconds=clock.times[0],
                seconds=clock.times[-1] / len(ids),
                is_cut=len(given) > max_tokens,
            )
        )
    return answers


@torch.no_grad()
def score_choices(
    answerer: Answerer, questions: Sequence[tuple[str, Sequence[str]]], *, batch: int = 1
) -> list[list[Choice]]:
    """How likely each choice of each question is after the prompt and a blank, by the harness's convention of
    tokens; `batch` choices at a time. A prompt loses its beginning where the model reads too few tokens for
    it and a choice.

    Raises:
        UserError: a choice is longer than the model reads, or the model says what is no number.
    """
    rows: list[_Row] = []
    for prompt, choices in questions:
        for choice in choices:
            before, after = encode_pair(answerer.encoder, prompt, f" {choice}")
            if len(after) >= answerer.context_limit.free:
                raise UserError(too_long(len(after), answerer.context))
            whole = [*before, *after]
            ids = cut_ids(whole, answerer.context, answerer.encoder)
            rows.append(_Row(ids=ids, num_scored=len(after), is_cut=len(whole) > answerer.context))
    scored: list[Choice] = []
    for start in range(0, len(rows), batch):
        scored += _score_rows(answerer, rows[start : start + batch])
    each = iter(scored)
    return [[next(each) for _ in choices] for _, choices in questions]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What the model reads of a prompt and a choice, and how many ids, at the end, are scored."""

    ids: list[int]
    num_scored: int
    is_cut: bool


def _score_rows(answerer: Answerer, rows: Sequence[_Row]) -> list[Choice]:
    """Padding stands behind the ids, where no token that counts can see it."""
    length, device = max(len(row.ids) for row in rows), answerer.model.device
    padded = [row.ids + row.ids[-1:] * (length - len(row.ids)) for row in rows]
    arguments = {"input_ids": torch.tensor(padded, device=device)}
    if len(rows) > 1:
        mask = [[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in rows]
        arguments["attention_mask"] = torch.tensor(mask, device=device)
    logits_BSV = answerer.model(**arguments).logits
    scored = []
    for logits_SV, row in zip(logits_BSV, rows, strict=True):
        ids, count = row.ids, row.num_scored
        log_SV = logits_SV[len(ids) - count - 1 : len(ids) - 1].float().log_softmax(dim=-1)
        check_distributions(log_SV)
        continuation_S = torch.tensor(ids[-count:], device=log_SV.device)
        log_p = float(log_SV.gather(1, continuation_S[:, None]).double().sum())
        is_greedy = bool((log_SV.argmax(dim=-1) == continuation_S).all())
        scored.append(Choice(log_probability=log_p, is_greedy=is_greedy, is_cut=row.is_cut))
    return scored


def cut_ids(ids: list[int], num_tokens: int, encoder: TextEncoder) -> list[int]:
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


def _before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


class _Stops(StoppingCriteria):
    """Whether a stop stands after some text of an answer; `lengths` says after how many new tokens."""

    def __init__(
        self, tokenizer: Any, num_prompt_tokens: int, num_answers: int, stops: Sequence[str]
    ) -> None:
        self._tokenizer, self._num_prompt_tokens, self._stops = tokenizer, num_prompt_tokens, stops
        self.lengths: list[int | None] = [None] * num_answers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        for number, ids in enumerate(input_ids[:, self._num_prompt_tokens :]):
            if self.lengths[number] is None:
                text = self._tokenizer.decode(ids).lstrip()
                if any(stop in text for stop in self._stops):
                    self.lengths[number] = len(ids)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)
