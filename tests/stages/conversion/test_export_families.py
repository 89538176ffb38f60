"""Every family of bases and memories, in every dtype: exported, loaded as transformers does it, equal to its
parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mlpmem_ds.core.world import World
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.corpus import vocabulary_sha256
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.conversion import convert_checkpoint
from mlpmem_ds.stages.conversion.inputs import Config

from ...manifests import make_provenance
from ..conftest import publish_memory

VOCAB, WIDTH = 300, 16
IDS = torch.tensor([[5, 70, 8, 211], [290, 3, 3, 19]])
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BASES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": VOCAB,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0},
    "phi3": {"tie_word_embeddings": False},
    "mixtral": {"tie_word_embeddings": False, "num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt_neox": {"tie_word_embeddings": False},
}
ATTENTION = {"gemma2": "eager"}  # its soft cap of attention needs it


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("bases"), {}
    for number, (family, values) in enumerate(BASES.items()):
        torch.manual_seed(number)
        sizes = values if family == "gpt2" else {**SIZES, **values}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
        stored = torch.bfloat16 if family == "mistral" else torch.float32  # as the Hub's are
        model.to(stored).save_pretrained(root / family)
        found[family] = root / family
    return found


def save_memory(root: Path, base: Path, tokenizer: Path, family: str) -> Path:
    shape = MemoryConfig(
        input_size=WIDTH,
        hidden_size=24,
        intermediate_size=20,
        num_blocks=2,
        vocab_size=VOCAB,
        family=family,
        initializer_range=0.3,
    )
    provenance = make_provenance(
        base=fingerprint_model(str(base)),
        vocabulary_sha256=vocabulary_sha256(AutoTokenizer.from_pretrained(tokenizer)),
    )
    return publish_memory(root, shape, provenance, seed=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", BASES)
def test_round_trip(
    family: str, dtype: str, bases: dict[str, Path], corpus_dir: Path, tmp_path: Path
) -> None:
    tokenizer = corpus_dir / "tokenizer"
    kind = "gelu" if family in ("gpt2", "gpt_neox") else "swiglu"
    root = save_memory(tmp_path / "memory", bases[family], tokenizer, kind)
    config = Config(
        checkpoint=(root,),
        model=str(bases[family]),
        tokenizer=str(tokenizer),
        output=tmp_path / "export",
        lmbda=0.4,
        dtype=dtype,
        max_shard_gigabytes=2e-5,
        attention=ATTENTION.get(family, "sdpa"),
    )
    convert_checkpoint.run(config, World())
    wanted = getattr(torch, dtype)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True, dtype="auto"
    )
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    base = AutoModelForCausalLM.from_pretrained(bases[family], dtype=wanted).eval()
    trained = read_weights(root)
    memory = Memory(MemoryConfig.from_dict(trained.memory))
    memory.load_state_dict(trained.weights)
    memory.to(wanted)
    with torch.no_grad():
        captured = capture(base, [CapturePoint(layer=1)])(IDS).states[CapturePoint(layer=1)]
        base_BSV = base(IDS).logits.double().softmax(-1)
        memory_BSV = memory.head(memory(captured)).double().softmax(-1)
        found_BSV = loaded(IDS).logits.double().log_softmax(-1)
    torch.testing.assert_close(found_BSV, (0.6 * base_BSV + 0.4 * memory_BSV).log(), rtol=1e-5, atol=1e-5)
