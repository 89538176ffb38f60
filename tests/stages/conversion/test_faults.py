"""An export is never published half or wrong: damage, planted faults, kills and wrong inputs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from mlpmem_ds.core.files import publish_json, sha256_of_file
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats import weight_shards
from mlpmem_ds.stages.conversion import convert_checkpoint

from .conftest import ROOT, MemoryFlags, convert, save_memory, save_report_of


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
    os.replace(export_dir, export_dir.with_name(f".{export_dir.name}.former"))  # killed between two renames
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


@pytest.mark.parametrize("content", [None, "{", '{"files": [{"name": "../a"}]}'])
def test_an_export_that_does_not_say_what_it_is_is_refused_with_a_remedy_that_helps(
    export_dir: Path,
    memory_dir: Path,
    base_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
) -> None:
    """It may be another export than the one that is asked for."""
    output = tmp_path / "export"
    shutil.copytree(export_dir, output)
    words = ("--checkpoint", memory_dir, "--model", base_dir, "--report", export_dir.parent / "report")
    path = output / "mlpmem_export.json"
    path.write_text(path.read_text().replace("0", "1", 1) if content is None else content)
    for _ in range(2):
        assert convert(*words, "--output", output) == 2
        said = capsys.readouterr().err
        assert "mlpmem_export.json" in said and "remove the directory" in said
        assert "run the stage that wrote it again" not in said
    shutil.rmtree(output)
    assert convert(*words, "--output", output) == 0


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


def test_wrong_inputs_are_refused_and_nothing_is_touched(
    memory_dir: Path,
    base_dir: Path,
    flags: MemoryFlags,
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
    unfetched = save_memory(tmp_path / "unfetched", flags)
    no_corpus = save_memory(tmp_path / "no_corpus", flags, corpus="0" * 64)
    other_words = save_memory(tmp_path / "other_words", flags, vocabulary_sha256="0" * 64)
    other_layer = save_memory(tmp_path / "other_layer", flags, input_layer=2)
    report = save_report_of(no_corpus, tmp_path / "report")
    useless = save_report_of(memory_dir, tmp_path / "useless", lmbda=None)
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
        (
            {"--checkpoint": unfetched, "--step": 3},
            "its checkpoints are not here: fetch them with mirror --checkpoints, or leave out --step",
        ),
        ({"--model": other_base}, "give the model that its keys were extracted with"),
        ({"--model": tmp_path / "nowhere"}, "there is no such directory, and it is no name of a model"),
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


def test_a_quantized_base_is_refused_before_anything_is_written(
    base_dir: Path,
    memory_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loader = convert_checkpoint.load_base

    def load_quantized(*args: Any, **options: Any) -> Any:
        base = loader(*args, **options)
        base.config.quantization_config = {"quant_method": "gptq", "bits": 4}
        return base

    monkeypatch.setattr(convert_checkpoint, "load_base", load_quantized)
    words = ("--checkpoint", memory_dir, "--model", base_dir, "--lambda", "0.5")
    assert convert(*words, "--output", tmp_path / "export") == 2
    assert "is quantized (gptq), and an export holds floats" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
