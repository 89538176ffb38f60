"""The docstrings of the joint model: they name every argument, and their examples run as they stand."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.forward_docs import FORWARD, documented
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.hf_config import MemoryAugmentedConfig
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

from ..joint_models import joined
from ..toy_tokenizers import words


@pytest.mark.parametrize(
    "what",
    [MemoryAugmentedLM, MemoryAugmentedLM.forward, MemoryAugmentedConfig],
    ids=lambda one: one.__name__,
)
def test_every_argument_is_named(what: Any) -> None:
    function = what.__init__ if inspect.isclass(what) else what
    section = inspect.getdoc(what).split("Args:\n")[1].split("\n\n")[0]
    named = {
        name.split("(")[0].strip()
        for line in section.splitlines()
        if line.startswith("    ") and not line.startswith("     ")
        for name in line.split(":")[0].split(",")
    }
    wanted = set(inspect.signature(function).parameters) - {"self"}
    assert wanted <= named, wanted - named


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = words()
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=2, vocab_size=len(tokenizer))
    )
    memory = Memory(
        MemoryConfig(
            input_size=16, hidden_size=8, intermediate_size=16, num_blocks=2, vocab_size=len(tokenizer)
        )
    )
    joint = joined(base, memory, lmbda=0.3, input_point=CapturePoint(layer=1))
    joint.save_pretrained(tmp_path / "run" / "export")
    tokenizer.save_pretrained(tmp_path / "run" / "export")
    monkeypatch.chdir(tmp_path)
    for what, least in ((MemoryAugmentedLM.forward, 9), (MemoryAugmentedConfig, 6)):
        test = doctest.DocTestParser().get_doctest(inspect.getdoc(what) or "", {}, "docs", None, None)
        said: list[str] = []
        result = doctest.DocTestRunner().run(test, out=said.append)
        assert result.failed == 0 and result.attempted >= least, "".join(said)


def test_a_decorator_gives_the_text() -> None:
    @documented("says what")
    def given() -> int:
        return 1

    assert given.__doc__ == "says what" and given() == 1 and MemoryAugmentedLM.forward.__doc__ == FORWARD
