"""Scores of the base, of memories and of controls against plain models in fp64, whatever the batch."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.evaluation import read_evaluation
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.stages.evaluation import evaluate, forward_pass
from mlpmem_ds.stages.evaluation.arms import memory as memory_arm
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass
from mlpmem_ds.stages.evaluation.inputs import open_inputs
from mlpmem_ds.stages.retrieval.knn_scorer import TEMPERATURE_FACTORS

from ...joint_models import joined
from .conftest import (
    TEMPERATURE,
    Finished,
    brute_force_knn,
    forward_base,
    load_memory,
    read_scores,
)


def test_base_memory_and_control_scores_are_those_of_plain_fp64_models(
    finished: Finished, artifacts: Path, base_dir: Path, corpus_dir: Path
) -> None:
    config, _, evaluation = finished
    corpus = open_corpus(corpus_dir, "test")
    labels = corpus.values(0, corpus.num_positions)
    log_probabilities, states = forward_base(base_dir, corpus)
    np.testing.assert_allclose(
        read_scores(config.output, "test", "base"),
        log_probabilities[np.arange(len(labels)), labels],
        atol=1e-5,
    )
    for arm, root in (("base+memory", "memory"), ("base+memory_ce_only", "ce_only")):
        memory = load_memory(artifacts / root)
        with torch.no_grad():
            logits = memory.double().head(memory(torch.from_numpy(states).double())).log_softmax(-1).numpy()
        np.testing.assert_allclose(
            read_scores(config.output, "test", arm), logits[np.arange(len(labels)), labels], atol=1e-5
        )
    other, _ = forward_base(artifacts / "trained_on", corpus)
    wanted = other[np.arange(len(labels)), labels]
    np.testing.assert_allclose(read_scores(config.output, "test", "base_trained_on"), wanted, atol=1e-5)
    row = evaluation.arm("base_trained_on")
    assert row.ppl == pytest.approx(math.exp(-wanted.mean()), rel=1e-6)
    assert row.lmbda is None


def test_guesses_are_those_of_plain_fp64_models(
    finished: Finished, base_dir: Path, keys_dir: Path, corpus_dir: Path
) -> None:
    """What is stored of each model's likeliest token, and what the other arms give to the base's."""
    config, _, evaluation = finished
    corpus = open_corpus(corpus_dir, "test")
    labels = corpus.values(0, corpus.num_positions)
    rows = np.arange(len(labels))
    log_probabilities, states = forward_base(base_dir, corpus)
    top = log_probabilities.argmax(1)
    entropy = -(np.exp(log_probabilities) * log_probabilities).sum(1)
    wanted = np.stack([log_probabilities[rows, top], entropy, top == labels], axis=1)
    np.testing.assert_allclose(read_scores(config.output, "test", "base", "guesses"), wanted, atol=2e-5)
    memory = joined(
        GPT2LMHeadModel.from_pretrained(base_dir),
        open_inputs(config, World()).playing("subject")[0].memory,
        lmbda=1.0,
        input_point=CapturePoint(layer=-1),
    ).memory
    with torch.no_grad():
        of_memory = memory.double().head(memory(torch.from_numpy(states).double())).log_softmax(-1).numpy()
    np.testing.assert_allclose(
        read_scores(config.output, "test", "base+memory", "guesses"), of_memory[rows, top], atol=1e-5
    )
    stored = read_scores(config.output, "test", "base+knn_exact", "guesses").astype(np.float64)
    of_knn = np.exp(stored)[:, TEMPERATURE_FACTORS.index(1.0)]  # all neighbours, at the temperature given
    np.testing.assert_allclose(
        of_knn, brute_force_knn(keys_dir, states, top, TEMPERATURE), rtol=2e-6, atol=1e-12
    )
    lmbda = evaluation.arm("base+memory").lmbda
    mixture = (1 - lmbda) * np.exp(log_probabilities[rows, top]) + lmbda * np.exp(of_memory[rows, top])
    bins = np.minimum((mixture * 15).astype(int), 14)
    error = sum(abs((mixture - (top == labels))[bins == number].sum()) for number in range(15)) / len(labels)
    found = {arm.name: arm.calibration.error for arm in evaluation.arms}
    assert found["base+memory"] == pytest.approx(error, abs=1e-5)
    assert len(set(found.values())) == len(found)


def test_perplexities_are_sums_in_float64_in_any_pieces(finished: Finished) -> None:
    config, _, evaluation = finished
    scores = read_scores(config.output, "test", "base")
    pieces = [np.asarray(scores[at : at + 7], np.float64).sum() for at in range(0, len(scores), 7)]
    assert evaluation.arms[0].ppl == pytest.approx(math.exp(-sum(pieces) / len(scores)), rel=1e-12)


def test_no_score_depends_on_the_batch(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU every forward has one shape, whatever the flag: no other number of rows, no other rounding."""
    inputs = open_inputs(replace(config, keys=None, index=None, targets=None, control=()), World())
    (memory,), source = inputs.playing("subject"), inputs.base.source
    corpus = inputs.streams["test"]
    monkeypatch.setattr(forward_pass, "_CPU_TOKENS", 3 * corpus.block_size)
    shapes, read = [], source.read
    monkeypatch.setattr(
        source, "read", lambda tokens, points: shapes.append(tokens.shape) or read(tokens, points)
    )
    found, blocks = [], (Block(0, 80), Block(80, 200))
    for batch_windows in (1, 2, 16):
        one_pass = ForwardPass(source=source, name=None, batch_windows=batch_windows)
        parts = [one_pass.scan(corpus, block, memory.reads) for block in blocks]
        logs = [memory.score(part).values for part in parts]
        found.append(
            (
                shapes.copy(),
                [part.log_probabilities_n.tobytes() for part in parts],
                np.concatenate(logs).tobytes(),
            )
        )
        shapes.clear()
    assert found[0] == found[1] == found[2]
    assert {shape[0] for shape in found[0][0]} > {3} and max(shape[0] for shape in found[0][0]) == 3


def test_a_gpu_reads_as_many_windows_as_the_flag_says(config: Config, corpus_dir: Path) -> None:
    source = type("Source", (), {"device": torch.device("cuda")})()
    one_pass = ForwardPass(source=source, name=None, batch_windows=5)
    assert one_pass.windows_at_once(open_corpus(corpus_dir, "test")) == 5


def test_an_exported_memory_scores_as_the_training_does(
    config: Config, artifacts: Path, base_dir: Path, finished: Finished
) -> None:
    provenance = json.loads((artifacts / "memory" / "weights" / "config.json").read_bytes())["provenance"]
    joint = joined(
        GPT2LMHeadModel.from_pretrained(base_dir),
        load_memory(artifacts / "memory"),
        lmbda=0.3,
        provenance=provenance,
        input_point=CapturePoint(layer=provenance["input_layer"], point=provenance["input_point"]),
        vocabulary_sha256=provenance["vocabulary_sha256"],
    )
    joint.save_pretrained(config.output.parent / "export")
    evaluate.run(
        replace(
            config,
            memory=(str(config.output.parent / "export"),),
            keys=None,
            index=None,
            targets=None,
            control=(),
        ),
        World(),
    )
    found, wanted = (
        read_scores(root, "test", "base+memory") for root in (config.output, finished.config.output)
    )
    np.testing.assert_array_equal(found, wanted)
    evaluation = read_evaluation(config.output)
    assert [arm.name for arm in evaluation.arms] == ["base", "base+memory"]
    assert evaluation.arms[1].seconds is None and evaluation.reference is None
    assert "kNN" not in (config.output / "report.md").read_text()


def test_int8_memories_are_scored_as_generation_reads_them(
    config: Config,
    finished: Finished,
    base_dir: Path,
    artifacts: Path,
    corpus_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(
        config, keys=None, index=None, targets=None, control=(), samples=1, memory_weights="int8"
    )
    monkeypatch.setattr(memory_arm, "_INT8_ROWS", 50)
    evaluate.run(config, World())
    rounded, plain = (
        read_scores(root, "test", "base+memory") for root in (config.output, finished.config.output)
    )
    assert not np.array_equal(rounded, plain)
    np.testing.assert_allclose(rounded, plain, atol=0.2)
    corpus = open_corpus(corpus_dir, "test")
    joint = MemoryAugmentedLM.from_pretrained(base_dir, artifacts / "memory", lmbda=1.0).quantize_memory()
    with torch.no_grad():
        logits = joint(torch.from_numpy(corpus.tokens(0, 32).astype(np.int64))[None]).logits[0]
    wanted = logits.log_softmax(-1).gather(1, torch.from_numpy(corpus.values(0, 32))[:, None])[:, 0]
    np.testing.assert_allclose(
        rounded[:32], wanted, atol=2e-2
    )  # bfloat16 may round a state of another last bit otherwise
    np.testing.assert_array_equal(
        *(read_scores(root, "test", "base") for root in (config.output, finished.config.output))
    )
    evaluation = read_evaluation(config.output)
    wanted_row = finished.evaluation.arm("base+memory")
    assert evaluation.arms[1].parameters == wanted_row.parameters
    assert evaluation.arms[1].ppl == pytest.approx(wanted_row.ppl, rel=5e-3)
    assert len(evaluation.samples) == 1
    assert "rounded to int8" in (config.output / "report.md").read_text()
    with pytest.raises(UserError, match="already holds another run"):
        evaluate.run(replace(config, memory_weights="float"), World())


def test_a_memory_is_read_in_chunks_and_a_score_that_is_not_a_number_is_refused(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = load_memory(artifacts / "memory")
    generator = torch.Generator().manual_seed(0)
    inputs, tokens = torch.randn(23, 16, generator=generator), np.arange(46).reshape(23, 2)
    with torch.no_grad():
        wanted = (
            memory.head(memory(inputs)).double().log_softmax(-1).gather(1, torch.from_numpy(tokens)).numpy()
        )
    monkeypatch.setattr(memory_arm, "_ROWS", 5)
    found = memory_arm.memory_scores(memory, inputs, tokens).log_probabilities_NJ
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    inputs[7, 3] = math.nan
    with pytest.raises(UserError, match=r"2 of 46 log-probabilities .* --dtype float32"):
        memory_arm.memory_scores(memory, inputs, tokens)
