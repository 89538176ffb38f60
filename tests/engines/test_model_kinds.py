"""What is given as a model and is none: each is refused in words that say what it is, and what to give."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.engines.model_kinds import reason_against_config

MARK = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"
INDEX = "model.safetensors.index.json"


def _change(**values: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | values))

    return change


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content) and None


def _cut_short(root: Path) -> None:
    path = root / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _alone(name: str, content: bytes) -> Callable[[Path], None]:
    """A directory with this one file."""

    def change(root: Path) -> None:
        for path in root.iterdir():
            path.unlink()
        (root / name).write_bytes(content)

    return change


def _shards(content: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / "model.safetensors").unlink()
        (root / INDEX).write_bytes(content)

    return change


def _pickled(content: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / "model.safetensors").unlink()
        (root / "pytorch_model.bin").write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_alone("adapter_config.json", b'{"base_model_name_or_path": "a/b"}'), "an adapter of a/b: .*merge"),
        (_write("adapter_config.json", b"{}"), "an adapter of its model: load both with peft"),
        (_alone("model.Q4.gguf", b"GGUF"), "GGUF files are llama.cpp's"),
        (_alone("modules.json", b"[]"), "a sentence-transformers directory"),
        (_alone("weights.pt", b""), "without config.json"),
        (_write("config.json", MARK + b'{"model_type": "gpt2"}'), "begins with a byte-order mark"),
        (_write("config.json", b""), "config.json is not JSON"),
        (_write("config.json", b'{"model_type": "\xe9"}'), "config.json is not JSON"),
        (_write("config.json", b"[1]"), "names no model_type"),
        (_write("config.json", b'{"model_type": 5}'), "names no model_type"),
        (_change(model_type="gizmo9"), "does not know its model type gizmo9: install"),
        (_change(model_type="gizmo9", auto_map={"AutoConfig": "a.B"}), "code of its own .trust_remote_code"),
        (_change(model_type="t5"), "type t5 is no causal language model"),
        (_cut_short, "model.safetensors is cut short or damaged"),
        (_write("model.safetensors", b""), "model.safetensors is cut short or damaged"),
        (_write("model.safetensors", POINTER), "a pointer of Git LFS"),
        (_pickled(POINTER), "pytorch_model.bin is a pointer of Git LFS"),
        (_pickled(b"abc"), "pytorch_model.bin is not a file of torch.save"),
        (_shards(b"{"), "model.safetensors.index.json is not an index of weights"),
        (_shards(MARK + b"{}"), "model.safetensors.index.json is not an index of weights"),
        (_shards(b'{"weight_map": [1]}'), "model.safetensors.index.json is not an index of weights"),
        (_shards(b'{"weight_map": {}}'), "no file is what model.safetensors.index.json names"),
        (_shards(b'{"weight_map": {"a": "x.safetensors"}}'), "x.safetensors is missing, which .* .1 of 1"),
        (lambda root: (root / "model.safetensors").unlink(), "has no weights"),
    ],
)
def test_what_is_no_model_is_refused_by_its_kind(
    base_dir: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    root = tmp_path / "a model"
    shutil.copytree(base_dir, root)
    change(root)
    with pytest.raises(UserError, match=f"^--x {root}:? .*{said}") as caught:
        fingerprint_model(str(root), flag="--x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "it is empty"),
        (" ", "it is empty"),
        ("model.gguf", "a GGUF file is llama.cpp's: tools/fetch_base.py --gguf"),
        ("model.safetensors", "it is a file: give a directory"),
        ("no/such/place", "there is no such directory, and it is no name of a model on the Hub: check the"),
        ("./dangling", "there is no such directory, and it is no name of a model on the Hub: check the"),
        ("run/bse", r"there is no such directory \(did you mean run/base\?\), and the Hub gave no model of"),
    ],
)
def test_a_path_that_is_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("model.gguf", "model.safetensors"):
        (tmp_path / file).write_bytes(b"GGUF")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "run" / "base").mkdir(parents=True)
    with pytest.raises(UserError, match=said):
        fingerprint_model(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "generation_config.json").unlink(missing_ok=True),
        _write("generation_config.json", b'{"temperature": 0.5}'),
        _change(torch_dtype="bfloat16"),
        _change(auto_map={"AutoConfig": "a.B"}),  # of a type that transformers has a class for
    ],
)
def test_what_people_have_is_read(base_dir: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    root = tmp_path / "größe mit Leer'zeichen"
    shutil.copytree(base_dir, root)
    change(root)
    (tmp_path / "link").symlink_to(root)
    assert fingerprint_model(str(root)) == fingerprint_model(str(tmp_path / "link"))


def test_a_pickle_that_runs_code_is_refused_by_the_loader(base_dir: Path, tmp_path: Path) -> None:
    from mlpmem_ds.engines.hidden_states import TransformersSource

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    root = tmp_path / "base"
    shutil.copytree(base_dir, root)
    (root / "model.safetensors").unlink()
    torch.save({"a": Touch()}, root / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(UserError, match="holds more than tensors: take a safetensors version"):
        TransformersSource(str(root))
    assert not (tmp_path / "ran").exists()


def test_an_export_is_a_causal_language_model(tmp_path: Path) -> None:
    from mlpmem_ds.models import hf  # registers its type

    (tmp_path / "config.json").write_text(json.dumps({"model_type": hf.MemoryAugmentedConfig.model_type}))
    assert reason_against_config(tmp_path / "config.json") is None


def test_weights_of_other_shapes_are_named_as_such(tmp_path: Path) -> None:
    from mlpmem_ds.models.base_loading import load_base

    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(tmp_path)
    _change(hidden_size=32)(tmp_path)
    with pytest.raises(ValueError, match="the weights have other shapes than config.json says"):
        load_base(tmp_path, dtype=torch.float32, device="cpu")
