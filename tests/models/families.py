"""Tiny bases of many families, with random weights, for tests of what is found by structure."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .test_backbone import FAMILIES, GPT2_SIZES, LLAMA_SIZES

_GPTJ = {**GPT2_SIZES, "rotary_dim": 4}
BASES: dict[str, dict[str, object]] = {
    **{family: sizes for family, (sizes, _, _) in FAMILIES.items()},
    "opt_without_norm": {
        **LLAMA_SIZES,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "phi": LLAMA_SIZES,
    "falcon": {**LLAMA_SIZES, "num_kv_heads": 2},
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mpt": {"vocab_size": 61, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "olmo": LLAMA_SIZES,
    "olmo2": LLAMA_SIZES,
    "nemotron": LLAMA_SIZES,
    "stablelm": LLAMA_SIZES,
    "starcoder2": LLAMA_SIZES,
    "cohere2": {**LLAMA_SIZES, "logit_scale": 0.3, "sliding_window": 4},
    "gemma": {**LLAMA_SIZES, "head_dim": 8},
    "glm": {**LLAMA_SIZES, "head_dim": 8},
    "smollm3": LLAMA_SIZES,
    "gpt_bigcode": GPT2_SIZES,
    "xglm": {"vocab_size": 61, "d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
}
_OPT = ("_post_norm", "_without_norm")


def tiny_base(family: str) -> PreTrainedModel:
    """In float32 and eval mode, its weights moved away from where they start."""
    torch.manual_seed(3)
    name = family
    for ending in _OPT:
        name = name.removesuffix(ending)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **BASES[family]))
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return model
