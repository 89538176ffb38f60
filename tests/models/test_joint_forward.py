"""A forward of the joint model's parts: when the memory runs, and for which positions logits come out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.joint_forward import JointForward

from .carried_generation import set_history_gate
from .conftest import POINT, expected_log_probabilities, random_ids, tiny_joint


def parts_of(joint: MemoryAugmentedLM) -> JointForward:
    return joint._forward_of_parts()


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 2, torch.tensor([1, 4])], ids=["all", "last", "some"])
def test_the_kept_positions_of_bases_that_keep_and_that_do_not(kept: int | torch.Tensor) -> None:
    joint, ids_BS = tiny_joint("llama"), random_ids()
    expected = expected_log_probabilities(joint, ids_BS, POINT)
    expected = expected[:, kept] if isinstance(kept, torch.Tensor) else expected[:, -kept:]
    keeping = parts_of(joint)
    assert "logits_to_keep" in keeping.parameters
    for parts in (keeping, replace(keeping, parameters=keeping.parameters - {"logits_to_keep"})):
        output, logits_BKV = parts.run({"input_ids": ids_BS}, kept, None)
        torch.testing.assert_close(logits_BKV.double().log_softmax(-1), expected, rtol=1e-5, atol=1e-5)
        assert output.past_key_values is not None


@torch.no_grad()
def test_without_a_weight_the_memory_does_not_run() -> None:
    joint, ids_BS, runs = tiny_joint("gpt2", lmbda=0.0), random_ids(), []
    joint.memory.register_forward_pre_hook(lambda *_: runs.append(1))
    _, logits_BKV = parts_of(joint).run({"input_ids": ids_BS}, 1, None)
    assert torch.equal(logits_BKV, joint.base(ids_BS, logits_to_keep=1).logits) and not runs
    joint.lmbda = 0.1
    parts_of(joint).run({"input_ids": ids_BS}, 1, None)
    assert runs


def test_a_history_needs_the_tokens() -> None:
    joint = tiny_joint("llama")
    set_history_gate(joint)
    embeds = joint.get_input_embeddings()(random_ids())
    with pytest.raises(ValueError, match="give input_ids"):
        parts_of(joint).run({"inputs_embeds": embeds}, 0, None)
