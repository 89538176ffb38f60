"""The export: loads and generates where this package is not, and equals base + memory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmem_ds.core import files
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.model_cards import CardFacts
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.stages.conversion import model_card
from mlpmem_ds.stages.conversion.config import Config
from mlpmem_ds.stages.conversion.convert_checkpoint import EXPORT_FILE, LOGIT_BOUND, ROUNDING_BOUND
from mlpmem_ds.stages.inspection.contents import read_run
from mlpmem_ds.stages.training.initial_memory import hash_initial_memory, open_initial_memory

from ...manifests import make_provenance
from .conftest import IDS, LAMBDA, MemoryFlags, convert, expected_mixture, save_memory

STRANGER = """
import json, sys
sys.modules["mlpmem_ds"] = None  # any import of the package is an ImportError from here on
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, base_directory, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
base = AutoModelForCausalLM.from_pretrained(base_directory)
assert type(model).__module__.startswith("transformers_modules"), type(model)
way = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
result = {"lmbda": model.lmbda, "logits": model(ids).logits.double().tolist(), "new": model.generate(ids,
    **way).tolist(),
          "text": tokenizer.decode(tokenizer("alpha beta return")["input_ids"])}
model.lmbda = 0
result["without"] = model.generate(ids, **way).tolist()
result["base"] = base.generate(ids, **way).tolist()
print(json.dumps(result))
"""


def test_an_export_loads_and_generates_without_this_package(
    export_dir: Path, base_dir: Path, memory_dir: Path, tmp_path: Path
) -> None:
    assert len(list(export_dir.glob("model-*.safetensors"))) > 1
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(export_dir), str(base_dir), json.dumps(IDS.tolist())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    expected_BSV = expected_mixture(base_dir, memory_dir, IDS, LAMBDA)
    torch.testing.assert_close(
        torch.tensor(seen["logits"], dtype=torch.float64).log_softmax(-1), expected_BSV, rtol=1e-5, atol=1e-5
    )
    assert seen["lmbda"] == LAMBDA and seen["text"] == "alpha beta return"
    assert seen["without"] == seen["base"] != seen["new"]
    sequence = IDS
    for _ in range(8):
        best = expected_mixture(base_dir, memory_dir, sequence, LAMBDA)[:, -1:].argmax(-1)
        sequence = torch.cat([sequence, best], dim=1)
    assert seen["new"] == sequence.tolist()


def test_what_the_export_says_of_itself(
    export_dir: Path, base_dir: Path, memory_dir: Path, corpus_dir: Path
) -> None:
    card, manifest = (
        (export_dir / "README.md").read_text(),
        json.loads((export_dir / EXPORT_FILE).read_text()),
    )
    trained = read_weights(memory_dir)
    provenance, num_parameters = (
        trained.provenance,
        sum(tensor.numel() for tensor in trained.weights.values()),
    )
    tokens = open_corpus(corpus_dir).num_tokens
    for words in (
        "71.70",
        "64.50",
        "-12.0% to -8.0%",
        f"λ: {LAMBDA} (least",
        provenance.base,
        provenance.corpus,
        f"{tokens:,} training tokens",
        "k 48, T 3.25",
        "α 0.5",
        "layer 0 (ffn_input)",
        "Memorization",
        "Not for decisions",
        "by λ: 0: 70.00, 0.35: 63.25",
        "its licence was not stated",
        "bfloat16 or float16:",
        f"Memory: {num_parameters:,} parameters",
    ):
        assert words in card, words
    head = ModelCard.load(export_dir / "README.md").data
    assert (head.library_name, head.pipeline_tag) == ("transformers", "text-generation")
    assert head.model_name and head.license is None and "mlp-memory" in head.tags
    figures = {each.metric_name: each.metric_value for each in head.eval_results}
    assert figures[f"perplexity at λ {LAMBDA:g}"] == 64.5
    assert figures["perplexity of the base alone"] == 71.7
    for path in export_dir.iterdir():  # no directory of this machine: others would have other bytes
        assert str(base_dir.parent).encode() not in path.read_bytes(), path.name
    assert json.loads((export_dir / "config.json").read_text())["base_config"]["_name_or_path"] == ""
    assert (manifest["format"], manifest["version"]) == ("mlpmem-export", 1)
    assert {entry["name"] for entry in manifest["files"]} == {
        path.name for path in export_dir.iterdir() if path.name != EXPORT_FILE
    }
    assert all(sha256_of_file(export_dir / entry["name"]) == entry["sha256"] for entry in manifest["files"])
    assert 0 <= manifest["verification"]["logit_difference"] <= LOGIT_BOUND
    assert all(is_readable_by_others(path) for path in export_dir.iterdir())


def is_readable_by_others(path: Path) -> bool:
    """By all whom this process's umask lets read what it writes."""
    umask = os.umask(0)
    os.umask(umask)
    readable = 0o044 & ~umask
    return path.stat().st_mode & readable == readable


def test_no_file_of_weights_is_hashed_twice(
    memory_dir: Path, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model each time is a minute."""
    hashed: list[Path] = []
    sha256_of_file = files.sha256_of_file

    def count(path: Path) -> str:
        hashed.append(path)
        return sha256_of_file(path)

    monkeypatch.setattr(files, "sha256_of_file", count)
    words = (
        "--checkpoint",
        memory_dir,
        "--model",
        base_dir,
        "--lambda",
        0.3,
        "--output",
        tmp_path / "export",
    )
    assert convert(*words, "--max-shard-gigabytes", 2e-5) == 0
    weights = [path for path in hashed if path.suffix == ".safetensors"]
    assert len(weights) == len(set(weights)) > 2
    assert read_run(tmp_path / "export", checksums=True)[0].is_complete


def test_an_export_is_a_memory_to_start_from(export_dir: Path, memory_dir: Path) -> None:
    """Of its several files only the memory is taken, and it is known for the same as the training's own."""
    one, other = open_initial_memory(export_dir), open_initial_memory(memory_dir)
    trained = read_weights(memory_dir)
    again = open_initial_memory(memory_dir / "weights")
    assert len({hash_initial_memory(memory, World()) for memory in (one, other, again)}) == 1
    assert one.memory == other.memory and one.vocabulary_sha256 == trained.provenance.vocabulary_sha256
    assert all(torch.equal(one.tensor(name), tensor) for name, tensor in trained.weights.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_exports_are_rounded_and_nothing_more(
    dtype: str, memory_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "export"
    assert (
        convert(
            "--checkpoint",
            memory_dir,
            "--model",
            base_dir,
            "--output",
            output,
            "--lambda=0.5",
            "--dtype",
            dtype,
            *("--license", "mit", "--language", "en", "de"),
        )
        == 0
    )
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    wanted = getattr(torch, dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted} and loaded.lmbda == 0.5
    for name, tensor in read_weights(memory_dir).weights.items():
        assert torch.equal(loaded.memory.state_dict()[name], tensor.to(wanted)), name
    verification = json.loads((output / EXPORT_FILE).read_text())["verification"]
    exact_BSV = expected_mixture(base_dir, memory_dir, IDS, 0.5).exp()
    with torch.no_grad():
        variation = (loaded(IDS).logits.double().softmax(-1) - exact_BSV).abs().sum(-1).mean().item() / 2
    assert 0 < verification["rounding"] < ROUNDING_BOUND and 0.1 < variation / verification["rounding"] < 10
    card = (output / "README.md").read_text()
    assert "Not measured" in card and "0.5 (given as a flag)" in card
    head = ModelCard(card).data
    assert (head.license, head.language, head.eval_results) == ("mit", ["en", "de"], None)


def test_the_card_says_what_is_not_known(
    flags: MemoryFlags, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    words = ("--model", base_dir, "--tokenizer", corpus_dir / "tokenizer")
    gone = save_memory(tmp_path / "gone", flags, targets="1" * 64, corpus="2" * 64)
    assert convert("--checkpoint", gone, *words, "--output", tmp_path / "export-gone") == 0
    card = (tmp_path / "export-gone" / "README.md").read_text()
    assert "unknown k and temperature (SHA-256 of its targets' manifest 1111" in card
    assert (
        "unknown number of tokens (SHA-256 of its manifest 2222" in card
        and "0.25 (the default, not tuned)" in card
    )
    plain = save_memory(tmp_path / "plain", flags, alpha=0)
    assert convert("--checkpoint", plain, *words, "--output", tmp_path / "export-plain") == 0
    assert "Retriever: none" in (tmp_path / "export-plain" / "README.md").read_text()


def test_a_card_that_cannot_be_read_is_no_card_without_a_licence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inputs: Any = SimpleNamespace(model="some/base", report=None)
    config = Config(checkpoint=(Path("memory"),), output=Path("export"), language=("de",))
    monkeypatch.setattr(model_card, "_logger", logging.getLogger("of this test"))
    for found, given, expected, is_said in (
        (None, None, None, True),
        (None, "mit", "mit", False),
        (CardFacts(), None, None, False),
        (CardFacts(license="gemma"), None, "gemma", False),
    ):
        caplog.clear()
        monkeypatch.setattr(model_card, "facts_of", lambda _, found=found: found)
        flags = replace(config, license=given)
        of_base = model_card.facts_from_base(inputs, flags)
        model_card.warn_of_unread_card(inputs, flags, of_base)
        facts = model_card._facts(flags, of_base)
        assert (facts.license, facts.language) == (expected, ("de",))
        assert ("some/base cannot be read" in caplog.text and "--license" in caplog.text) == is_said


def test_a_card_counts_the_steps_done() -> None:
    whole = make_provenance(steps=20, batch_positions=96, epochs=5.0)
    assert model_card._length(whole) == "20 steps of 96 positions, 5.0 epochs"
    planned = "(20 in 5.0 epochs were planned)"
    assert model_card._length(whole.after(3)) == f"3 steps of 96 positions {planned}"


def test_an_export_is_complete_for_the_bases_card_tokenizer_and_settings(
    flags: MemoryFlags,
    base_dir: Path,
    corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    shutil.copytree(corpus_dir / "tokenizer", base, dirs_exist_ok=True)
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    memory, output = save_memory(tmp_path / "memory", flags), tmp_path / "export"
    words = ("--checkpoint", memory, "--model", base, "--output", output)
    assert convert(*words) == 0
    before = (output / EXPORT_FILE).read_bytes()
    assert json.loads(before)["config"]["base_card"] == {"license": "mit", "language": ["en"]}

    def rerun(*more: object) -> tuple[int, str]:
        code = convert(*words, *more)
        return code, capsys.readouterr().err

    with monkeypatch.context() as patched:  # as of a base of the Hub, without the network
        patched.setattr(model_card, "facts_of", lambda _: None)
        code, said = rerun()
        assert code == 0 and "complete" in said and "--license" not in said
    for name, content in (
        ("README.md", b"---\nlicense: apache-2.0\n---\n"),
        ("generation_config.json", json.dumps({"temperature": 0.5}).encode()),
        ("chat_template.jinja", b"{{ messages }}"),
    ):
        path = base / name
        old = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        code, said = rerun()
        assert code == 2 and "already holds another export" in said, name
        path.unlink() if old is None else path.write_bytes(old)
        assert rerun()[0] == 0, name
    assert (output / EXPORT_FILE).read_bytes() == before
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    assert "'license': 'apache-2.0'" in rerun()[1]
    assert "base_card" not in rerun("--license", "mit", "--language", "en")[1].split("now")[-1]


def test_an_export_that_was_made_without_the_network_is_the_same_with_it(
    flags: MemoryFlags,
    base_dir: Path,
    corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    shutil.copytree(corpus_dir / "tokenizer", base, dirs_exist_ok=True)
    memory, output = save_memory(tmp_path / "memory", flags), tmp_path / "export"
    words = ("--checkpoint", memory, "--model", base, "--output", output)

    def run(card: CardFacts | None) -> tuple[int, str]:
        with monkeypatch.context() as patched:  # as of a base of the Hub
            patched.setattr(model_card, "facts_of", lambda _: card)
            code = convert(*words)
        return code, capsys.readouterr().err

    code, said = run(None)
    assert code == 0 and "cannot be read" in said and "--license" in said
    before = (output / EXPORT_FILE).read_bytes()
    assert json.loads(before)["config"]["base_card"] is None
    for card in (CardFacts(license="mit", language=("en",)), CardFacts()):
        code, said = run(card)
        assert code == 0 and "complete" in said
        assert ("remove it and run this again" in said) == (card.license is not None)
    code, said = run(None)
    assert code == 0 and "complete" in said and "--license" not in said and "remove it" not in said
    assert (output / EXPORT_FILE).read_bytes() == before
    (base / "generation_config.json").unlink(missing_ok=True)
    settings = {"temperature": 0.5}
    (base / "generation_config.json").write_text(json.dumps(settings))
    code, said = run(CardFacts())
    assert code == 2 and "already holds another export" in said


def test_the_base_is_found_through_the_keys(
    memory_dir: Path, tmp_path: Path, flags: MemoryFlags, corpus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--checkpoint", memory_dir, "--output", tmp_path / "export", "--base-only-threshold", 0.1)
    assert convert(*words) == 0
    assert capsys.readouterr().err.count("--base-only-threshold 0.1 is for a gate (--gate)") == 1
    exported = AutoTokenizer.from_pretrained(tmp_path / "export").get_vocab()
    assert exported == AutoTokenizer.from_pretrained(corpus_dir / "tokenizer").get_vocab()
    lonely = save_memory(tmp_path / "lonely", flags, keys="0" * 64)
    assert convert("--checkpoint", lonely, "--output", tmp_path / "other") == 2
    assert "--model is needed" in capsys.readouterr().err


def test_generation_settings_stay_the_bases_and_stop_at_the_corpuss_end_too(
    base_dir: Path, memory_dir: Path, tmp_path: Path
) -> None:
    """Of a base whose file names another end token and a temperature without sampling, as Llama 2's does:
    transformers loads such a file and refuses to save it."""
    base = shutil.copytree(base_dir, tmp_path / "base")
    own = {
        "eos_token_id": [5, 6],
        "temperature": 0.9,
        "top_p": 0.6,
        "repetition_penalty": 1.2,
        "unheard_of": 7,
    }
    (base / "generation_config.json").write_text(json.dumps(own))
    words = ("--checkpoint", memory_dir, "--model", base, "--lambda", LAMBDA, "--output", tmp_path / "export")
    assert convert(*words) == 0
    found = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    ends = [5, 6, 0]  # the last is the end of a document in the corpus
    assert {name: found.get(name) for name in own} == {**own, "eos_token_id": ends}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.eos_token_id == ends
