"""Which models read what their attention mask leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.models.left_padding import padded_on_the_left, reads_padding

from .conftest import LLAMA_SIZES, tiny_joint

OTHER_SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mixtral": {"num_local_experts": 4},  # a token more or less changes the size of an expert's product
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OTHER_SIZES)
def test_some_models_of_states_read_their_padding(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **LLAMA_SIZES, **OTHER_SIZES[family])
    base = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    assert reads_padding(base) == (family in ("recurrent_gemma", "rwkv", "xlstm"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_attention_does_not(family: str) -> None:
    joint = tiny_joint(family)
    assert not reads_padding(joint) and not reads_padding(joint.base)


def test_a_model_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = tiny_joint("gpt2")
    assert not reads_padding(joint)
    monkeypatch.setattr(joint.base, "forward", lambda *args, **kwargs: pytest.fail("it was read again"))
    assert not reads_padding(joint) and not reads_padding(joint.base)


def test_shorter_prompts_begin_with_padding() -> None:
    tokens_BS, mask_BS = padded_on_the_left([[2, 2], [3]], 9, torch.device("cpu"))
    assert tokens_BS.tolist() == [[2, 2], [9, 3]] and mask_BS.tolist() == [[1, 1], [0, 1]]
