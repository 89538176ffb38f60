"""The base's output head out of its files."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.models.backbone import load_base
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.training import base_head
from mlpmem_ds.stages.training.base_head import head_of_files

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

    monkeypatch.setattr(base_head, "load_base", refuse)
    shape, read = head_of_files(path)
    assert shape == (50, 16)
    weight_VH = read()
    assert weight_VH.dtype == torch.float32 and torch.equal(weight_VH, expected)


def test_files_that_name_it_otherwise_are_loaded_whole(tmp_path, monkeypatch):
    path = save("llama", tmp_path / "base")
    monkeypatch.setattr(base_head, "_find", lambda *_: None)
    shape, read = head_of_files(path)
    assert tuple(read().shape) == shape == (50, 16)


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        head_of_files(str(tmp_path / "nowhere"))
