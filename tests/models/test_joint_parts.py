"""The parts of a joint model: which positions are kept, which tokens are real, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.joint_parts import (
    check_sizes,
    described_memories,
    input_points,
    kept_positions,
    real_tokens,
)

from .conftest import random_ids, tiny_base, tiny_joint, tiny_memory


@torch.no_grad()
def test_kept_positions_are_those_of_transformers() -> None:
    joint, ids_BS = tiny_joint("llama"), random_ids(2, 7)
    whole = joint.base(ids_BS).logits
    for keep in (0, 1, 3, torch.tensor([1, 4])):
        expected = joint.base(ids_BS, logits_to_keep=keep).logits
        torch.testing.assert_close(kept_positions(whole, keep), expected, rtol=1e-5, atol=1e-6)
    at = torch.tensor([[0, 2], [5, 6]])
    assert torch.equal(kept_positions(whole, at)[1, 1], whole[1, 6])
    chosen = torch.zeros(2, 7, dtype=torch.bool)
    chosen[0, 3] = chosen[1, 1] = True
    assert torch.equal(kept_positions(whole, chosen), torch.stack([whole[0, 3], whole[1, 1]]))


def test_real_tokens_are_the_last_columns_of_a_mask() -> None:
    ids_BS = random_ids(2, 3)
    assert bool(real_tokens(ids_BS, None, None).all())
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    assert real_tokens(ids_BS, None, mask).tolist() == [[False, True, True], [True, True, True]]
    assert real_tokens(ids_BS, mask[:, 1:], {"full": mask}).tolist()[0] == [False, True, True]
    with pytest.raises(ValueError, match="token_mask"):
        real_tokens(ids_BS, None, {"full": mask})


def test_each_memory_of_a_bank_is_described_and_checked() -> None:
    joint = tiny_joint("gpt2", num_memories=3)
    described = described_memories(joint.config)
    assert [each["memory_config"]["hidden_size"] for each in described] == [24, 20, 20]
    assert list(input_points(joint.config, joint.base).values()) == [
        CapturePoint(layer=2),
        *[CapturePoint(layer=3, point="layer_output")] * 2,
    ]
    base = tiny_base("gpt2")
    with pytest.raises(ValueError, match="predicts 60 tokens and the base 61"):
        check_sizes(tiny_memory(vocab_size=60).config, base, CapturePoint(layer=0))
    with pytest.raises(ValueError, match="reads vectors of 33 numbers and ffn_input of the base has 32"):
        check_sizes(tiny_memory(input_size=33).config, base, CapturePoint(layer=0))


@torch.no_grad()
def test_a_bank_is_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    joint, ids_BS = tiny_joint("llama", num_memories=2), random_ids()
    joint.base_only_threshold = 0.125
    joint.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(loaded(ids_BS).logits, joint(ids_BS).logits)
    assert loaded.config.further_memories[0]["provenance"] == {"corpus": "further 1"}
    assert loaded.base_only_threshold == 0.125
    assert any(name.startswith("further_memories.0.blocks.") for name in loaded.state_dict())
