"""A random memory of the toy base and its export, made once a worker, and their oracle."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from mlpmem_ds.core.config import option
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

from ...manifests import make_provenance, targets_manifest
from ..conftest import make_arm, make_curve, make_evaluation, publish_memory, save_report

ROOT = Path(__file__).parents[3]


IDS = torch.tensor([[5, 70, 8, 211], [290, 3, 3, 19]])


LAMBDA = 0.35


@dataclass(frozen=True, kw_only=True)
class MemoryFlags:
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


def save_memory(root: Path, flags: MemoryFlags, *, seed: int = 1, **changes: Any) -> Path:
    """A memory as launch/train.py leaves it, its weights random and wide."""
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
    return publish_memory(root, shape, provenance, seed=seed, config=flags)


def save_report_of(memory: Path, root: Path, *, lmbda: float | None = LAMBDA) -> Path:
    """A report of an evaluation that scored this memory as base+other."""
    other = make_arm(
        "base+other",
        64.5,
        ppl_change=-0.1,
        ppl_interval=(-0.12, -0.08),
        lmbda=lmbda,
        tuning_curve=make_curve({0.0: 70.0, 0.35: 63.25}),
    )
    inputs = {"base+other": sha256_of_file(memory / "manifest.json")}
    return save_report(root, make_evaluation(make_arm("base", 71.7), other), inputs=inputs)


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, keys_dir: Path) -> MemoryFlags:
    targets = tmp_path_factory.mktemp("targets")
    found = MemoryFlags(corpus=corpus_dir, keys=keys_dir, targets=targets)
    stage = open_stage(targets, stage="targets", version=1, config=found, inputs={}, world=World())
    stage.complete([], lambda: targets_manifest(k=48, weighting=Weighting(temperature=3.25)))
    return found


@pytest.fixture(scope="session")
def memory_dir(tmp_path_factory: pytest.TempPathFactory, flags: MemoryFlags) -> Path:
    return save_memory(tmp_path_factory.mktemp("memory") / "memory", flags)


@pytest.fixture(scope="session")
def export_dir(tmp_path_factory: pytest.TempPathFactory, memory_dir: Path, base_dir: Path) -> Path:
    """In several weights files, its λ and perplexities from a report."""
    root = tmp_path_factory.mktemp("export")
    report = save_report_of(memory_dir, root / "report")
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
