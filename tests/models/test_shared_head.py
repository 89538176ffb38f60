"""A memory that uses its base's output head is the memory with a copy of it, for every family, and stores
none."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mlpmem_ds.models.backbone import configured_transform
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM, load_memory
from mlpmem_ds.models.logit_transform import LogitTransform
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.pretrained_memory import PretrainedMemory
from mlpmem_ds.models.quantized import Int8Linear
from mlpmem_ds.models.shared_head import SharedHead, head_fingerprint
from mlpmem_ds.models.structure import output_head

from .families import BASES, tiny_base

FINAL = CapturePoint(layer=-1, point="final_norm")


def pair(base: PreTrainedModel, *, seed: int = 0) -> tuple[Memory, Memory]:
    """A memory with a copy of the base's head, and the same one that shares it."""
    weight_VD, bias_V = output_head(base)
    transform = configured_transform(base)
    own = MemoryConfig(
        input_size=weight_VD.shape[1],
        hidden_size=weight_VD.shape[1],
        intermediate_size=20,
        num_blocks=2,
        vocab_size=weight_VD.shape[0],
        head_bias=bias_V is not None,
        logit_scale=transform.scale,
        logit_softcap=transform.softcap,
    )
    torch.manual_seed(seed)
    copied = Memory(own).eval().requires_grad_(False)
    copied.head.weight.copy_(weight_VD)  # type: ignore[operator]
    if bias_V is not None:
        copied.head.bias.copy_(bias_V)  # type: ignore[operator]
    shared = Memory(replace(own, shared_head=head_fingerprint(weight_VD))).eval().requires_grad_(False)
    state = {name: tensor for name, tensor in copied.state_dict().items() if not name.startswith("head.")}
    shared.load_state_dict(state)
    return copied, shared


def join(base: PreTrainedModel, *memories: Memory, lmbda: float = 0.4) -> MemoryAugmentedLM:
    return MemoryAugmentedLM.join(base, [waiting(memory) for memory in memories], lmbda=lmbda)


def waiting(memory: Memory) -> PretrainedMemory:
    return PretrainedMemory(
        module=memory,
        input_layer=-1,
        input_point="final_norm",
        lmbda=None,
        vocabulary_sha256="",
        provenance={},
    )


def ids(num_tokens: int = 9) -> torch.Tensor:
    return torch.randint(3, 61, (2, num_tokens), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
@pytest.mark.parametrize("family", BASES)
def test_it_says_what_a_copy_says(family: str) -> None:
    base = tiny_base(family)
    copied, shared = pair(base)
    config = shared.config
    assert copied.config.num_parameters() - config.num_parameters() == config.num_shared_parameters() > 0
    assert sum(tensor.numel() for tensor in shared.state_dict().values()) == config.num_parameters()
    joint = join(copy.deepcopy(base), copied)
    sharing = join(base, shared)
    torch.testing.assert_close(sharing(ids()).logits, joint(ids()).logits, rtol=0, atol=0)
    assert sharing.memory.head.weight.data_ptr() == output_head(base)[0].data_ptr()  # type: ignore[union-attr,operator]
    rounded = sharing.to(torch.bfloat16)(ids()).logits  # base and memory together
    torch.testing.assert_close(rounded, joint.to(torch.bfloat16)(ids()).logits, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2"])
def test_a_bank_is_saved_without_heads_and_loads_with_the_bases(family: str, tmp_path: Path) -> None:
    base = tiny_base(family)
    (copied, shared), (other_copied, other) = pair(base), pair(base, seed=1)
    expected = join(copy.deepcopy(base), copied, other_copied)(ids()).logits
    bank = join(base, shared, other)
    bank.save_pretrained(tmp_path / "export")
    again: Any = MemoryAugmentedLM.from_pretrained(tmp_path / "export")
    assert not [name for name in again.state_dict() if ".head." in name and "memor" in name]
    torch.testing.assert_close(again(ids()).logits, expected, rtol=0, atol=0)
    places = {memory.head.weight.data_ptr() for memory in again.memories}
    assert places == {output_head(again.base)[0].data_ptr()}
    twin = copy.deepcopy(again)
    assert twin.memory.head.weight.data_ptr() == output_head(twin.base)[0].data_ptr() not in places


@torch.no_grad()
def test_an_export_of_one_gives_the_memory_to_another_copy_of_its_base(tmp_path: Path) -> None:
    base = tiny_base("llama")
    _, shared = pair(base)
    join(base, shared).save_pretrained(tmp_path / "export")
    memory = load_memory(tmp_path / "export")
    fresh = tiny_base("llama").to(torch.bfloat16)
    again = MemoryAugmentedLM.from_pretrained(fresh, memory, lmbda=1.0)
    assert again.memory.head.weight.data_ptr() == output_head(fresh)[0].data_ptr()  # type: ignore[union-attr,operator]
    assert again(ids()).logits.isfinite().all()
    other = tiny_base("llama")
    other.lm_head.weight.neg_()
    with pytest.raises(ValueError, match="this base has another"):
        MemoryAugmentedLM.from_pretrained(other, memory)


def test_it_needs_its_base_and_says_so() -> None:
    _, shared = pair(tiny_base("llama"))
    with pytest.raises(ValueError, match=r"join it with the base first, with MemoryAugmentedLM\.from_pre"):
        shared.head(torch.zeros(1, 32))
    own = Memory(replace(shared.config, shared_head=None))
    own.share_head(torch.nn.Linear(32, 61))  # has its own
    assert own.head(torch.zeros(1, 32)).abs().max() == 0
    with pytest.raises(ValueError, match="shared_head must be null or the identity"):
        replace(shared.config, shared_head="")


@torch.no_grad()
def test_a_forward_compiles_whole() -> None:
    base = tiny_base("llama")
    joint = join(base, pair(base)[1])
    compiled = torch.compile(joint, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids(), use_cache=False).logits, joint(ids()).logits)
    torch.compiler.reset()


@torch.no_grad()
def test_int8_leaves_it_to_the_base(tmp_path: Path) -> None:
    base = tiny_base("llama")
    _, shared = pair(base)
    joint = join(base, shared, lmbda=1.0)
    before = joint(ids()).logits
    joint.quantize_memory()
    assert isinstance(joint.memory.blocks[0].mlp.up, Int8Linear)  # type: ignore[union-attr]
    assert isinstance(joint.memory.head, SharedHead)
    assert 0 < (joint(ids()).logits.exp() - before.exp()).abs().max() < 0.05
    with pytest.raises(ValueError, match="int8 memory is not saved"):
        joint.save_pretrained(tmp_path)


def test_signs_tell_heads_apart_in_every_dtype() -> None:
    weight = torch.randn(300, 8) * torch.logspace(-12, 2, 8)
    found = {head_fingerprint(weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert found == {head_fingerprint(weight[:256])}
    weight[255, 7] *= -1
    assert head_fingerprint(weight) not in found
    assert head_fingerprint(torch.zeros(4, 6)) != head_fingerprint(torch.zeros(6, 4))


@torch.no_grad()
def test_a_weight_that_lies_elsewhere_is_reached_through_the_bases_layer() -> None:
    """A base that is spread over devices brings its head's weights when that is called."""
    head, layer = SharedHead(LogitTransform(scale=2.0, softcap=None)), torch.nn.Linear(4, 7)
    hidden = torch.randn(3, 4)
    expected = 2 * layer(hidden)
    weight = layer.weight.data
    layer.register_forward_pre_hook(lambda *_: layer.register_parameter("weight", torch.nn.Parameter(weight)))
    layer.weight = torch.nn.Parameter(weight.to("meta"))
    head.use(layer)
    torch.testing.assert_close(head(hidden), expected)
    assert head(hidden.double()).dtype == torch.float64  # and in another dtype it is converted
