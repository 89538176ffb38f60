"""Every way of `generate`: beams, several sequences, assistants, stop strings, padding, quantized caches; at
λ = 0 the base's own tokens, elsewhere those of a slow reference."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import QuantizedCache
from transformers.generation import logits_process as library
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from ..toy_tokenizers import byte_level
from .carried_generation import padded
from .conftest import EOS, PAD, random_ids, spread, tiny_base, tiny_joint
from .mixture_reference import (
    KINDS,
    LENGTHS,
    NEW,
    Reference,
    Setting,
    WholeForwards,
    assert_the_bases_at_zero,
    base_alone,
    by_hand,
    generate,
    generate_by_hand,
    reference_of,
)

BEAMS = {
    "several sequences": Setting(options={"num_beams": 3, "num_return_sequences": 3}),
    "lengths and ends": Setting(
        options={"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "min_new_tokens": 3},
        ends=[EOS, 5, 9, 11, 13, 17],
    ),
    "sampled": Setting(options={"num_beams": 2, "temperature": 1.2, "top_p": 0.9}, do_sample=True),
    "processors": Setting(
        options={
            "num_beams": 3,
            "repetition_penalty": 1.5,
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[4], [8, 9]],
            "sequence_bias": [[[11], 1.5], [[20, 30], -4.0]],
            "renormalize_logits": True,
        }
    ),
}


def assert_beams_of_the_reference(reference: Reference, setting: Setting) -> None:
    expected = generate(WholeForwards(reference), setting, use_cache=False)
    assert torch.equal(generate(reference.joint, setting), expected)
    assert_the_bases_at_zero(reference.joint, setting)


@pytest.mark.parametrize("name", BEAMS)
def test_beams(name: str) -> None:
    assert_beams_of_the_reference(reference_of("one memory"), BEAMS[name])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_beams_of_banks_and_gates(kind: str) -> None:
    assert_beams_of_the_reference(reference_of(kind), BEAMS["processors"])


@pytest.mark.parametrize("kind", KINDS)
def test_several_sampled_sequences_of_a_prompt(kind: str) -> None:
    setting = Setting(options={"num_return_sequences": 2, "max_new_tokens": 6}, do_sample=True)
    reference = reference_of(kind)
    found = generate(reference.joint, setting)
    assert found.shape == (6, 14) and torch.equal(found, by_hand(reference, setting)[:, :14])
    assert_the_bases_at_zero(reference.joint, setting)


def test_a_largest_length_counts_the_prompt() -> None:
    reference = reference_of("one memory")
    setting = Setting(options={"max_length": 13, "max_new_tokens": None})
    assert torch.equal(generate(reference.joint, setting), by_hand(reference, Setting(options={}))[:, :13])
    assert_the_bases_at_zero(reference.joint, setting)


@pytest.fixture(scope="module")
def assistant() -> Any:
    """Another model of the same vocabulary."""
    model = tiny_base("gpt2")
    spread(model, 40)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_assistants_and_prompt_lookup_with_processors(kind: str, assistant: Any) -> None:
    reference, prompt = reference_of(kind), random_ids(1, 6)
    joint = reference.joint
    bad = [[int(token)] for token in generate_by_hand(
        reference, prompt, torch.ones_like(prompt), num_new=3)[0, 6:]]  # fmt: skip
    expected = generate_by_hand(
        reference,
        prompt,
        torch.ones_like(prompt),
        num_new=NEW,
        processors=[
            library.RepetitionPenaltyLogitsProcessor(1.4),
            library.NoBadWordsLogitsProcessor(bad),
        ],
    )
    for helper in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
        options = {
            "max_new_tokens": NEW,
            "eos_token_id": None,
            "pad_token_id": PAD,
            "repetition_penalty": 1.4,
            "bad_words_ids": bad,
            **helper,
        }
        assert torch.equal(joint.generate(prompt, do_sample=False, **options), expected)
        with base_alone(joint):
            for do_sample in (False, True):
                tokens = []
                for model in (joint, joint.base):
                    torch.manual_seed(3)
                    tokens.append(model.generate(prompt, do_sample=do_sample, **options))
                assert torch.equal(*tokens)


def test_stop_strings_end_where_their_text_does() -> None:
    reference = reference_of("one memory")
    free = by_hand(reference, Setting(options={}))
    tokenizer = byte_level()
    stops = [tokenizer.decode(free[0, 10:12]), tokenizer.decode(free[2, 12:13])]
    assert [len(stop) for stop in stops] == [2, 1]

    def is_over(ids: Sequence[int]) -> bool:
        return str(tokenizer.decode(ids)).endswith(tuple(stops))

    # transformers pads a row that has ended only where there is an end token.
    expected = generate_by_hand(reference, *padded(LENGTHS), num_new=NEW, ends=[EOS], is_over=is_over)
    assert expected.shape == (3, 13) and expected[0, 11] != expected[0, 12] == PAD
    setting = Setting(options={"stop_strings": stops, "tokenizer": tokenizer}, ends=[EOS])
    assert torch.equal(generate(reference.joint, setting), expected)
    assert_the_bases_at_zero(reference.joint, setting)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_right_is_said_and_does_what_it_does_with_the_base(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = reference_of(kind)
    joint, (ids_BS, mask_BS) = reference.joint, padded(LENGTHS)
    for row, length in enumerate(LENGTHS):
        ids_BS[row], mask_BS[row] = ids_BS[row].roll(length), mask_BS[row].flip(0)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    options = {"attention_mask": mask_BS, "max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    found = joint.generate(ids_BS, **options, eos_token_id=None)
    assert "right-padding was detected" in caplog.text
    assert torch.equal(joint.generate(ids_BS, **options, eos_token_id=None, use_cache=False), found)
    # A forward does not care on which side the padding is.
    logits = joint(ids_BS, attention_mask=mask_BS).logits
    for row, length in enumerate(LENGTHS):
        expected = reference.logits(tuple(ids_BS[row, :length].tolist()))
        torch.testing.assert_close(logits[row, length - 1], expected, rtol=1e-4, atol=1e-4)
    with base_alone(joint):
        assert torch.equal(joint.generate(ids_BS, **options), joint.base.generate(ids_BS, **options))


QUANTIZED = {
    "fp8": ({"backend": "fp8"}, True),
    "quanto": (
        {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4},
        is_optimum_quanto_available(),
    ),
    "hqq": (
        {
            "backend": "hqq",
            "nbits": 4,
            "axis_key": 1,
            "axis_value": 1,
            "q_group_size": 16,
            "residual_length": 4,
        },
        is_hqq_available(),
    ),
}


def use_quanto_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking as quanto's function in Python does it: what it compiles at first use takes minutes."""

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    extension = importlib.import_module("optimum.quanto.library.extensions.cpp").ext
    monkeypatch.setattr(extension, "_lib", SimpleNamespace(unpack=unpack))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_caches(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, is_there = QUANTIZED[name]
    if not is_there:
        pytest.skip(f"the library of the cache {name} is not installed")
    if name == "quanto":
        use_quanto_without_a_compiler(monkeypatch)
    reference = reference_of(kind)
    joint, ids_BS = reference.joint, random_ids(3, 8)
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD,
        "cache_implementation": "quantized",
        "cache_config": config,
    }
    found = joint.generate(ids_BS, **options, output_logits=True, return_dict_in_generate=True)
    # Once more with a quantized cache of the base alone: its states are what the memories read.
    cache = QuantizedCache(config=joint.base.config, **config)
    replayed = Reference(joint=joint)
    for step, logits_BV in enumerate(found.logits):
        new = found.sequences[:, : 8 + step] if step == 0 else found.sequences[:, 7 + step : 8 + step]
        output = joint.base(new, past_key_values=cache, use_cache=True, output_hidden_states=True)
        for row, ids in enumerate(found.sequences[:, : 8 + step].tolist()):
            replayed.take(tuple(ids), output, row)
        expected = replayed.rows(found.sequences[:, : 8 + step], torch.ones(3, 8 + step))
        torch.testing.assert_close(logits_BV, expected, rtol=1e-4, atol=1e-4)
    last = reference.rows(found.sequences[:, :-1], torch.ones(3, 7 + NEW))
    assert (found.logits[-1] - last).abs().max() > 1e-3  # it is quantized
    with base_alone(joint):
        assert torch.equal(joint.generate(ids_BS, **options), joint.base.generate(ids_BS, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"num_beams": 3, "force_words_ids": [[4]]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
    ],
    ids=["groups of beams", "forced words", "contrastive search", "DoLa"],
)
def test_what_transformers_took_out_is_refused_as_by_the_base(options: dict[str, Any]) -> None:
    """It moved them to repositories of their own on the Hub, whose code is run only where it is trusted."""
    joint = reference_of("one memory").joint
    messages = []
    for model in (joint, joint.base):
        with pytest.raises(ValueError, match="requires `trust_remote_code=True`") as error:
            model.generate(random_ids(1, 5), max_new_tokens=2, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_arguments_of_the_bases_forward_are_taken_and_others_refused_as_by_the_base() -> None:
    joint, prompt = tiny_joint("gpt2"), random_ids(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    joint.lmbda = 0.0
    types = (torch.arange(6) % 2).expand(2, 6)
    found, expected = (
        model.generate(prompt, token_type_ids=types, **options) for model in (joint, joint.base)
    )
    assert torch.equal(found, expected)
    messages = []
    for model in (joint, joint.base):
        with pytest.raises(ValueError, match=r"not used by the model: \['tokn_type_ids'\]") as error:
            model.generate(prompt, tokn_type_ids=types, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_an_assistant_of_the_models_own_first_layers_is_refused() -> None:
    options = {"max_new_tokens": 2, "pad_token_id": PAD, "assistant_early_exit": 2}
    with pytest.raises(
        ValueError, match="assistant_early_exit leaves out layers .*assistant_model=model.base"
    ):
        tiny_joint("llama").generate(random_ids(1, 5), **options)
