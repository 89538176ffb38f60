"""A memory on its own: read from a training or an export, joined with a base by one call, saved, and used by
a pipeline."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.gates import ConfidencesGate
from mlpmem_ds.models.hf import MemoryAugmentedLM, load_memory
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.mixture import Constant, Weights
from mlpmem_ds.models.pretrained_memory import build_memory

from ..joint_models import joined

VOCAB, WIDTH = 40, 16
IDS = torch.tensor([[5, 7, 8, 21], [29, 3, 3, 19]])
POINT = CapturePoint(layer=0)
SHAPE = MemoryConfig(input_size=WIDTH, hidden_size=24, intermediate_size=20, num_blocks=2, vocab_size=VOCAB,
                     initializer_range=0.4)  # fmt: skip


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "base"
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(
        GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def memory() -> Memory:
    torch.manual_seed(1)
    return Memory(SHAPE).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def memory_dir(tmp_path_factory: pytest.TempPathFactory, memory: Memory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    (root / "weights").mkdir()
    save_file(memory.state_dict(), root / "weights" / "model.safetensors")
    provenance = {"input_layer": 0, "input_point": "ffn_input", "vocabulary_sha256": "ab"}
    description = {"memory": SHAPE.to_dict(), "provenance": provenance}
    (root / "weights" / "config.json").write_text(json.dumps(description))
    return root


@torch.no_grad()
def test_every_way_to_join_gives_the_same_model(
    base_dir: Path, memory_dir: Path, memory: Memory, tmp_path: Path
) -> None:
    base = GPT2LMHeadModel.from_pretrained(base_dir).eval()
    wanted = joined(base, memory, lmbda=0.3, input_point=POINT)
    logits = wanted(IDS).logits
    found = load_memory(memory_dir)
    assert (found.lmbda, found.input_layer, found.vocabulary_sha256) == (None, 0, "ab")
    joint = MemoryAugmentedLM.from_pretrained(base_dir, memory_dir, lmbda=0.3)
    joint.save_pretrained(tmp_path / "export")
    ways = [
        MemoryAugmentedLM.join(base, [found], lmbda=0.3),
        joint,
        MemoryAugmentedLM.from_pretrained(base, found, lmbda=0.3),
        MemoryAugmentedLM.from_pretrained(tmp_path / "export"),
        MemoryAugmentedLM.from_pretrained(
            str(base_dir), tmp_path / "export"
        ),  # the memory of an export, and its λ
    ]
    for number, model in enumerate(ways):
        assert model.lmbda == 0.3 and torch.equal(model(IDS).logits, logits), number
    assert MemoryAugmentedLM.from_pretrained(tmp_path / "export", lmbda=0.7).lmbda == 0.7
    assert MemoryAugmentedLM.from_pretrained(base_dir, memory_dir).lmbda == 0.25
    half = MemoryAugmentedLM.from_pretrained(base_dir, memory_dir, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert (
        memory.head.weight.dtype == found.module.head.weight.dtype == torch.float32
    )  # the given one is left alone


@torch.no_grad()
def test_the_memory_of_an_export_brings_its_gate_and_threshold(
    base_dir: Path, memory: Memory, tmp_path: Path
) -> None:
    gated = joined(GPT2LMHeadModel.from_pretrained(base_dir), memory, lmbda=0.4, input_point=POINT)
    torch.manual_seed(2)
    gate = ConfidencesGate(lmbdas=(0.4,))
    gate.standardize(torch.full_like(gate.mean, -1.0), torch.full_like(gate.mean, 2.0))
    nn.init.normal_(gate.out.weight)
    gated.set_gate(gate)
    weights_BS = gate_weights(gated)
    gated.base_only_threshold = float(weights_BS.median())
    assert bool((weights_BS < gated.base_only_threshold).any()) and float(weights_BS.std()) > 0.01
    gated.save_pretrained(tmp_path / "export")
    expected = gated(IDS).logits

    joint = MemoryAugmentedLM.from_pretrained(base_dir, tmp_path / "export")
    assert torch.equal(joint(IDS).logits, expected) and joint.lmbda == 0.4
    joint.save_pretrained(tmp_path / "again")
    found = load_memory(tmp_path / "again")
    base = GPT2LMHeadModel.from_pretrained(base_dir).eval()
    for _ in range(2):
        joint = MemoryAugmentedLM.join(base, [found])
        assert torch.equal(joint(IDS).logits, expected)
        nn.init.zeros_(joint.gate.out.weight)
    joint = MemoryAugmentedLM.join(base, [found], gate=Weights((0.1,)))
    assert joint.gate == Weights((0.1,)) and joint.base_only_threshold is None

    plain = joined(base, memory, lmbda=0.3, input_point=POINT)
    for joint in (
        MemoryAugmentedLM.from_pretrained(base_dir, tmp_path / "export", lmbda=0.3),
        MemoryAugmentedLM.from_pretrained(tmp_path / "export", lmbda=0.3),
    ):
        assert joint.gate == Constant(0.3) and joint.base_only_threshold is None
        assert torch.equal(joint(IDS).logits, plain(IDS).logits)
    bank = MemoryAugmentedLM.join(base, [found, found])
    assert bank.gate == Constant(0.4) and bank.base_only_threshold is None


def gate_weights(joint: MemoryAugmentedLM) -> torch.Tensor:
    """What the gate gives at each position [B, S]."""
    given: list[torch.Tensor] = []
    hook = joint.gate.register_forward_hook(lambda *each: given.append(each[-1]))
    joint(IDS)
    hook.remove()
    return given[0]


def test_a_base_whose_layers_had_to_be_named(base_dir: Path, memory_dir: Path) -> None:
    """Extraction's --layers-path comes along in the memory's provenance."""
    twice = GPT2LMHeadModel.from_pretrained(base_dir).eval()
    twice.transformer.other = copy.deepcopy(twice.transformer.h)
    found = load_memory(memory_dir)
    with pytest.raises(ValueError, match="several lists that could be its layers"):
        MemoryAugmentedLM.join(twice, [found])
    named = replace(found, provenance={**found.provenance, "input_layers_path": "transformer.h"})
    joint = MemoryAugmentedLM.join(twice, [named], lmbda=0.3)
    assert joint.config.layers_path == "transformer.h"
    plain = MemoryAugmentedLM.join(GPT2LMHeadModel.from_pretrained(base_dir), [found], lmbda=0.3)
    with torch.no_grad():
        assert torch.equal(joint(IDS).logits, plain(IDS).logits)


def test_what_does_not_fit_is_refused(base_dir: Path, memory_dir: Path, tmp_path: Path) -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB + 1, n_embd=WIDTH, n_layer=2, n_head=2))
    found = load_memory(memory_dir)
    with pytest.raises(ValueError, match="one vocabulary"):
        MemoryAugmentedLM.join(other, [found])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        MemoryAugmentedLM.join(GPT2LMHeadModel.from_pretrained(base_dir), [found], lmbda=1.5)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text((memory_dir / "weights" / "config.json").read_text())
    with pytest.raises(ValueError, match="holds no whole memory"):
        load_memory(tmp_path)


def test_pipeline_generates_with_the_memory(base_dir: Path, memory_dir: Path) -> None:
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w0"
    )
    joint = MemoryAugmentedLM.from_pretrained(base_dir, memory_dir, lmbda=0.9)
    generate = pipeline("text-generation", model=joint, tokenizer=tokenizer)
    way = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    with_memory = generate("w5", **way)[0]["generated_text"]
    new = joint.generate(torch.tensor([[5]]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 1:]
    assert with_memory == tokenizer.decode(new, skip_special_tokens=True)
    joint.lmbda = 0.0
    assert generate("w5", **way)[0]["generated_text"] != with_memory


def test_a_memory_is_built_around_tensors_of_its_own_shape(memory: Memory) -> None:
    weights = memory.state_dict()
    built = build_memory(SHAPE.to_dict(), weights)
    assert all(one.data_ptr() == weights[name].data_ptr() for name, one in built.state_dict().items())
    del weights["final_norm.weight"]
    with pytest.raises(ValueError, match="final_norm.weight"):
        build_memory(SHAPE.to_dict(), weights)
