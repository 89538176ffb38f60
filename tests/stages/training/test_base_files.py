"""Single tensors of the base out of its files."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.training import base_files
from mlpmem_ds.stages.training.base_files import open_base_files

FAMILIES = {
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": 50},  # tied
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 50,
        "tie_word_embeddings": False,
    },
}


def save(family, path, **options):
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).to(
        torch.bfloat16
    ).save_pretrained(path, **options)
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "2KB"}], ids=["one-file", "shards"])
def test_the_head_is_that_of_the_loaded_model(family, options, tmp_path, monkeypatch):
    path = save(family, tmp_path / "base", **options)
    assert (len(list((tmp_path / "base").glob("*.safetensors"))) > 1) == bool(options)
    expected = output_head(load_base(path, dtype=torch.float32, device="cpu"))[0]

    def refuse(*_, **__):
        raise AssertionError("the whole base is loaded")

    monkeypatch.setattr(base_files, "load_base", refuse)
    base = open_base_files(path)
    weight_VH = base.reader(output_head(base.model)[0])()
    assert weight_VH.dtype == torch.float32 and torch.equal(weight_VH, expected)


def test_files_that_name_it_otherwise_are_loaded_whole(tmp_path, monkeypatch):
    path = save("llama", tmp_path / "base")
    monkeypatch.setattr(base_files, "_find", lambda *_: None)
    base = open_base_files(path)
    expected = output_head(load_base(path, dtype=torch.float32, device="cpu"))[0]
    assert torch.equal(base.reader(output_head(base.model)[0])(), expected)


def test_a_class_that_needs_numbers_is_loaded_whole(tmp_path, monkeypatch):
    path = save("llama", tmp_path / "base")

    def fail(*_, **__):
        raise RuntimeError("this class reads its numbers in __init__")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
    base = open_base_files(path)
    weight_VH = output_head(base.model)[0]
    assert not weight_VH.is_meta and torch.equal(base.reader(weight_VH)(), weight_VH)


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        open_base_files(str(tmp_path / "nowhere"))
