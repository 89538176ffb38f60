"""Loading an export: what is damaged is told from what a library does not do; bases of few bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import is_bitsandbytes_available

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.models import quantized_base
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.quantized_base import bits_config
from mlpmem_ds.stages.generation.exported_model import QuantizationError, load_model, open_source
from mlpmem_ds.stages.generation.options import JointOptions

from ..conftest import save_export
from .conftest import LAMBDA, run_front_end


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
def test_an_exports_base_of_8_bits(export_dir: Path, generate: Callable[..., str]) -> None:
    model = load_model(str(export_dir), device=torch.device("cpu"), quantization=bits_config(8))
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear8bitLt" in kinds and "MemoryHead" in kinds
    assert generate("--prompt", "in", "--max-new-tokens", 4, "--base-weights", "8bit").startswith("in")


def test_bits_that_their_library_does_not_give_are_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("it needs a later version\nand so on")

    monkeypatch.setattr(MemoryAugmentedLM, "from_pretrained", refuse)
    with pytest.raises(DamagedDataError, match="a cannot be loaded (?s:.*): run tools/convert_checkpoint"):
        load_model("a", device=torch.device("cpu"))
    with pytest.raises(QuantizationError) as raised:
        load_model("a", device=torch.device("cpu"), quantization={"load_in_4bit": True})
    said = str(raised.value)
    assert said.startswith("--model a cannot be loaded with this quantization (it needs a later version): ")
    assert "in floats" in said and "convert_checkpoint" not in said


def test_bits_without_their_library_are_refused(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantized_base, "find_spec", lambda _: None)
    words = ("--prompt", "in", "--max-new-tokens", 4, "--base-weights", "4bit")
    assert run_front_end("--model", export_dir, *words) == 2
    assert "--base-weights 4bit: 4-bit weights need bitsandbytes: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lmbda", "flag", "threshold"), [(None, None, 0.6), (None, 0.2, 0.2), (0.5, None, None), (0.5, 0.2, 0.2)]
)
def test_a_named_weight_is_meant_without_the_exports_threshold(
    lmbda: float | None,
    flag: float | None,
    threshold: float | None,
    base_dir: Path,
    corpus_dir: Path,
    tmp_path: Path,
) -> None:
    export = save_export(tmp_path / "export", base_dir, corpus_dir, lmbda=LAMBDA, threshold=0.6)
    source = open_source(JointOptions(model=str(export), base_only_threshold=flag), lmbda=lmbda)
    model = source.load(device=torch.device("cpu"), dtype="float32", device_map=None)
    assert model.base_only_threshold == threshold
    assert model.lmbda == pytest.approx(LAMBDA if lmbda is None else lmbda)


def test_text_of_a_named_weight_is_not_the_bases(
    generate: Callable[..., str], base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    words = ("--prompt", "alpha", "--max-new-tokens", 4, "--lambda")
    export = save_export(tmp_path / "export", base_dir, corpus_dir, lmbda=LAMBDA, threshold=1.0)
    assert generate(*words, 0.9) == generate(*words, 0.9, model=export) != generate(*words, 0)
