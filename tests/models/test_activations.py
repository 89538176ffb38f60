"""Activations in training: recomputed ones give the same gradients bit for bit, compiled ones to rounding."""

import shutil

import pytest
import torch

from mlpmem_ds.models.activations import TRAINING_MLPS, compile_activations, recompute_activations
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import FAMILIES, MemoryConfig


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_of_training_mlps_is_a_plain_one(family):
    config = MemoryConfig(
        input_size=7, hidden_size=8, intermediate_size=24, num_blocks=3, vocab_size=5, family=family
    )
    memories = []
    for mlps in ({}, {"mlps": TRAINING_MLPS}):
        torch.manual_seed(0)
        memories.append(Memory(config, **mlps))
    plain, trained = (memory.state_dict() for memory in memories)
    assert list(plain) == list(trained) and all(torch.equal(plain[name], trained[name]) for name in plain)
    inputs_NI = torch.randn(6, 7)
    recompute_activations(memories[1])
    assert torch.equal(*(memory(inputs_NI) for memory in memories))


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_gradients_and_are_not_kept(family, monkeypatch):
    config = MemoryConfig(
        input_size=8, hidden_size=8, intermediate_size=24, num_blocks=3, vocab_size=5, family=family
    )
    torch.manual_seed(0)
    memory, inputs_NI = Memory(config, mlps=TRAINING_MLPS), torch.randn(6, 8)
    kept, hooks = [], torch.autograd.graph.saved_tensors_hooks

    def watched(pack, unpack):
        return hooks(lambda tensor: kept.append(pack(tensor)) or kept[-1], unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watched)
    gradients = []
    for is_on in (False, True):
        recompute_activations(memory, is_on)
        memory.zero_grad()
        memory.head(memory(inputs_NI)).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in memory.parameters()])
        assert sum(isinstance(entry, torch.Size) for entry in kept) == (3 if is_on else 0)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_compiled_activations_give_the_same_gradients(is_recomputed):
    config = MemoryConfig(
        input_size=8, hidden_size=8, intermediate_size=24, num_blocks=3, vocab_size=5, family="swiglu"
    )
    torch.manual_seed(0)
    memory, inputs_NI = Memory(config, mlps=TRAINING_MLPS), torch.randn(6, 8)
    recompute_activations(memory, is_recomputed)
    gradients = []
    for is_compiled in (False, True):
        if is_compiled:
            compile_activations(memory)
            assert len({block.mlp.activation for block in memory.blocks}) == 1
            assert all(block.mlp.activation is not type(block.mlp).activation for block in memory.blocks)
        memory.zero_grad()
        memory.head(memory(inputs_NI)).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in memory.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
