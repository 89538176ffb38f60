"""A published memory becomes a memory directory and an export of ours, which give the base's and its own
mixture."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.manifest import CompleteStage, read_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.trained_models import MemoryManifest, TrainedMemory, read_weights
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.conversion import convert_checkpoint
from mlpmem_ds.stages.conversion.config import Config
from mlpmem_ds.stages.conversion.import_reference import write_memory
from mlpmem_ds.stages.conversion.inputs import EXPORT_FILE, open_inputs

WIDTH, INNER, VOCAB = 16, 40, 300
IDS = torch.tensor([[5, 70, 8, 211], [290, 3, 3, 19]])


def save_published(root: Path, *, width: int = WIDTH, vocab: int = VOCAB) -> Path:
    """A Llama-type memory of one block; `logits` below computes it plainly."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "layers.0.mlp.gate_proj.weight": (INNER, width),
        "layers.0.mlp.up_proj.weight": (INNER, width),
        "layers.0.mlp.down_proj.weight": (width, INNER),
        "layers.0.input_layernorm.weight": (width,),
        "norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    root.mkdir()
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        root / "model.safetensors",
    )
    (root / "config.json").write_text(json.dumps({"model_type": "mistral", "rms_norm_eps": 1e-6}))
    return root


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_published(tmp_path_factory.mktemp("published") / "memory-of-others")


def config_of(published: Path, base_dir: Path, corpus_dir: Path, output: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "from_reference": str(published),
        "model": str(base_dir),
        "tokenizer": str(corpus_dir / "tokenizer"),
        "output": output,
    }
    return Config(**{**values, **changes})


def test_memory_directory_and_export_of_a_published_memory(
    published: Path, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    config = config_of(published, base_dir, corpus_dir, tmp_path / "memory", write="memory")
    convert_checkpoint.run(config, World())
    stage = read_stage(CompleteStage, MemoryManifest, tmp_path / "memory", flag="--memory")
    trained = read_weights(tmp_path / "memory")
    assert stage.manifest.provenance == trained.provenance
    assert trained.provenance.input_layer == 1 and trained.provenance.imported.name == "memory-of-others"
    memory = Memory(MemoryConfig.from_dict(trained.memory))
    memory.load_state_dict(trained.weights)
    manifest, weights = (
        tmp_path / "memory" / name for name in ("manifest.json", "weights/model.safetensors")
    )
    before, written_at = manifest.read_bytes(), weights.stat().st_mtime_ns
    convert_checkpoint.run(config, World())  # a rerun has nothing to do
    assert manifest.read_bytes() == before and weights.stat().st_mtime_ns == written_at

    convert_checkpoint.run(
        config_of(published, base_dir, corpus_dir, tmp_path / "export", lmbda=0.4), World()
    )
    base = GPT2LMHeadModel.from_pretrained(base_dir).eval()
    states: list[torch.Tensor] = []
    base.transformer.h[1].mlp.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        base_BSV = base(IDS).logits.double().log_softmax(-1).softmax(-1)
        memory_BSV = memory.head(memory(states[0])).double().softmax(-1)
        found_BSV = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "export")(IDS).logits.double().log_softmax(-1)
        )
    torch.testing.assert_close(found_BSV, (0.6 * base_BSV + 0.4 * memory_BSV).log(), rtol=1e-5, atol=1e-5)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "imported from memory-of-others (mistral type" in card, card


def test_a_published_memory_by_its_hub_name(
    published: Path, base_dir: Path, corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a cache as huggingface_hub lays it out, without a network; the record says the name, not the
    cache's path."""
    snapshot = tmp_path / "cache" / "models--owner--memory" / "snapshots" / ("1" * 40)
    shutil.copytree(published, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    changes = {"from_reference": "owner/memory", "write": "memory"}
    convert_checkpoint.run(config_of(published, base_dir, corpus_dir, tmp_path / "named", **changes), World())
    convert_checkpoint.run(
        config_of(published, base_dir, corpus_dir, tmp_path / "given", write="memory"), World()
    )
    named, given = (read_weights(tmp_path / name) for name in ("named", "given"))
    assert named.provenance.imported.name == "owner/memory"
    assert all(torch.equal(named.weights[name], tensor) for name, tensor in given.weights.items())
    with pytest.raises(
        UserError, match="--from-reference owner/other does not exist here, and the Hub gave no such model"
    ):
        changes["from_reference"] = "owner/other"
        convert_checkpoint.run(
            config_of(published, base_dir, corpus_dir, tmp_path / "out", **changes), World()
        )
    assert not (tmp_path / "out").exists()


def test_the_weights_of_a_checkpoint_are_read_where_they_are_written(
    published: Path, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    """They cost a copy of the memory on the disk; of a complete one only a damaged file needs them."""
    config = config_of(published, base_dir, corpus_dir, tmp_path / "memory", write="memory")
    whole, reads = open_inputs(config).trained, list[int]()

    def read() -> TrainedMemory:
        reads.append(len(reads))
        return whole

    unread = replace(whole, weights={})
    write_memory(config, unread, read, World())
    write_memory(config, unread, read, World())
    assert reads == [0]
    weights = tmp_path / "memory" / "weights" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1])
    write_memory(config, unread, read, World())
    assert reads == [0, 1] and weights.read_bytes() == before


def test_a_memory_is_the_same_however_its_paths_are_typed(
    published: Path, base_dir: Path, corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they held is in its inputs; the published memory's own name is in its record."""
    config = config_of(published, base_dir, corpus_dir, tmp_path / "memory", write="memory")
    convert_checkpoint.run(config, World())
    before = (tmp_path / "memory" / "manifest.json").read_bytes()
    for name, path in (("base", base_dir), ("tokenizer", corpus_dir / "tokenizer")):
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(published.parent)
    typed = {"model": str(tmp_path / "base"), "tokenizer": str(tmp_path / "tokenizer")}
    again = replace(config, from_reference=f"./{published.name}", **typed)
    convert_checkpoint.run(again, World())
    assert (tmp_path / "memory" / "manifest.json").read_bytes() == before
    renamed = shutil.copytree(published, tmp_path / "renamed")
    with pytest.raises(UserError, match="--from-reference was 'memory-of-others', now 'renamed'"):
        convert_checkpoint.run(replace(config, from_reference=str(renamed)), World())


def test_an_export_is_of_the_layer_that_the_memory_reads(
    published: Path, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    """The published files are the same at any layer."""
    config = config_of(published, base_dir, corpus_dir, tmp_path / "export")
    convert_checkpoint.run(config, World())
    before = (tmp_path / "export" / EXPORT_FILE).read_bytes()
    convert_checkpoint.run(replace(config, input_layer=1), World())  # the last one, which is the default
    with pytest.raises(UserError, match="already holds another export .*'input_layer': 0"):
        convert_checkpoint.run(replace(config, input_layer=0), World())
    assert (tmp_path / "export" / EXPORT_FILE).read_bytes() == before


def test_what_does_not_fit_is_refused_and_nothing_is_written(
    published: Path, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    wide = save_published(tmp_path / "wide", width=24)
    other_words = save_published(tmp_path / "other_words", vocab=299)
    before = sorted(path.name for path in tmp_path.iterdir())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"from_reference": str(wide)}, "reads vectors of width 24, and --model .* has 16"),
        ({"from_reference": str(other_words)}, "predicts a vocabulary of 299, and --model .* has 300"),
        ({"from_reference": str(tmp_path / "nowhere")}, "does not exist"),
        ({"from_reference": str(base_dir)}, "no part of a memory"),
        ({"input_layer": 2}, "--input-layer: layer 2 does not exist"),
        ({"tokenizer": None}, "has no tokenizer: give --tokenizer"),
        ({"model": str(tmp_path / "nowhere")}, "there is no such directory, and it is no name of a model on"),
        ({"model": None}, "needs --model"),
        ({"checkpoint": (tmp_path,)}, "give either --checkpoint"),
        ({"report": tmp_path}, "import the memory with --write memory"),
        (
            {"from_reference": None, "checkpoint": (tmp_path,), "write": "memory"},
            "is not a directory of mlpmem memory",
        ),
        (
            {"write": "memory", "dtype": "float16", "lmbda": 0.3, "language": ("en",)},
            "--dtype, --lambda, --language are of --write export: add that, or leave them out",
        ),
        (
            {"write": "memory", "max_shard_gigabytes": 1.0, "attention": "eager"},
            "--max-shard-gigabytes, --attention are of --write export",
        ),
        (
            {"from_reference": None, "checkpoint": (tmp_path,), "write": "memory", "report": tmp_path},
            "--report is of --write export",
        ),
    ]
    for write in ("export", "memory"):
        for changes, message in cases:
            with pytest.raises(UserError, match=message):
                values = {"write": write, **changes}
                convert_checkpoint.run(
                    config_of(published, base_dir, corpus_dir, tmp_path / "out", **values), World()
                )
            assert sorted(path.name for path in tmp_path.iterdir()) == before
