"""The server of transformers: it finds our class; a client gets what the model generates."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.serving.transformers_serve import main

from .servers import running
from .toy_exports import make_export


def test_the_command_is_that_of_transformers_and_our_class_is_among_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[list[str]] = []
    program = ModuleType("transformers.cli.transformers")
    program.app = given.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, program.__name__, program)
    monkeypatch.setattr(transformers, "MemoryAugmentedLM", None, raising=False)
    monkeypatch.setattr(sys, "argv", ["transformers_serve.py", "run/export", "--port", "1"])
    main()
    assert given == [["serve", "run/export", "--port", "1"]]
    assert transformers.MemoryAugmentedLM is MemoryAugmentedLM


def test_a_client_gets_what_the_model_generates(tmp_path: Path) -> None:
    for library in ("fastapi", "uvicorn", "openai", "typer"):
        pytest.importorskip(library, reason='pip install "transformers[serving]": or tests/serving/run.sh')
    import openai

    from mlpmem_ds.models.capture_point import CapturePoint

    export = make_export(tmp_path, "gpt2", CapturePoint(layer=2))
    tokenizer = AutoTokenizer.from_pretrained(export.directory)
    words = tokenizer("the lazy dog", return_tensors="pt")
    with torch.no_grad():
        found = export.joint.generate(**words, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(found[0, words["input_ids"].shape[1] :], skip_special_tokens=True)
    options = ["--device", "cpu", "--dtype", "float32"]
    server = ["-m", "mlpmem_ds.serving.transformers_serve", str(export.directory), *options]
    with running(server, tmp_path / "log") as address:
        client = openai.OpenAI(base_url=address, api_key="none", timeout=600, max_retries=0)
        answer = client.completions.create(
            model=str(export.directory), prompt="the lazy dog", max_tokens=8, temperature=0
        )
    assert answer.choices[0].text == expected
