"""FlashAttention where it can run, with a reason where it cannot; with the library itself on a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines import attention
from mlpmem_ds.engines.attention import attention_or_auto, reason_against
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.models.capture_point import CapturePoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda:3")
FLASH = "flash_attention_2"
SIZES = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that are pretended to be installed."""
    names: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)
    return names


def test_what_it_needs_is_said(installed: list[str]) -> None:
    assert "runs on CUDA, not on cpu" in (reason_against(FLASH, device=CPU, dtype="bfloat16") or "")
    assert "choose one of those dtypes" in (reason_against(FLASH, device=CUDA, dtype="float32") or "")
    missing = reason_against(FLASH, device=CUDA, dtype="bfloat16") or ""
    assert "pip install --no-build-isolation flash-attn" in missing and "choose auto or sdpa" in missing
    assert attention_or_auto(FLASH, device=CUDA, dtype="float16") == ("auto", missing)
    installed.append("flash_attn")
    assert attention_or_auto(FLASH, device=CUDA, dtype="float16") == (FLASH, None)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_others_are_left_to_the_loader(name: str) -> None:
    assert attention_or_auto(name, device=CPU, dtype="float32") == (name, None)


def test_a_base_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(TransformersSource, "_load", load)
    with pytest.raises(UserError, match="--attention flash_attention_2: it runs on CUDA"):
        TransformersSource(str(tmp_path), attention=FLASH)


def test_a_base_without_sdpa_runs_with_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **SIZES, head_dim=64))
    model.save_pretrained(tmp_path / "base")
    with caplog.at_level("INFO"):
        assert TransformersSource(str(tmp_path / "base")).attention == "eager"
    assert "no attention of the kind sdpa: it runs with eager" in caplog.text
    with pytest.raises(UserError, match="--model .*'auto' works for every model"):
        TransformersSource(str(tmp_path / "base"), attention="sdpa")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="needs a CUDA device and flash-attn",
)
def test_the_library_itself_gives_the_states_of_sdpa(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(
        tmp_path / "base"
    )
    tokens = torch.randint(300, (3, 512), generator=torch.Generator().manual_seed(0))
    point = {"key": CapturePoint(layer=1)}
    flash, sdpa = (
        TransformersSource(str(tmp_path / "base"), device="cuda:0", dtype="bfloat16", attention=name).read(
            tokens, point
        )
        for name in (FLASH, "sdpa")
    )
    difference = (flash.states["key"].float() - sdpa.states["key"].float()).norm()
    assert difference <= 2e-2 * sdpa.states["key"].float().norm()
    assert attention.reason_against(FLASH, device=torch.device("cuda:0"), dtype="bfloat16") is None
