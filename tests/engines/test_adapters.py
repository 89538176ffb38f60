"""Low-rank matrices next to linear layers: the model as it was at first, the formula, merged the same."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mlpmem_ds.engines.adapters import LowRankModel, parameters_of_rank_one

pytest.importorskip("peft", reason="the optional package peft is not installed")
TOKENS_BS = torch.arange(12).reshape(2, 6)


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gpt2":  # Conv1D, whose matrices are transposed; a tied head
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
        ).eval()
    shape = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(shape).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_starts_as_the_model_and_is_merged_into_it(kind: str) -> None:
    expected = make(kind)(TOKENS_BS).logits
    each = parameters_of_rank_one(make(kind))
    low_rank = LowRankModel(make(kind), rank=3, alpha=6.0)
    assert torch.equal(low_rank.model(TOKENS_BS).logits, expected)
    assert low_rank.num_trained == 3 * each
    frozen = [weight for weight in low_rank.model.parameters() if not weight.requires_grad]
    assert sum(weight.numel() for weight in frozen) == make(kind).num_parameters()
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(low_rank.model.state_dict()[name].shape, generator=generator) * 0.1
        for name in low_rank.names
    }
    low_rank.take(weights)
    adapted = low_rank.model(TOKENS_BS).logits
    assert (adapted - expected).abs().max() > 1e-3
    merged = low_rank.merged()
    torch.testing.assert_close(merged(TOKENS_BS).logits, adapted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in merged.state_dict())


def test_the_product_counts_alpha_over_rank_times() -> None:
    low_rank = LowRankModel(make("llama"), rank=2, alpha=6.0)
    name = "model.layers.0.self_attn.q_proj"
    before = make("llama").state_dict()[f"{name}.weight"]
    a, b = torch.full((2, 8), 0.1), torch.full((8, 2), 0.2)
    zero = {key: torch.zeros_like(low_rank.model.state_dict()[key]) for key in low_rank.names}
    low_rank.take({**zero, f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b})
    torch.testing.assert_close(low_rank.merged().state_dict()[f"{name}.weight"], before + 3.0 * (b @ a))
