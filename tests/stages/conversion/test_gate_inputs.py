"""An export with a gate and a bank: every part is there, in the gate's order, and others are refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.gates import GateManifest, GateMemory, read_gate, write_gate_weights
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.models.gates import ConfidencesGate, HistoryGate, LearnedGate, RouterGate
from mlpmem_ds.models.hf import MemoryAugmentedLM, load_memory
from mlpmem_ds.models.mixture import Constant
from mlpmem_ds.stages.conversion.gate_inputs import stored_gate
from mlpmem_ds.stages.generation import generate

from .conftest import IDS, MemoryFlags, convert, save_memory, save_report_of


def save_gate(
    root: Path, base_dir: Path, trained: list[Path], *, kind: str = "history", **changes: Any
) -> Path:
    """A gate directory as fit_gate leaves it, its weights random."""
    torch.manual_seed(5)
    lmbdas = (0.4 / len(trained),) * len(trained)
    gate: LearnedGate
    if kind == "router":
        gate = RouterGate(lmbdas=lmbdas, base_size=16, memory_sizes=[24] * len(trained))
    else:
        gate = (HistoryGate if kind == "history" else ConfidencesGate)(lmbdas=lmbdas)
    gate.standardize(torch.full_like(gate.mean, -0.5), torch.full_like(gate.mean, 2.0))
    torch.nn.init.normal_(gate.out.weight, std=0.3)
    fields: dict[str, Any] = {
        "base": fingerprint_model(str(base_dir)),
        "vocabulary_sha256": read_weights(trained[0]).provenance.vocabulary_sha256,
        "memories": tuple(GateMemory(name=each.name, sha256=read_weights(each).sha256) for each in trained),
        "gate": gate.settings(),
        "fixed": lmbdas,
        "epochs": 3,
        "best_epoch": 2,
        "texts": (),
    }
    manifest = GateManifest(**{**fields, **changes})
    directory = open_stage(root, stage="gate", version=1, config=Flags(), inputs={}, world=World())
    directory.run_units(["weights"], lambda _, writer: write_gate_weights(writer, gate.state_dict()))
    directory.complete(["weights"], lambda: manifest)
    return root


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, flags: MemoryFlags, memory_dir: Path) -> list[Path]:
    """The memory of the other tests, and one that reads another state."""
    root = tmp_path_factory.mktemp("bank")
    second = save_memory(root / "second", flags, seed=3, input_layer=-1, input_point="layer_output")
    return [memory_dir, second]


STRANGER = """
import json, sys
sys.modules["mlpmem_ds"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor(json.loads(sys.argv[2]))
way = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "num_beams": 2}
print(json.dumps({"new": model.generate(ids, **way).tolist(), "gate": str(model.gate),
    "memories": len(model.memories)}))
"""


def test_a_gate_and_a_bank_are_exported_whole(base_dir: Path, bank: list[Path], tmp_path: Path) -> None:
    gate = save_gate(tmp_path / "gate", base_dir, [bank[1], bank[0]])
    words = ("--checkpoint", *bank, "--model", base_dir, "--gate", gate, "--base-only-threshold", 0.01)
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        assert convert(*words, "--dtype", dtype, "--output", output) == 0
        loaded: Any = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
        assert str(loaded.gate) == "gate: history" and loaded.base_only_threshold == 0.01
        assert {name: values.dtype for name, values in loaded.gate.state_dict().items()} == dict.fromkeys(
            loaded.gate.state_dict(), torch.float32
        )
        for name, values in load_file(gate / "gate.safetensors").items():
            assert torch.equal(loaded.gate.state_dict()[name], values)
    memories = [load_memory(root) for root in (bank[1], bank[0])]  # in the gate's order
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    joined = MemoryAugmentedLM.join(base, memories, gate=stored_gate(read_gate(gate)))
    joined.base_only_threshold = 0.01
    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    with torch.no_grad():
        torch.testing.assert_close(exported(IDS).logits, joined(IDS).logits, rtol=0, atol=1e-6)
    card = (tmp_path / "float32" / "README.md").read_text()
    assert (
        "with 2 MLP memories" in card and "Memory 2:" in card and "kind history, over second, memory" in card
    )
    assert "Threshold: a memory is left out where its weight is below 0.01\n" in card
    record = json.loads((tmp_path / "float32" / "mlpmem_export.json").read_text())
    memories_and_base = {"memory", "memory_2", "base", "generation_config"}
    assert set(record["inputs"]) == {*memories_and_base, "vocabulary", "tokenizer", "gate"}
    assert record["config"]["base_only_threshold"] == 0.01

    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "float32"), json.dumps(IDS.tolist())],
        cwd=tmp_path,
        env={**environment, "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    way = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    assert seen == {"new": joined.generate(IDS, **way).tolist(), "gate": "gate: history", "memories": 2}


@pytest.mark.parametrize("kind", ["confidences", "router"])
def test_other_kinds_are_exported_too(kind: str, base_dir: Path, memory_dir: Path, tmp_path: Path) -> None:
    gate = save_gate(tmp_path / "gate", base_dir, [memory_dir], kind=kind)
    words = ("--checkpoint", memory_dir, "--model", base_dir, "--output", tmp_path / "export")
    assert convert(*words, "--gate", gate) == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert loaded.config.gate["kind"] == kind and loaded.lmbda == pytest.approx(0.4)
    gated = loaded(IDS).logits
    loaded.lmbda = 0.4
    assert not torch.allclose(gated, loaded(IDS).logits)
    assert convert(*words[:-1], tmp_path / "other", "--gate", gate, "--lambda", 0.3) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "other").lmbda == 0.3


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, MemoryAugmentedLM])
def test_a_lambda_that_is_named_as_an_export_is_loaded_replaces_its_gate(
    loader: Any, base_dir: Path, memory_dir: Path, tmp_path: Path
) -> None:
    """transformers' Auto classes give it to the config, which then has it."""
    gate, export = save_gate(tmp_path / "gate", base_dir, [memory_dir]), tmp_path / "export"
    words = ("--checkpoint", memory_dir, "--model", base_dir, "--gate", gate, "--output", export)
    assert convert(*words, "--base-only-threshold", 0.35) == 0
    gated = loader.from_pretrained(export)
    assert (str(gated.gate), gated.base_only_threshold) == ("gate: history", 0.35)
    fixed, report = loader.from_pretrained(export, lmbda=0.3, output_loading_info=True)
    assert fixed.gate == Constant(0.3) and fixed.lmbda == 0.3 and fixed.base_only_threshold is None
    assert fixed.config.gate == {"kind": "constant"} and not report["unexpected_keys"]
    gated.set_gate(Constant(0.3))
    gated.base_only_threshold = None
    assert torch.equal(fixed(IDS).logits, gated(IDS).logits)
    assert loader.from_pretrained(export, lmbda=0.3, base_only_threshold=0.2).base_only_threshold == 0.2
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        loader.from_pretrained(export, lmbda=1.3)


def test_a_bank_without_a_gate_shares_lambda(base_dir: Path, bank: list[Path], tmp_path: Path) -> None:
    words = ("--checkpoint", *bank, "--model", base_dir, "--output", tmp_path / "export")
    assert convert(*words, "--lambda", 0.6) == 0
    assert "λ: 0.6 (given as a flag), shared equally" in (tmp_path / "export" / "README.md").read_text()


def test_what_the_gate_was_not_fitted_for_is_refused(
    base_dir: Path, bank: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = save_gate(tmp_path / "gate", base_dir, [bank[0]])
    other_base = save_gate(tmp_path / "other", base_dir, [bank[0]], base="ab" * 32)
    report = save_report_of(bank[0], tmp_path / "report")
    second = (GateMemory(name="second_model", sha256="cd" * 32),)  # as fit_gate --ensemble leaves it
    of_model = save_gate(tmp_path / "of_model", base_dir, [bank[0]], memories=second)
    words = ("--model", base_dir, "--output", tmp_path / "export")
    for given, said in (
        (("--checkpoint", bank[1], "--gate", gate), "it lacks memory; "),
        (("--checkpoint", *bank, "--gate", gate), "weighs 1 memories (memory), and --checkpoint gives 2"),
        (("--checkpoint", bank[0], "--gate", other_base), "was fitted with another base"),
        (("--checkpoint", bank[0], "--gate", of_model), "it lacks second_model; "),
        (("--checkpoint", *bank, "--step", 3), "give one --checkpoint"),
        (("--checkpoint", *bank, "--write", "memory"), "writes one memory"),
        (("--checkpoint", *bank, bank[0]), f"--checkpoint names {bank[0]} twice"),
        (("--checkpoint", *bank, "--report", report), f"not evaluate the memory of --checkpoint {bank[1]}"),
    ):
        assert convert(*given, *words) == 2, given
        assert said in capsys.readouterr().err, given
    assert not (tmp_path / "export").exists()
    fitted = read_gate(gate)
    with pytest.raises(DamagedDataError, match="run fit_gate again"):
        stored_gate(dataclasses.replace(fitted, weights={}))


def test_generate_joins_a_base_and_its_memories_itself(
    base_dir: Path, corpus_dir: Path, bank: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = save_gate(tmp_path / "gate", base_dir, [bank[1], bank[0]])
    assert (
        convert("--checkpoint", *bank, "--model", base_dir, "--gate", gate, "--output", tmp_path / "x") == 0
    )
    options: dict[str, Any] = {"prompt": ("alpha beta return", "in"), "max_new_tokens": 8, "num_beams": 2}
    parts = {"model": str(base_dir), "memory": tuple(bank), "gate": gate}
    exported = generate.run(generate.Config(model=str(tmp_path / "x"), **options), World())
    assert generate.run(generate.Config(**parts, **options), World()) == exported
    shown = generate.run(generate.Config(**parts, **options, compare=True), World())
    assert "base + memory, gate: history" in shown
    # The front-end's own settings of logging keep messages from the root, where the fixture listens.
    package = logging.getLogger("mlpmem_ds")
    package.addHandler(caplog.handler)
    try:
        alone = generate.run(generate.Config(**parts, **options, base_only_threshold=1.0), World())
    finally:
        package.removeHandler(caplog.handler)
    assert "is for a gate" not in caplog.text
    assert "the memory was left out at" in caplog.text and "of weights" in caplog.text
    one = generate.Config(model=str(base_dir), memory=(bank[0],), lmbda=0.0, **options)
    assert generate.run(one, World()) == alone  # the base
    for flags, said in (
        (
            {"model": "x", "prompt": ("a",), "gate": gate},
            "--gate is of --memory, with the base as --model: add",
        ),
        ({**parts, "prompt": ("a",), "lmbda": 0.3}, "leave out --lambda"),
    ):
        with pytest.raises(UserError, match=said):
            generate.Config(**flags)
    with pytest.raises(UserError, match="--memory gives 1"):
        generate.run(generate.Config(model=str(base_dir), memory=(bank[0],), gate=gate, **options), World())
