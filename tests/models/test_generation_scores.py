"""Every setting of `generate` that changes scores: at λ = 0 the base's own tokens, elsewhere those of a slow
reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation import logits_process as library

from .carried_generation import padded
from .conftest import EOS, VOCAB, random_ids
from .mixture_reference import (
    KINDS,
    LENGTHS,
    NEW,
    Guidance,
    Reference,
    Setting,
    assert_the_bases_at_zero,
    by_hand,
    generate,
    reference_of,
)

PADDING = torch.tensor([8 - length for length in LENGTHS])


@pytest.fixture(scope="module")
def one() -> Reference:
    return reference_of("one memory")


@pytest.fixture(scope="module")
def free(one: Reference) -> torch.Tensor:
    """What follows the prompts where nothing is set, [3, NEW]."""
    return by_hand(one, Setting(options={}))[:, 8:]


def alternating(_: int, ids_S: torch.Tensor) -> list[int]:
    """For `prefix_allowed_tokens_fn`: an odd token follows an even one, and the other way round."""
    return list(range(4 - int(ids_S[-1]) % 2, VOCAB, 2))


def chosen(free: torch.Tensor) -> tuple[int, list[int], list[int], list[Any]]:
    """Of the free tokens one, a pair, some as ends, and biases of one, the pair and another."""
    first, pair = int(free[0, 0]), free[1, 1:3].tolist()
    ends = sorted({int(free[0, 2]), int(free[2, 1]), EOS})
    return first, pair, ends, [[[first], -6.0], [pair, -30.0], [[11], 1.5]]


def greedy(free: torch.Tensor, reference: Reference) -> dict[str, Setting]:
    """Settings that change the scores of greedy decoding, chosen so that each forbids what was free."""
    first, pair, ends, bias = chosen(free)
    eos = torch.tensor(ends)
    away = random_ids(3, 4).flip(0)
    return {
        "bad words": Setting(
            options={"bad_words_ids": [[first], pair]},
            processors=[library.NoBadWordsLogitsProcessor([[first], pair])],
        ),
        "sequence bias": Setting(
            options={"sequence_bias": bias}, processors=[library.SequenceBiasLogitsProcessor(bias)]
        ),
        "repetition penalty": Setting(
            options={"repetition_penalty": 1.6},
            processors=[library.RepetitionPenaltyLogitsProcessor(1.6, prompt_ignore_length=PADDING)],
        ),
        "encoder repetition penalty": Setting(
            options={"encoder_repetition_penalty": 3.0},
            processors=[library.EncoderRepetitionPenaltyLogitsProcessor(3.0, padded(LENGTHS)[0])],
        ),
        "no repeated n-grams": Setting(
            options={"no_repeat_ngram_size": 1}, processors=[library.NoRepeatNGramLogitsProcessor(1)]
        ),
        "end tokens": Setting(options={}, ends=ends),
        "min_length": Setting(
            options={"min_length": 13}, processors=[library.MinLengthLogitsProcessor(13, eos)], ends=ends
        ),
        "min_new_tokens": Setting(
            options={"min_new_tokens": 4},
            processors=[library.MinNewTokensLengthLogitsProcessor(8, 4, eos)],
            ends=ends,
        ),
        "a length that ends are rewarded by": Setting(
            options={"exponential_decay_length_penalty": (2, 2.0)},
            processors=[library.ExponentialDecayLengthPenalty((2, 2.0), torch.tensor([9]), 8)],
            ends=[9],
        ),
        "a forced last token": Setting(
            options={"forced_eos_token_id": 7},
            processors=[library.ForcedEOSTokenLogitsProcessor(8 + NEW, 7)],
        ),
        "suppressed tokens": Setting(
            options={"suppress_tokens": [first], "begin_suppress_tokens": [int(free[1, 0])]},
            processors=[
                library.SuppressTokensLogitsProcessor([first]),
                library.SuppressTokensAtBeginLogitsProcessor([int(free[1, 0])], 8),
            ],
        ),
        "a constraint on what follows": Setting(
            options={"prefix_allowed_tokens_fn": alternating},
            processors=[library.PrefixConstrainedLogitsProcessor(alternating, 1)],
        ),
        "guidance": Setting(
            options={"guidance_scale": 1.7, "negative_prompt_ids": away},
            processors=[Guidance(reference, 1.7, away, 8)],
        ),
    }


def all_at_once(free: torch.Tensor) -> Setting:
    """Several of them, in the order in which `generate` calls them."""
    first, pair, ends, bias = chosen(free)
    return Setting(
        options={
            "bad_words_ids": [[first], pair],
            "sequence_bias": bias,
            "repetition_penalty": 1.6,
            "no_repeat_ngram_size": 2,
            "min_new_tokens": 4,
        },
        processors=[
            library.SequenceBiasLogitsProcessor(bias),
            library.RepetitionPenaltyLogitsProcessor(1.6, prompt_ignore_length=PADDING),
            library.NoRepeatNGramLogitsProcessor(2),
            library.NoBadWordsLogitsProcessor([[first], pair]),
            library.MinNewTokensLengthLogitsProcessor(8, 4, torch.tensor(ends)),
        ],
        ends=ends,
    )


def sampled(options: dict[str, Any], *processors: LogitsProcessor) -> Setting:
    return Setting(options=options, processors=processors, do_sample=True)


_GREEN = {"greenlist_ratio": 0.4, "bias": 3.0}
_SYNTH = {"keys": [654, 400, 836, 123], "ngram_len": 3}
SAMPLING = {
    "temperature": sampled({"temperature": 0.6}, library.TemperatureLogitsWarper(0.6)),
    "top-k": sampled({"top_k": 4}, library.TopKLogitsWarper(4)),
    "top-p": sampled({"top_p": 0.7}, library.TopPLogitsWarper(0.7)),
    "min-p": sampled(
        {"temperature": 1.5, "min_p": 0.2},
        library.TemperatureLogitsWarper(1.5),
        library.MinPLogitsWarper(0.2),
    ),
    "typical": sampled({"typical_p": 0.6}, library.TypicalLogitsWarper(0.6)),
    "top-h": sampled({"top_h": 0.5}, library.TopHLogitsWarper(0.5)),
    "epsilon cutoff": sampled({"epsilon_cutoff": 0.05}, library.EpsilonLogitsWarper(0.05)),
    "eta cutoff": sampled({"eta_cutoff": 0.2}, library.EtaLogitsWarper(0.2)),
    "a watermark": sampled(
        {"watermarking_config": WatermarkingConfig(**_GREEN)},
        library.WatermarkLogitsProcessor(VOCAB, "cpu", **_GREEN),
    ),
    "SynthID's watermark": sampled(
        {"watermarking_config": SynthIDTextWatermarkingConfig(**_SYNTH)},
        library.SynthIDTextWatermarkLogitsProcessor(
            **_SYNTH,
            sampling_table_size=2**16,
            sampling_table_seed=0,
            context_history_size=1024,
            device="cpu",
        ),
    ),
    "all at once": sampled(
        {
            "repetition_penalty": 1.4,
            "temperature": 1.3,
            "top_k": 20,
            "top_p": 0.9,
            "renormalize_logits": True,
        },
        library.RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=PADDING),
        library.TemperatureLogitsWarper(1.3),
        library.TopKLogitsWarper(20),
        library.TopPLogitsWarper(0.9),
        library.LogitNormalization(),
    ),
}
"""the processors in the order in which `generate` calls them"""


@pytest.mark.parametrize(
    "name",
    [
        "bad words",
        "sequence bias",
        "repetition penalty",
        "encoder repetition penalty",
        "no repeated n-grams",
        "end tokens",
        "min_length",
        "min_new_tokens",
        "a length that ends are rewarded by",
        "a forced last token",
        "suppressed tokens",
        "a constraint on what follows",
        "guidance",
    ],
)
def test_settings_of_greedy_decoding(name: str, one: Reference, free: torch.Tensor) -> None:
    setting = greedy(free, one)[name]
    expected = by_hand(one, setting)
    assert torch.equal(generate(one.joint, setting), expected)
    assert expected[:, 8:].tolist() != free.tolist()  # the setting does something
    assert_the_bases_at_zero(one.joint, setting)


@pytest.mark.parametrize("name", SAMPLING)
def test_settings_of_sampling(name: str, one: Reference) -> None:
    assert torch.equal(generate(one.joint, SAMPLING[name]), by_hand(one, SAMPLING[name]))
    assert_the_bases_at_zero(one.joint, SAMPLING[name])


@pytest.mark.parametrize("kind", KINDS)
def test_several_settings_at_once(kind: str, free: torch.Tensor) -> None:
    reference = reference_of(kind)
    guidance = greedy(free, reference)["guidance"]
    for setting in (all_at_once(free), guidance, SAMPLING["all at once"]):
        assert torch.equal(generate(reference.joint, setting), by_hand(reference, setting))
        assert_the_bases_at_zero(reference.joint, setting)
