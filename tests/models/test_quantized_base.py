"""Bases of 4 and 8 bits: memories and gate stay as they are, and the mixture is that of the formula."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from mlpmem_ds.models import quantized_base
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.pretrained_memory import PretrainedMemory
from mlpmem_ds.models.quantized_base import (
    arguments_of_load,
    bits_config,
    for_the_base_alone,
    prepare_to_save,
)

from ..joint_models import joined
from .carried_generation import set_history_gate
from .conftest import LLAMA_SIZES, PAD, expected_log_probabilities, random_ids, spread, tiny_memory

POINT = CapturePoint(layer=1)
needs_bitsandbytes = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="bitsandbytes is not installed"
)


def wide_base(family: str) -> PreTrainedModel:
    """4-bit products on a CPU need rows of 64."""
    torch.manual_seed(5)
    sizes = {**LLAMA_SIZES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    if family == "opt":
        sizes |= {"ffn_dim": 128, "word_embed_proj_dim": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model = model.eval().requires_grad_(False)
    spread(model, 6)
    return model


def wide_joint(family: str) -> MemoryAugmentedLM:
    memory = tiny_memory(input_size=64)
    return joined(wide_base(family), memory, lmbda=0.4, input_point=POINT)


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@torch.no_grad()
def check(joint: MemoryAugmentedLM, floats: MemoryAugmentedLM, bits: int) -> None:
    """The base is rounded, nothing else is, and what comes out is the mixture."""
    ids_BS = random_ids()
    kinds = {type(module).__name__ for module in joint.base.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"} == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    for name, tensor in floats.memory.state_dict().items():
        assert torch.equal(joint.memory.state_dict()[name], tensor), name
    assert joint.get_output_embeddings().weight.dtype == torch.float32
    expected = expected_log_probabilities(joint, ids_BS, POINT)
    found = joint(ids_BS, use_cache=False).logits
    torch.testing.assert_close(found.double().log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    assert (found - floats(ids_BS).logits).abs().max() > 1e-3
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    mixed = joint.generate(ids_BS, **options)
    joint.lmbda = 0.0
    assert torch.equal(joint.generate(ids_BS, **options), joint.base.generate(ids_BS, **options))
    joint.lmbda = 0.4
    assert mixed.shape == (3, 11)


@needs_bitsandbytes
@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("opt", 8)])
def test_a_base_is_quantized_when_it_is_joined_or_when_an_export_is_loaded(
    family: str, bits: int, tmp_path: Path
) -> None:
    """OPT's layers have no MLP: its memory reads the input of a matrix, which is replaced."""
    floats = wide_joint(family)
    floats.base.save_pretrained(tmp_path / "base")
    floats.save_pretrained(tmp_path / "export")
    memory = PretrainedMemory(
        module=tiny_memory(input_size=64),
        **POINT.settings(),
        lmbda=0.4,
        vocabulary_sha256="",
        provenance={},
    )
    given = bits_config(bits)
    joined = MemoryAugmentedLM.from_pretrained(tmp_path / "base", memory, quantization_config=given)
    check(joined, floats, bits)
    loaded = MemoryAugmentedLM.from_pretrained(tmp_path / "export", quantization_config=given)
    check(loaded, floats, bits)
    assert given.llm_int8_skip_modules is None  # the caller's own stays as it was
    ids_BS = random_ids()
    for number, joint in enumerate((joined, loaded)):
        joint.save_pretrained(tmp_path / f"again {number}")
        again = MemoryAugmentedLM.from_pretrained(tmp_path / f"again {number}")
        assert torch.equal(again(ids_BS).logits, joint(ids_BS).logits)
    joined.base.save_pretrained(tmp_path / "small base")  # and it may be saved by itself
    again = MemoryAugmentedLM.from_pretrained(tmp_path / "small base", memory)
    assert torch.equal(again(ids_BS).logits, joined(ids_BS).logits)


@needs_bitsandbytes
@torch.no_grad()
def test_a_gate_stays_as_it_is(tmp_path: Path) -> None:
    floats = wide_joint("llama")
    set_history_gate(floats)
    floats.save_pretrained(tmp_path / "export")
    joint = MemoryAugmentedLM.from_pretrained(tmp_path / "export", quantization_config=bits_config(4))
    joint.save_pretrained(tmp_path / "again")
    again = MemoryAugmentedLM.from_pretrained(tmp_path / "again")
    for one in (joint, again):
        for name, tensor in floats.gate.state_dict().items():  # type: ignore[attr-defined]
            assert torch.equal(one.gate.state_dict()[name], tensor), name
    ids_BS = random_ids()
    assert torch.equal(again(ids_BS, use_cache=False).logits, joint(ids_BS, use_cache=False).logits)


def test_the_head_the_memories_and_the_gate_are_left_alone() -> None:
    config = wide_joint("llama").config
    given: Any = BitsAndBytesConfig(load_in_8bit=True)
    assert for_the_base_alone(given, config).llm_int8_skip_modules == [
        "lm_head", "base.lm_head", r"memory\.", r"further_memories\.", r"gate\.",
    ]  # fmt: skip
    given.llm_int8_skip_modules = ["own"]
    assert for_the_base_alone(given, config).llm_int8_skip_modules[:2] == ["own", "base.own"]
    short = {"load_in_4bit": True, "llm_int8_skip_modules": ["own"]}
    assert for_the_base_alone(short, config)["llm_int8_skip_modules"][:2] == ["own", "base.own"]
    assert short["llm_int8_skip_modules"] == ["own"]
    assert for_the_base_alone({"quant_method": "quanto"}, config)["modules_to_not_convert"][0] == "lm_head"


def test_an_exports_config_is_read_from_where_its_weights_are(tmp_path: Path) -> None:
    wide_joint("llama").config.save_pretrained(tmp_path / "inner")
    given = BitsAndBytesConfig(load_in_8bit=True)
    for name, more in (
        (tmp_path, {"subfolder": "inner"}),
        (tmp_path / "elsewhere", {"config": str(tmp_path / "inner"), "local_files_only": True}),
    ):
        arguments = {"quantization_config": given, "dtype": torch.float32, **more}
        found = arguments_of_load(name, arguments)
        assert "lm_head" in found.pop("quantization_config").llm_int8_skip_modules
        assert found == {"dtype": torch.float32, **more} and arguments["quantization_config"] is given


def test_what_cannot_be_told_so_is_refused_with_the_remedy(tmp_path: Path) -> None:
    joint = wide_joint("llama")
    joint.save_pretrained(tmp_path)
    given = HqqConfig.__new__(HqqConfig)  # its own __init__ needs the library
    given.quant_method = "hqq"
    with pytest.raises(ValueError, match=r"quantization hqq: quantize the base alone and join it"):
        MemoryAugmentedLM.from_pretrained(tmp_path, quantization_config=given)
    joint.base.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="quantized by gptq is not saved: save it with the float base"):
        joint.save_pretrained(tmp_path / "again")
    joint.base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    prepare_to_save(joint.base)
    assert r"memory\." in joint.base.config.quantization_config["llm_int8_skip_modules"]


def test_a_head_of_few_bits_and_a_missing_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = wide_base("llama")
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="output head is quantized"):
        joined(base, tiny_memory(input_size=64), lmbda=0.4, input_point=POINT)
    monkeypatch.setattr(quantized_base, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="4-bit weights need bitsandbytes: pip install bitsandbytes"):
        bits_config(4)


@needs_bitsandbytes
def test_a_base_alone_is_read_so(tmp_path: Path) -> None:
    wide_base("llama").save_pretrained(tmp_path)
    base = load_base(tmp_path, dtype=torch.float32, device="cpu", quantization_config=bits_config(8))
    assert any(type(module).__name__ == "Linear8bitLt" for module in base.modules())
