"""A bigger model of the base's family: near the size that was asked for, and like the base in shape."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.baseline.bigger_model import bigger_config, new_model, num_parameters_of

BASES = {
    "gpt2": GPT2Config(vocab_size=500, n_embd=64, n_layer=4, n_head=4),
    "llama": LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "qwen3": Qwen3Config(  # its head size is not width over heads, and each layer has a type
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize("factor", [1.1, 1.5, 4.0, 8.0])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_the_size_is_near_and_the_shape_is_the_bases(base: PretrainedConfig, factor: float) -> None:
    size = num_parameters_of(base)
    config = bigger_config(base, round(factor * size))
    assert num_parameters_of(config) == pytest.approx(factor * size, rel=0.12)
    assert type(config) is type(base) and config.vocab_size == base.vocab_size
    assert config.num_hidden_layers >= base.num_hidden_layers and config.hidden_size >= base.hidden_size
    assert config.hidden_size / config.num_attention_heads == base.hidden_size / base.num_attention_heads
    if factor == 8.0:
        assert config.hidden_size > base.hidden_size and config.num_hidden_layers < 20
    model = new_model(config, seed=0, attention="eager")
    assert model.num_parameters() == num_parameters_of(config)
    assert all(weight.requires_grad for weight in model.parameters())


def test_fewer_parameters_than_the_base_has_are_refused() -> None:
    with pytest.raises(UserError, match="fewer than the base has"):
        bigger_config(BASES["llama"], 1000)
