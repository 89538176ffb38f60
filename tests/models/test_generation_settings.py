"""Where generation stops, and the rows of a padded head that it never takes, also in plain transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.generation_settings import (
    choosing_settings,
    complete_settings,
    end_tokens,
    rows_without_token,
    token_settings,
)
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

from ..joint_models import joined

ROWS = 64
WORDS = {
    "<e>": 0,
    "<pad>": 1,
    "a": 2,
    "b": 3,
    "<chat>": 4,
    "c": 7,
}  # holes at 5 and 6, and 56 rows of padding


def tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(WORDS, unk_token="<e>")), eos_token="<e>", **tokens
    )


def base(own: dict[str, Any] | None = None, **config: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    settings = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5, **config)
    model = LlamaForCausalLM(settings).eval()
    model.generation_config = GenerationConfig(**(own or {}))
    return model


def complete(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, **more: Any) -> GenerationConfig:
    return complete_settings(model.generation_config, base=model, tokenizer=words, num_rows=ROWS, **more)


def test_end_tokens_are_listed_once_in_order() -> None:
    assert end_tokens(None, 3, [5, 3], (0,), -1, [7, -2]) == [3, 5, 0, 7]


@pytest.mark.parametrize(
    ("own", "config", "further", "expected"),
    [
        ({"eos_token_id": 0}, {"eos_token_id": 0}, (), 0),
        ({"eos_token_id": 4}, {"eos_token_id": 4}, (), [4, 0]),
        ({"eos_token_id": [4, 7]}, {"eos_token_id": 3}, (), [4, 7, 3, 0]),
        ({"eos_token_id": 0}, {}, (), 0),  # the family's default, 2, is the word "a" here
        ({}, {"eos_token_id": [3]}, (7,), [3, 0, 7]),
        ({"eos_token_id": [ROWS + 9, 0]}, {}, (), 0),
        ({"eos_token_id": -1}, {}, (), 0),
    ],
)
def test_generation_stops_at_all_that_are_named(
    own: dict[str, Any], config: dict[str, Any], further: tuple[int, ...], expected: object
) -> None:
    assert complete(base(own, **config), tokenizer(), further_ends=further).eos_token_id == expected


@pytest.mark.parametrize(
    ("own", "tokens", "expected"),
    [
        ({"pad_token_id": 3}, {}, 3),
        ({}, {"pad_token": "<pad>"}, 1),
        ({}, {}, 0),
        ({"pad_token_id": ROWS}, {}, 0),  # a padding token that the head has no row for
        ({"pad_token_id": -1}, {"pad_token": "<new>"}, 6),
    ],
)
def test_padding_is_a_row_of_the_head(own: dict[str, Any], tokens: dict[str, str], expected: int) -> None:
    assert complete(base(own), tokenizer(**tokens)).pad_token_id == expected


def test_rows_without_a_token_are_holes_and_padding() -> None:
    assert rows_without_token(tokenizer(), ROWS) == [5, 6, *range(8, ROWS)]
    assert rows_without_token(tokenizer(), 5) == []
    settings = complete(base({"suppress_tokens": [3]}), tokenizer())
    assert settings.suppress_tokens == [3, 5, 6, *range(8, ROWS)]


def test_the_models_own_settings_stay_and_the_given_one_is_not_changed() -> None:
    model = base({"temperature": 0.9, "repetition_penalty": 1.3, "min_new_tokens": 2, "max_length": 99})
    settings = complete(model, tokenizer())
    assert settings.temperature == 0.9 and model.generation_config.eos_token_id is None
    chosen = {"temperature": 0.9, "repetition_penalty": 1.3, "min_new_tokens": 2}
    assert choosing_settings(settings) == chosen and choosing_settings(None) == {}
    assert token_settings(settings)["eos_token_id"] == 0 and "temperature" not in token_settings(settings)
    assert choosing_settings(GenerationConfig.from_model_config(model.config)) == {}


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 5.0}])
def test_plain_generate_never_takes_a_row_without_token(way: dict[str, Any]) -> None:
    model = base()
    with torch.no_grad():  # the rows of the padding are by far the likeliest
        model.lm_head.weight[8:] = 0
        model.lm_head.weight[8:, 0] = 30 * model.lm_head.weight[:8].abs().max()
        model.lm_head.weight[8:32] *= -1
    shape = MemoryConfig(input_size=16, hidden_size=16, intermediate_size=16, num_blocks=1, vocab_size=ROWS)
    joint = joined(model, Memory(shape), lmbda=0.3, input_point=CapturePoint(layer=-1))
    prompt, mask = torch.tensor([[2, 3], [3, 7]]), torch.ones(2, 2, dtype=torch.long)
    more = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, **way}
    torch.manual_seed(1)
    assert (joint.generate(prompt, **more)[:, 2:] >= 8).any()
    joint.generation_config = complete_settings(
        joint.generation_config, base=model, tokenizer=tokenizer(), num_rows=ROWS
    )
    for lmbda in (0.0, 0.3, 1.0):
        joint.lmbda = lmbda
        taken = set(joint.generate(prompt, **more)[:, 2:].flatten().tolist())
        assert taken <= set(WORDS.values()), taken
