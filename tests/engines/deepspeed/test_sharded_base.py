"""A base under ZeRO-3, on one rank here: the same numbers as whole, gathered only while it runs. Two ranks:
tests/stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.deepspeed.sharded_base import ShardedSource
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.models.capture_point import CapturePoint

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 300,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },  # tied, with biases
    "llama": SIZES,  # not tied
    # tied; scaled embeddings, capped logits
    "gemma2": SIZES | {"sliding_window": 64, "final_logit_softcapping": 0.5},
    "mixtral": SIZES | {"num_local_experts": 3},  # experts
}
POINTS = {"key": CapturePoint(layer=1), "input": CapturePoint(layer=0, point="layer_output")}


pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_the_whole_base(
    family: str, dtype: str, tmp_path: Path, save_model: Any
) -> None:
    path = save_model(family, FAMILIES[family], tmp_path / family)
    attention = "eager" if family == "gemma2" else "sdpa"  # its soft cap of the scores is not in sdpa
    whole, cut = (
        kind(path, device="cpu", dtype=dtype, attention=attention)
        for kind in (TransformersSource, ShardedSource)
    )
    assert cut.is_collective and not whole.is_collective and not is_deepspeed_zero3_enabled()
    assert (
        (cut.vocab_size, cut.width, cut.num_layers)
        == (whole.vocab_size, whole.width, whole.num_layers)
        == (300, 16, 2)
    )
    total = sum(parameter.numel() for parameter in whole.model.parameters())
    for size, length in ((2, 32), (3, 32), (1, 20), (2, 32)):
        tokens_BS = torch.randint(300, (size, length), generator=torch.Generator().manual_seed(size))
        found, expected = (source.read(tokens_BS, POINTS) for source in (cut, whole))
        assert all(torch.equal(found.states[name], expected.states[name]) for name in POINTS)
        values_N = torch.arange(size * length) % 300
        np.testing.assert_array_equal(
            cut.log_probabilities(found.final_BSD.flatten(0, 1), values_N),
            whole.log_probabilities(expected.final_BSD.flatten(0, 1), values_N),
        )
        # One rank's shards are the whole; besides them only biases and norms stay.
        assert total <= cut.numbers_held() < 1.1 * total
    whole_logits = whole.model(tokens_BS).logits
    torch.testing.assert_close(cut.model(tokens_BS).logits, whole_logits, rtol=0, atol=0)


def test_what_cannot_be_loaded_is_refused_as_without_shards(base_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "h.1.mlp" not in name}
    weights.pop("lm_head.weight", None)
    model.save_pretrained(tmp_path / "holes", state_dict=weights)
    with pytest.raises(UserError, match="lack 4 weights") as kept:  # a traceback, and what its frames hold
        ShardedSource(str(tmp_path / "holes"), device="cpu")
    assert not is_deepspeed_zero3_enabled() and kept
    with pytest.raises(UserError, match="nothing: there is no such directory"):
        ShardedSource(str(tmp_path / "nothing"), device="cpu")
    assert not is_deepspeed_zero3_enabled()
