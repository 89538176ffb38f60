"""The export: loads and generates where this package is not, equals base + memory, and is never published
half or wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from mlpmem_ds.core.config import option
from mlpmem_ds.core.files import publish_json, sha256_of_file
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats import weight_shards
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.evaluation import ReportManifest, write_evaluation
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.trained_models import MemoryManifest, read_weights, write_weights
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.models.memory import Memory, MemoryConfig
from mlpmem_ds.stages.conversion import convert_checkpoint
from mlpmem_ds.stages.conversion.convert_checkpoint import EXPORT_FILE, LOGIT_BOUND, ROUNDING_BOUND
from mlpmem_ds.stages.training.initial_memory import open_initial_memory

from ...manifests import make_provenance, targets_manifest
from ..conftest import make_arm, make_curve, make_evaluation

pytestmark = pytest.mark.usefixtures("code_cache")
ROOT = Path(__file__).parents[3]
IDS = torch.tensor([[5, 70, 8, 211], [290, 3, 3, 19]])
LAMBDA = 0.35


@dataclass(frozen=True, kw_only=True)
class _Flags:
    corpus: Path = option("corpus directory")
    keys: Path = option("key directory")
    targets: Path = option("target directory")


def convert(*words: object) -> int:
    spec = importlib.util.spec_from_file_location(
        "convert_checkpoint_tool", ROOT / "tools" / "convert_checkpoint.py"
    )
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return int(tool.main([str(word) for word in words]))


def save_memory(root: Path, flags: _Flags, *, seed: int = 1, **changes: Any) -> Path:
    """A memory as launch/train.py leaves it, its weights random and wide."""
    torch.manual_seed(seed)
    shape = MemoryConfig(
        input_size=16,
        hidden_size=24,
        intermediate_size=20,
        num_blocks=2,
        vocab_size=300,
        initializer_range=0.4,
    )
    corpus, keys = open_corpus(flags.corpus), open_keys(flags.keys)
    fields = {
        "base": keys.inputs["model"],
        "corpus": corpus.sha256,
        "keys": keys.sha256,
        "targets": sha256_of_file(flags.targets / "manifest.json"),
        "vocabulary_sha256": corpus.vocabulary_sha256,
        "key_layer": 1,
        "input_layer": 0,
        "key_point": "ffn_input",
        "alpha": 0.5,
        "ce_through": "plain",
        "steps": 7,
        "batch_positions": 64,
        "epochs": 2.0,
    }
    provenance = make_provenance(**fields | changes)
    directory = open_stage(root, stage="memory", version=1, config=flags, inputs={}, world=World())

    def write(_: str, writer: Any) -> None:
        write_weights(writer, Memory(shape).state_dict(), memory=shape.to_dict(), provenance=provenance)

    directory.run_units(["weights"], write)
    manifest = MemoryManifest(memory=shape.to_dict(), provenance=provenance, training=None)
    directory.finish(["weights"], lambda: manifest)
    return root


def save_report(root: Path, memory: Path, *, lmbda: float | None = LAMBDA) -> Path:
    inputs = {"base+other": sha256_of_file(memory / "manifest.json")}
    directory = open_stage(
        root,
        stage="report",
        version=1,
        config=_Flags(corpus=root, keys=root, targets=root),
        inputs=inputs,
        world=World(),
    )
    other = make_arm(
        "base+other",
        64.5,
        ppl_change=-0.1,
        ppl_interval=(-0.12, -0.08),
        lmbda=lmbda,
        tuning_curve=make_curve({0.0: 70.0, 0.35: 63.25}),
    )
    evaluation = make_evaluation(make_arm("base", 71.7), other)
    write_evaluation(root, evaluation)
    manifest = ReportManifest(
        tokens=evaluation.tokens, arms=("base", "base+other"), settings=evaluation.settings
    )
    directory.finish([], manifest.to_json)
    return root


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, keys_dir: Path) -> _Flags:
    targets = tmp_path_factory.mktemp("targets")
    found = _Flags(corpus=corpus_dir, keys=keys_dir, targets=targets)
    stage = open_stage(targets, stage="targets", version=1, config=found, inputs={}, world=World())
    stage.finish([], lambda: targets_manifest(k=48, weighting=Weighting(temperature=3.25)))
    return found


@pytest.fixture(scope="module")
def memory_dir(tmp_path_factory: pytest.TempPathFactory, flags: _Flags) -> Path:
    return save_memory(tmp_path_factory.mktemp("memory") / "memory", flags)


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory: pytest.TempPathFactory, memory_dir: Path, base_dir: Path) -> Path:
    """In several weights files, its λ and perplexities from a report."""
    root = tmp_path_factory.mktemp("export")
    report = save_report(root / "report", memory_dir)
    words = ("--checkpoint", memory_dir, "--model", base_dir, "--report", report, "--output", root / "export")
    assert convert(*words, "--max-shard-gigabytes", 2e-5) == 0
    return root / "export"


@torch.no_grad()
def expected_mixture(base_dir: Path, memory_dir: Path, ids_BS: torch.Tensor, lmbda: float) -> torch.Tensor:
    """log((1-λ) p_base + λ p_memory) in float64; the memory's input through a hook of this test's own, on
    layer 0."""
    trained = read_weights(memory_dir)
    memory = Memory(MemoryConfig.from_dict(trained.memory))
    memory.load_state_dict(trained.weights)
    base = GPT2LMHeadModel.from_pretrained(base_dir).eval()
    states: list[torch.Tensor] = []
    base.transformer.h[0].mlp.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    base_BSV = base(ids_BS).logits.double().softmax(-1)
    memory_BSV = memory.head(memory(states[0])).double().softmax(-1)
    return ((1 - lmbda) * base_BSV + lmbda * memory_BSV).log()


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
        torch.tensor(seen["logits"], dtype=torch.float64), expected_BSV, rtol=1e-5, atol=1e-5
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
    assert str(base_dir.parent) not in card
    assert (manifest["format"], manifest["version"]) == ("mlpmem-export", 1)
    assert {entry["name"] for entry in manifest["files"]} == {
        path.name for path in export_dir.iterdir() if path.name != EXPORT_FILE
    }
    assert all(sha256_of_file(export_dir / entry["name"]) == entry["sha256"] for entry in manifest["files"])
    assert 0 <= manifest["verification"]["logit_difference"] <= LOGIT_BOUND
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in export_dir.iterdir())


def test_rerun_says_complete_and_a_damaged_export_is_made_again(
    export_dir: Path,
    memory_dir: Path,
    base_dir: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (
        "--checkpoint",
        memory_dir,
        "--model",
        base_dir,
        "--report",
        export_dir.parent / "report",
        "--output",
        export_dir,
        "--max-shard-gigabytes",
        "2e-5",
    )
    before = {path.name: (path.stat().st_mtime_ns, sha256_of_file(path)) for path in export_dir.iterdir()}
    assert convert(*words) == 0
    assert before == {
        path.name: (path.stat().st_mtime_ns, sha256_of_file(path)) for path in export_dir.iterdir()
    }
    assert convert(*words, "--lambda", "0.5") == 2
    assert "already holds another export (config" in capsys.readouterr().err
    assert before == {
        path.name: (path.stat().st_mtime_ns, sha256_of_file(path)) for path in export_dir.iterdir()
    }
    damaged = next(export_dir.glob("model-*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert convert(*words) == 0
    assert {name: sha256 for name, (_, sha256) in before.items()} == {
        path.name: sha256_of_file(path) for path in export_dir.iterdir()
    }
    assert [path.name for path in export_dir.parent.iterdir() if path.name.startswith(".")] == []


def test_an_export_is_a_memory_to_start_from(export_dir: Path, memory_dir: Path) -> None:
    """Of its several files only the memory is taken, and it is known for the same as the training's own."""
    one, other = open_initial_memory(export_dir), open_initial_memory(memory_dir)
    trained = read_weights(memory_dir)
    assert one.sha256 == other.sha256 == open_initial_memory(memory_dir / "weights").sha256
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
        variation = (loaded(IDS).logits.double().exp() - exact_BSV).abs().sum(-1).mean().item() / 2
    assert 0 < verification["rounding"] < ROUNDING_BOUND and 0.1 < variation / verification["rounding"] < 10
    card = (output / "README.md").read_text()
    assert "Not measured" in card and "0.5 (given as a flag)" in card


def test_the_card_says_what_is_not_known(
    flags: _Flags, base_dir: Path, corpus_dir: Path, tmp_path: Path
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


def flip(name_part: str) -> Callable[[Path], None]:
    """Change the last bit of the last number of one tensor."""

    def plant(directory: Path) -> None:
        (path,) = directory.glob("*.safetensors")
        tensors = load_file(path)
        (name,) = [name for name in tensors if name_part in name]
        tensors[name].view(torch.int32).view(-1)[-1] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})

    return plant


def rewrite(name: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new))

    return plant


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "memory": (flip("memory.head.weight"), "1 tensors differ, the first is memory.head.weight"),
    "base": (flip("transformer.wpe"), "1 tensors differ, the first is base.transformer.wpe.weight"),
    "layer": (rewrite("config.json", '"input_layer": 0', '"input_layer": 1'), "log-probabilities at λ = 0.3"),
    "lambda": (rewrite("config.json", '"lmbda": 0.3', '"lmbda": 0.4'), "its λ is 0.4, not 0.3"),
    "code": (
        rewrite("mixture.py", "math.log1p(-weight)", "math.log(weight)"),
        "log-probabilities at λ = 0.3",
    ),
    "syntax": (rewrite("memory.py", "class Memory(", "class Memory["), "it does not load (SyntaxError"),
    "missing": (lambda directory: (directory / "backbone.py").unlink(), "it does not load"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_nothing_is_published(
    fault: str,
    memory_dir: Path,
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant, said = FAULTS[fault]
    write = convert_checkpoint.write_description

    def write_with_fault(joint: Any, tokenizer: Any, dtype: torch.dtype, export: Path) -> None:
        write(joint, tokenizer, dtype, export)
        plant(export)

    words = (
        "--checkpoint",
        memory_dir,
        "--model",
        base_dir,
        "--output",
        tmp_path / f"export-{fault}",
        "--lambda",
        "0.3",
    )
    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "write_description", write_with_fault)
        assert convert(*words) == 2
    message = capsys.readouterr().err
    assert said in message and "Nothing was published" in message
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from mlpmem_ds.formats import weight_shards
from mlpmem_ds.stages.conversion import convert_checkpoint
from mlpmem_ds.core.front_end import run_front_end
write = weight_shards.write_safetensors
def write_third_and_die(path, weights):
    write(path, weights)
    if "00003-of" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
weight_shards.write_safetensors = write_third_and_die
run_front_end(convert_checkpoint.Config, convert_checkpoint.run, argv=sys.argv[1:])
"""


def test_a_killed_conversion_leaves_no_export_and_the_rerun_succeeds(
    memory_dir: Path, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "export"
    flags = [
        "--checkpoint",
        str(memory_dir),
        "--model",
        str(base_dir),
        "--output",
        str(output),
        "--max-shard-gigabytes",
        "1e-5",
    ]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    finished = sorted(path.name for path in (left / "export").glob("model-*.safetensors"))
    assert left.name.endswith(".partial") and [name[:11] for name in finished] == [
        "model-00001",
        "model-00002",
    ]
    # A conversion that is still running is left alone: this test's parent stands for its process.
    alive = left.with_name(left.name.replace(left.name.split(".")[-2], str(os.getppid())))
    alive.mkdir()
    # Another export's leavings are removed, and an interrupted run leaves none.
    foreign = left.with_name(left.name.replace(left.name.split(".")[-2], "999999998"))
    shutil.copytree(left, foreign)
    publish_json(foreign / "identity.json", {"other": 1})
    written: list[str] = []
    write = weight_shards.write_safetensors

    def count(path: Path, weights: Any) -> None:
        written.append(path.name)
        write(path, weights)

    with monkeypatch.context() as patch:
        patch.setattr(weight_shards, "write_safetensors", count)
        patch.setattr(
            convert_checkpoint, "load_export", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        assert convert(*flags) == 130
    assert list(tmp_path.iterdir()) == [alive]
    assert written and not any(
        name[1:12] in ("model-00001", "model-00002") for name in written
    )  # continued, not redone
    assert convert(*flags) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"export", alive.name}
    assert AutoModelForCausalLM.from_pretrained(output).lmbda == 0.25


def test_the_base_is_found_through_the_keys(
    memory_dir: Path, tmp_path: Path, flags: _Flags, corpus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("--checkpoint", memory_dir, "--output", tmp_path / "export") == 0
    exported = AutoTokenizer.from_pretrained(tmp_path / "export").get_vocab()
    assert exported == AutoTokenizer.from_pretrained(corpus_dir / "tokenizer").get_vocab()
    lonely = save_memory(tmp_path / "lonely", flags, keys="0" * 64)
    assert convert("--checkpoint", lonely, "--output", tmp_path / "other") == 2
    assert "--model is needed" in capsys.readouterr().err


def test_wrong_inputs_are_refused_and_nothing_is_touched(
    memory_dir: Path,
    base_dir: Path,
    flags: _Flags,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text_dir: Path,
) -> None:
    other_base = tmp_path / "other_base"
    model = GPT2LMHeadModel.from_pretrained(base_dir)
    model.transformer.wpe.weight.data[0, 0] += 1
    model.save_pretrained(other_base)
    unfinished = tmp_path / "unfinished"
    open_stage(unfinished, stage="memory", version=1, config=flags, inputs={}, world=World())
    no_corpus = save_memory(tmp_path / "no_corpus", flags, corpus="0" * 64)
    other_words = save_memory(tmp_path / "other_words", flags, vocabulary_sha256="0" * 64)
    other_layer = save_memory(tmp_path / "other_layer", flags, input_layer=2)
    report = save_report(tmp_path / "report", no_corpus)
    useless = save_report(tmp_path / "useless", memory_dir, lmbda=None)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep me")
    output = tmp_path / "export"
    good: dict[str, Any] = {"--checkpoint": memory_dir, "--model": base_dir, "--output": output}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"--checkpoint": tmp_path / "nowhere"}, "nowhere does not exist"),
        (
            {"--checkpoint": unfinished},
            "is not finished and has no checkpoint yet: run its launch/train.py command again",
        ),
        ({"--model": other_base}, "give the model that its keys were extracted with"),
        ({"--model": tmp_path / "nowhere"}, "is neither a"),
        ({"--lambda": "1.5"}, "--lambda must be at least 0 and at most 1, not 1.5"),
        ({"--lambda": "nan"}, "--lambda must be a finite number, not nan"),
        ({"--max-shard-gigabytes": "0"}, "--max-shard-gigabytes must be above 0, not 0.0"),
        ({"--report": tmp_path / "nowhere"}, "--report"),
        ({"--report": report}, "does not evaluate the memory"),
        ({"--report": useless}, "does not evaluate the memory"),
        ({"--checkpoint": no_corpus}, "give --tokenizer RUN/corpus/tokenizer"),
        ({"--checkpoint": other_words}, "another vocabulary (300 tokens"),
        ({"--checkpoint": other_layer}, "2 layers"),
        ({"--tokenizer": text_dir}, "cannot be loaded"),
        ({"--attention": "nonsense"}, "nonsense"),
        ({"--output": foreign}, "is not empty and holds no export"),
        ({"--output": foreign / "mine.txt"}, "is a file"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for changes, said in cases:
        words = [str(word) for pair in {**good, **changes}.items() for word in pair]
        assert convert(*words) == 2, changes
        assert said in capsys.readouterr().err, changes
        assert sorted(path.name for path in tmp_path.iterdir()) == before, changes
    assert [path.name for path in foreign.iterdir()] == ["mine.txt"]
