"""One finished evaluation of a toy pipeline that the tests of this folder compare with, and its oracles.

The fixtures are made once a worker and are read-only. Shapes: N positions, D width of a state, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.evaluation import Evaluation, read_evaluation
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import Keys, encode, open_keys, read_codec
from mlpmem_ds.formats.targets import TargetsManifest, open_targets
from mlpmem_ds.formats.trained_models import BaselineManifest, BaseManifest, TrainingResult
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.retrieval.knn_scorer import NEIGHBOUR_DIVISORS

from ...manifests import make_provenance, targets_manifest
from ..conftest import publish_memory

UNIT, K, TEMPERATURE = 96, 24, 3.0
NEIGHBOURS = [K // divisor for divisor in NEIGHBOUR_DIVISORS]


class Finished(NamedTuple):
    """An evaluation that ran to its end: its Config, the table that it returned, its eval.json."""

    config: Config
    table: str
    evaluation: Evaluation


def save_memory(
    root: Path, keys: Keys, corpus: CorpusSplit, *, seed: int, alpha: float = 0.5, **changes: Any
) -> Path:
    """Write a random memory as `launch/train.py` leaves it; `changes` go into its provenance."""
    shape = MemoryConfig(
        input_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_blocks=2,
        vocab_size=corpus.vocab_size,
        initializer_range=0.3,
    )
    fields = {
        "base": keys.inputs["model"],
        "corpus": corpus.sha256,
        "keys": keys.sha256,
        "vocabulary_sha256": corpus.vocabulary_sha256,
        "input_layer": keys.manifest.input_layer,
        "key_point": keys.manifest.key_point,
        "alpha": alpha,
        "steps": 7,
        "batch_positions": 512,
    }
    provenance = make_provenance(**fields | changes)
    return publish_memory(root, shape, provenance, seed=seed)


def load_memory(root: Path) -> Memory:
    """The memory that `save_memory` wrote."""
    shape = json.loads((root / "weights" / "config.json").read_bytes())["memory"]
    memory = Memory(MemoryConfig.from_dict(shape))
    memory.load_state_dict(load_file(root / "weights" / "model.safetensors"))
    return memory


def save_targets(
    root: Path,
    keys_sha256: str,
    *,
    index_sha256: str = "0" * 64,
    search: str = "ivf",
    weighting: Weighting | None = None,
) -> Path:
    """Write targets of no position: the evaluation reads what they were made with."""
    directory = open_stage(
        root,
        stage=TargetsManifest.FORMAT,
        version=TargetsManifest.VERSION,
        config=Flags(),
        inputs={"keys": keys_sha256, **({"index": index_sha256} if search == "ivf" else {})},
        world=World(),
    )
    weighting = weighting or Weighting(temperature=TEMPERATURE)
    manifest = targets_manifest(weighting=weighting, k=K, search=search)
    directory.run_units(["none"], lambda _, writer: None)
    directory.complete(["none"], lambda: manifest)
    return root


def save_model(base_dir: Path, corpus_dir: Path, path: Path, *, seed: int) -> Path:
    """Write a model of its own with the base's shape, other weights, and the corpus's tokenizer."""
    model = GPT2LMHeadModel.from_pretrained(base_dir)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    shutil.copy(corpus_dir / "tokenizer" / "tokenizer.json", path)
    (path / "checkpoints").mkdir()  # as `train_base` leaves it next to the model
    return path


def save_baseline(base_dir: Path, corpus_dir: Path, path: Path, *, kind: Literal["base", "baseline"]) -> Path:
    """The same as `train_base` or `train_baseline` would leave it, trained on the corpus."""
    inputs = {"corpus": open_corpus(corpus_dir).sha256}
    directory = open_stage(path, stage=kind, version=1, config=Flags(), inputs=inputs, world=World())
    training = TrainingResult(steps=3, rows_per_step=64, selected_step=3, validations=())
    baseline = BaselineManifest(
        kind="continued",
        base={},
        training=training,
        parameters=1,
        parameters_trained=1,
        parameters_matched=None,
        rank=None,
        alpha=None,
    )
    manifest = BaseManifest(base={}, training=training) if kind == "base" else baseline
    directory.run_units(["none"], lambda name, writer: None)
    save_model(base_dir, corpus_dir, path, seed=5)
    directory.complete(["none"], lambda: manifest)
    return path


@pytest.fixture(scope="session")
def artifacts(
    tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, base_dir: Path, keys_dir: Path
) -> Path:
    """A folder with an index, targets, two memories and a model for the session's corpus, base and keys."""
    root = tmp_path_factory.mktemp("evaluate")
    keys, corpus = open_keys(keys_dir), open_corpus(corpus_dir)
    build_index.run(
        build_index.Config(keys=keys_dir, output=root / "index", factory="IVF4,PQ4x4", num_shards=2), World()
    )
    save_targets(root / "targets", keys.sha256, index_sha256=open_index(root / "index").sha256)
    save_memory(root / "memory", keys, corpus, seed=1, targets=open_targets(root / "targets").sha256)
    save_memory(root / "ce_only", keys, corpus, seed=2, alpha=0)
    save_model(base_dir, corpus_dir, root / "trained_on", seed=5)
    return root


def _make_config(
    output: Path, artifacts: Path, corpus_dir: Path, base_dir: Path, keys_dir: Path, ce_only: str
) -> Config:
    return Config(
        model=str(base_dir),
        corpus=corpus_dir,
        output=output,
        memory=(str(artifacts / "memory"),),
        keys=keys_dir,
        index=artifacts / "index",
        targets=artifacts / "targets",
        nprobe=4,
        control=(f"{ce_only}={artifacts / 'ce_only'}", f"base_trained_on={artifacts / 'trained_on'}"),
        bootstrap_samples=200,
        bootstrap_block=32,
        unit_positions=UNIT,
        batch_windows=3,
    )


@pytest.fixture
def config(artifacts: Path, corpus_dir: Path, base_dir: Path, keys_dir: Path, tmp_path: Path) -> Config:
    """The flags of `finished`, into an output of the test's own."""
    return _make_config(tmp_path / "report", artifacts, corpus_dir, base_dir, keys_dir, "base+memory_ce_only")


@pytest.fixture(scope="session")
def finished(artifacts: Path, corpus_dir: Path, base_dir: Path, keys_dir: Path) -> Finished:
    """One undisturbed evaluation by one rank; a control's name is completed to base+memory_ce_only."""
    config = _make_config(artifacts / "report", artifacts, corpus_dir, base_dir, keys_dir, "memory_ce_only")
    table = evaluate.run(config, World())
    assert table is not None
    return Finished(config, table, read_evaluation(config.output))


def read_scores(root: Path, stream: str, arm: str, folder: str = "scores") -> np.ndarray:
    """All units of an arm's scores of a split, joined: float32 [N, …]."""
    files = [
        path
        for path in sorted((root / folder).glob(f"{stream}-{arm}-*.npy"))
        if path.name[len(f"{stream}-{arm}-") :].removesuffix(".npy").isdigit()
    ]
    return np.concatenate([np.load(path) for path in files])


def bytes_of_scores(root: Path) -> dict[str, bytes]:
    """The content of every file of scores and guesses, by its name."""
    folders = (root / "scores", root / "guesses")
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for folder in folders
        for path in folder.iterdir()
    }


def forward_base(base_dir: Path, corpus: CorpusSplit) -> tuple[np.ndarray, np.ndarray]:
    """The base's log-softmax, fp64 [N, V], and what its last MLP reads, float32 [N, D], by other hooks."""
    model = GPT2LMHeadModel.from_pretrained(base_dir).eval()
    caught: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.transformer.h):
        layer.mlp.register_forward_pre_hook(
            lambda _, args, number=number: caught.__setitem__(number, args[0])
        )
    rows, states = [], []
    for first in range(0, corpus.num_positions, UNIT):
        last = min(first + UNIT, corpus.num_positions)
        windows = [window for window in corpus.windows() if window.start < last and window.stop > first]
        for start in range(0, len(windows), 3):
            batch = windows[start : start + 3]
            tokens = np.stack([corpus.tokens(window.context_start, window.stop) for window in batch])
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens)).logits.double().log_softmax(-1)
            for row, window in enumerate(batch):
                scored = slice(
                    max(window.start, first) - window.context_start,
                    min(window.stop, last) - window.context_start,
                )
                rows.append(logits[row, scored].numpy())
                states.append(caught[len(model.transformer.h) - 1][row, scored].numpy())
    return np.concatenate(rows), np.concatenate(states)


def brute_force_knn(
    keys_dir: Path, states_ND: np.ndarray, labels_N: np.ndarray, temperature: float, k: int = K
) -> np.ndarray:
    """p_kNN(label) in fp64 [N]: all distances, a full sort by (distance, id), a softmax, a sum."""
    codec, keys = read_codec(keys_dir), open_keys(keys_dir)
    stored, values = keys.read("keys").astype(np.float64), keys.read("values")
    queries = np.concatenate(
        [
            encode(states_ND[first : first + UNIT], codec.mean_D, codec.rotation_DE, codec.scale)[0]
            for first in range(0, len(states_ND), UNIT)
        ]
    ).astype(np.float64)
    result = []
    for query, label in zip(queries, labels_N, strict=True):
        distances = ((stored - query) ** 2).sum(1)
        nearest = np.lexsort((np.arange(len(stored)), distances))[:k]
        weights = np.exp(-distances[nearest] * codec.scale**2 / temperature)
        result.append(weights[values[nearest] == label].sum() / weights.sum())
    return np.array(result)
