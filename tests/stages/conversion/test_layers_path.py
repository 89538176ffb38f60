"""A base whose layers are found only where `--layers-path` says: exported, loaded, and evaluated with a
control of its kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.corpus import vocabulary_sha256
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.conversion import convert_checkpoint
from mlpmem_ds.stages.conversion.inputs import Config
from mlpmem_ds.stages.evaluation import inputs as evaluation_inputs
from mlpmem_ds.stages.evaluation.config import Config as EvaluationConfig
from mlpmem_ds.stages.evaluation.inputs import find_layers_path

from ...manifests import make_provenance
from ..conftest import publish_memory

PATH = "transformer.h"
IDS = torch.tensor([[5, 70, 8, 211], [290, 3, 3, 19]])


class TwinConfig(GPT2Config):
    model_type = "twin_gpt2"


class TwinModel(GPT2LMHeadModel):
    """A GPT-2 with a second list of as many layers, which nothing reads."""

    config_class = TwinConfig

    def __init__(self, config: TwinConfig) -> None:
        super().__init__(config)
        self.transformer.others = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer))
        self.post_init()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    AutoConfig.register("twin_gpt2", TwinConfig, exist_ok=True)
    AutoModelForCausalLM.register(TwinConfig, TwinModel, exist_ok=True)
    torch.manual_seed(0)
    config = TwinConfig(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        vocab_size=300,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    root = tmp_path_factory.mktemp("twin") / "base"
    TwinModel(config).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def memory(base: Path, corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory") / "memory"
    shape = MemoryConfig(
        input_size=16,
        hidden_size=16,
        intermediate_size=20,
        num_blocks=1,
        vocab_size=300,
        initializer_range=0.3,
    )
    tokenizer = AutoTokenizer.from_pretrained(corpus_dir / "tokenizer")
    provenance = make_provenance(
        base=fingerprint_model(str(base)),
        vocabulary_sha256=vocabulary_sha256(tokenizer),
        input_layers_path=PATH,
    )
    return publish_memory(root, shape, provenance, seed=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_exported_and_loaded(
    dtype: str, base: Path, memory: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    config = Config(
        checkpoint=(memory,),
        model=str(base),
        tokenizer=str(corpus_dir / "tokenizer"),
        output=tmp_path / "export",
        lmbda=0.4,
        dtype=dtype,
    )
    convert_checkpoint.run(config, World())
    assert json.loads((tmp_path / "export" / "config.json").read_text())["layers_path"] == PATH
    assert (
        find_layers_path(
            EvaluationConfig(
                model="m", corpus=corpus_dir, output=tmp_path / "report", memory=(str(tmp_path / "export"),)
            )
        )
        == PATH
    )
    joint = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    states: list[torch.Tensor] = []
    joint.base.get_submodule(PATH)[1].mlp.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        found_BSV = joint(IDS).logits.double().log_softmax(-1)
        base_BSV = joint.base(IDS).logits.double().log_softmax(-1).softmax(-1)
        memory_BSV = joint.memory.head(joint.memory(states[0])).double().softmax(-1)
    torch.testing.assert_close(found_BSV, (0.6 * base_BSV + 0.4 * memory_BSV).log(), rtol=1e-5, atol=1e-5)


def test_it_is_evaluated_with_a_control_of_its_kind(
    base: Path, memory: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    config = EvaluationConfig(
        model=str(base), corpus=corpus_dir, output=tmp_path / "report", control=(f"trained_on={base}",)
    )
    with pytest.raises(UserError, match="several lists that could be its layers"):
        evaluation_inputs.open_inputs(config, World())  # nothing says where they are
    with_memories = (
        replace(config, memory=(str(memory),)),
        replace(config, control=(f"base+other={memory}", *config.control)),
    )
    for told in with_memories:
        inputs = evaluation_inputs.open_inputs(told, World())
        base, *joined, model = inputs.arms
        assert base.source.layers_path == model.source.layers_path == PATH
        assert [arm.point.layer for arm in joined] == [1]
