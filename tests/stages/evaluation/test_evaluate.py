"""The evaluation against brute force, over many ranks, killed and resumed, and refusing what does not belong
together."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.core.log import seconds_of_stage
from mlpmem_ds.core.manifest import read_manifest
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import fingerprint_model
from mlpmem_ds.formats.checkpoint import write_weights
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import encode, open_keys, read_codec
from mlpmem_ds.maths.knn import Neighbours
from mlpmem_ds.models.backbone import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory, MemoryConfig
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation import inputs as evaluation_inputs
from mlpmem_ds.stages.evaluation import models as evaluation_arms
from mlpmem_ds.stages.evaluation import scores as evaluation_scores
from mlpmem_ds.stages.evaluation.config import Config, lambda_grid
from mlpmem_ds.stages.evaluation.inputs import open_inputs
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.report.breakdowns import ENTROPY, FREQUENCY, KIND
from mlpmem_ds.stages.retrieval.retriever import NEIGHBOUR_DIVISORS, TEMPERATURE_FACTORS

ROOT = Path(__file__).parents[3]
UNIT, K, TEMPERATURE = 96, 24, 3.0


def _no_flags():
    from dataclasses import make_dataclass

    return make_dataclass("NoFlags", [], frozen=True)()


def _finish(directory, unit, compute, **fields):
    directory.run_units([unit], compute)
    directory.finish([unit], lambda: fields)


def save_memory(root, keys, corpus, *, seed, alpha=0.5, **changes):
    """A random memory as launch/train.py leaves it."""
    torch.manual_seed(seed)
    shape = MemoryConfig(
        input_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_blocks=2,
        vocab_size=corpus.vocab_size,
        initializer_range=0.3,
    )
    provenance = {
        "base": keys.manifest["inputs"]["model"],
        "corpus": corpus.sha256,
        "keys": keys.sha256,
        "vocabulary_sha256": corpus.vocabulary_sha256,
        "input_layer": keys.manifest["input_layer"],
        "key_point": keys.manifest["key_point"],
        "alpha": alpha,
        "steps": 7,
        "batch_positions": 512,
        **changes,
    }
    directory = open_stage(root, stage="memory", version=1, config=_no_flags(), inputs={}, world=World())

    def compute(_, writer):
        write_weights(writer, Memory(shape).state_dict(), memory=shape.to_dict(), provenance=provenance)

    _finish(directory, "weights", compute)
    return root


def save_targets(root, keys_sha256, *, search="ivf", version=2):
    """Targets of no position: the evaluation reads what they were made with."""
    directory = open_stage(
        root,
        stage="targets",
        version=version,
        config=_no_flags(),
        inputs={"keys": keys_sha256},
        world=World(),
    )
    fields = {"temperature": TEMPERATURE, "k": K, "search": search, "shards": [], "num_positions": 0}
    _finish(directory, "none", lambda _, writer: None, **fields)
    return root


def save_model(base_dir, corpus_dir, path, *, seed):
    """A model of its own with the base's shape, other weights, and the corpus's tokenizer."""
    model = GPT2LMHeadModel.from_pretrained(base_dir)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    shutil.copy(corpus_dir / "tokenizer" / "tokenizer.json", path)
    (path / "checkpoints").mkdir()  # as tools/train_base.py leaves beside the model
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory, corpus_dir, base_dir, keys_dir):
    """Index, targets, two memories and a model beside the session's corpus, base and keys."""
    root = tmp_path_factory.mktemp("evaluate")
    keys, corpus = open_keys(keys_dir), open_corpus(corpus_dir)
    build_index.run(
        build_index.Config(keys=keys_dir, output=root / "index", factory="IVF4,PQ4x4", num_shards=2), World()
    )
    save_targets(root / "targets", keys.sha256)
    save_memory(root / "memory", keys, corpus, seed=1)
    save_memory(root / "ce_only", keys, corpus, seed=2, alpha=0)
    save_model(base_dir, corpus_dir, root / "trained_on", seed=5)
    return root


@pytest.fixture
def config(parts, corpus_dir, base_dir, keys_dir, tmp_path):
    return Config(
        model=str(base_dir),
        corpus=corpus_dir,
        output=tmp_path / "report",
        memory=parts / "memory",
        keys=keys_dir,
        index=parts / "index",
        targets=parts / "targets",
        nprobe=4,
        control=(f"base+memory_ce_only={parts / 'ce_only'}", f"base_trained_on={parts / 'trained_on'}"),
        bootstrap_samples=200,
        bootstrap_block=32,
        unit_positions=UNIT,
        batch_windows=3,
    )


@pytest.fixture(scope="module")
def finished(parts, corpus_dir, base_dir, keys_dir):
    """One undisturbed evaluation by one rank; read-only."""
    config = Config(
        model=str(base_dir),
        corpus=corpus_dir,
        output=parts / "report",
        memory=parts / "memory",
        keys=keys_dir,
        index=parts / "index",
        targets=parts / "targets",
        nprobe=4,
        control=(f"memory_ce_only={parts / 'ce_only'}", f"base_trained_on={parts / 'trained_on'}"),
        bootstrap_samples=200,
        bootstrap_block=32,
        unit_positions=UNIT,
        batch_windows=3,
    )
    table = evaluate.run(config, World())
    return config, table, json.loads((config.output / "eval.json").read_bytes())


def scores_of(root):
    folders = (root / "scores", root / "guesses")
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for folder in folders
        for path in folder.iterdir()
    }


def read_scores(root, stream, arm, folder="scores"):
    files = [
        path
        for path in sorted((root / folder).glob(f"{stream}-{arm}-*.npy"))
        if path.name[len(f"{stream}-{arm}-") :].removesuffix(".npy").isdigit()
    ]
    return np.concatenate([np.load(path) for path in files])


def own_pass(base_dir, corpus):
    """What the base says and what its last MLP reads, by hooks of the test's own: fp64 log-softmax [N, V],
    float32 [N, D]."""
    model = GPT2LMHeadModel.from_pretrained(base_dir).eval()
    caught = {}
    for number, layer in enumerate(model.transformer.h):
        layer.mlp.register_forward_pre_hook(
            lambda _, args, number=number: caught.__setitem__(number, args[0])
        )
    rows, states = [], []
    for first in range(0, corpus.num_positions, UNIT):
        last = min(first + UNIT, corpus.num_positions)
        windows = [window for window in corpus.windows() if window.start < last and window.stop > first]
        for at in range(0, len(windows), 3):
            batch = windows[at : at + 3]
            tokens = np.stack([corpus.tokens(window.context_start, window.stop) for window in batch])
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens)).logits.double().log_softmax(-1)
            for row, window in enumerate(batch):
                wanted = slice(
                    max(window.start, first) - window.context_start,
                    min(window.stop, last) - window.context_start,
                )
                rows.append(logits[row, wanted].numpy())
                states.append(caught[len(model.transformer.h) - 1][row, wanted].numpy())
    return np.concatenate(rows), np.concatenate(states)


NEIGHBOURS = [K // divisor for divisor in NEIGHBOUR_DIVISORS]


def brute_force_knn(keys_dir, states, labels, temperature, k=K):
    """p_kNN(label) in fp64: all distances, a full sort by (distance, id), a softmax, a sum."""
    codec, keys = read_codec(keys_dir), open_keys(keys_dir)
    stored, values = keys.read("keys").astype(np.float64), keys.read("values")
    queries = np.concatenate(
        [
            encode(states[first : first + UNIT], codec.mean_D, codec.rotation_DE, codec.scale)[0]
            for first in range(0, len(states), UNIT)
        ]
    ).astype(np.float64)
    result = []
    for query, label in zip(queries, labels, strict=True):
        distances = ((stored - query) ** 2).sum(1)
        nearest = np.lexsort((np.arange(len(stored)), distances))[:k]
        weights = np.exp(-distances[nearest] * codec.scale**2 / temperature)
        result.append(weights[values[nearest] == label].sum() / weights.sum())
    return np.array(result)


def test_knn_arm_equals_a_brute_force_evaluation(finished, base_dir, keys_dir, corpus_dir):
    config, _, evaluation = finished
    row = next(arm for arm in evaluation["arms"] if arm["name"] == "base+knn_exact")
    choices = [(k, factor * TEMPERATURE) for k in NEIGHBOURS for factor in TEMPERATURE_FACTORS]
    column = choices.index((row["neighbours"], row["temperature"]))
    for split in ("tuning", "test", "heldout"):
        corpus = open_corpus(corpus_dir, split)
        log_probabilities, states = own_pass(base_dir, corpus)
        labels = corpus.values(0, corpus.num_positions)
        p_base = np.exp(log_probabilities[np.arange(len(labels)), labels])
        p_knn = brute_force_knn(keys_dir, states, labels, row["temperature"], row["neighbours"])
        found = np.exp(read_scores(config.output, split, "base+knn_exact").astype(np.float64))[:, column]
        np.testing.assert_allclose(found, p_knn, rtol=2e-6, atol=1e-12)
        assert (p_knn == 0).any() and (p_knn > 0.01).any()
        mixture = (1 - row["lambda"]) * p_base + row["lambda"] * p_knn
        assert row["splits"][split]["ppl"] == pytest.approx(math.exp(-np.log(mixture).mean()), rel=1e-6)
    assert 0 < row["lambda"] < 1


def test_the_choice_on_the_tuning_split_is_the_best_of_all_by_brute_force(
    finished, base_dir, keys_dir, corpus_dir
):
    _, _, evaluation = finished
    corpus = open_corpus(corpus_dir, "tuning")
    log_probabilities, states = own_pass(base_dir, corpus)
    labels = corpus.values(0, corpus.num_positions)
    p_base = np.exp(log_probabilities[np.arange(len(labels)), labels])
    perplexities = {}
    for k in NEIGHBOURS:
        for factor in TEMPERATURE_FACTORS:
            p_knn = brute_force_knn(keys_dir, states, labels, factor * TEMPERATURE, k)
            for weight in np.arange(0, 1, 0.05):
                perplexities[round(weight, 10), factor * TEMPERATURE, k] = math.exp(
                    -np.log((1 - weight) * p_base + weight * p_knn).mean()
                )
    row = next(arm for arm in evaluation["arms"] if arm["name"] == "base+knn_exact")
    assert (row["lambda"], row["temperature"], row["neighbours"]) == min(perplexities, key=perplexities.get)


def test_base_memory_and_control_scores_are_those_of_plain_fp64_models(finished, parts, base_dir, corpus_dir):
    config, _, evaluation = finished
    corpus = open_corpus(corpus_dir, "test")
    labels = corpus.values(0, corpus.num_positions)
    log_probabilities, states = own_pass(base_dir, corpus)
    np.testing.assert_allclose(
        read_scores(config.output, "test", "base"),
        log_probabilities[np.arange(len(labels)), labels],
        atol=1e-5,
    )
    for arm, root in (("base+memory", "memory"), ("base+memory_ce_only", "ce_only")):
        shape = json.loads((parts / root / "weights" / "config.json").read_bytes())["memory"]
        memory = Memory(MemoryConfig.from_dict(shape))
        from safetensors.torch import load_file

        memory.load_state_dict(load_file(parts / root / "weights" / "model.safetensors"))
        with torch.no_grad():
            logits = memory.double().head(memory(torch.from_numpy(states).double())).log_softmax(-1).numpy()
        np.testing.assert_allclose(
            read_scores(config.output, "test", arm), logits[np.arange(len(labels)), labels], atol=1e-5
        )
    other, _ = own_pass(parts / "trained_on", corpus)
    wanted = other[np.arange(len(labels)), labels]
    np.testing.assert_allclose(read_scores(config.output, "test", "base_trained_on"), wanted, atol=1e-5)
    row = next(arm for arm in evaluation["arms"] if arm["name"] == "base_trained_on")
    assert row["ppl"] == pytest.approx(math.exp(-wanted.mean()), rel=1e-6)
    assert row["lambda"] is None


def test_guesses_are_those_of_plain_fp64_models(finished, parts, base_dir, keys_dir, corpus_dir):
    """What is stored of each model's likeliest token, and what the other arms give to the base's."""
    config, _, evaluation = finished
    corpus = open_corpus(corpus_dir, "test")
    labels = corpus.values(0, corpus.num_positions)
    rows = np.arange(len(labels))
    log_probabilities, states = own_pass(base_dir, corpus)
    top = log_probabilities.argmax(1)
    entropy = -(np.exp(log_probabilities) * log_probabilities).sum(1)
    wanted = np.stack([log_probabilities[rows, top], entropy, top == labels], axis=1)
    np.testing.assert_allclose(read_scores(config.output, "test", "base", "guesses"), wanted, atol=2e-5)
    memory = MemoryAugmentedLM.from_parts(
        GPT2LMHeadModel.from_pretrained(base_dir),
        open_inputs(config).memories[0].memory,
        lmbda=1.0,
        input_point=CapturePoint(layer=-1),
    ).memory
    with torch.no_grad():
        of_memory = memory.double().head(memory(torch.from_numpy(states).double())).log_softmax(-1).numpy()
    np.testing.assert_allclose(
        read_scores(config.output, "test", "base+memory", "guesses"), of_memory[rows, top], atol=1e-5
    )
    of_knn = np.exp(read_scores(config.output, "test", "base+knn_exact", "guesses").astype(np.float64))[:, 2]
    np.testing.assert_allclose(
        of_knn, brute_force_knn(keys_dir, states, top, TEMPERATURE), rtol=2e-6, atol=1e-12
    )
    lmbda = {arm["name"]: arm for arm in evaluation["arms"]}["base+memory"]["lambda"]
    mixture = (1 - lmbda) * np.exp(log_probabilities[rows, top]) + lmbda * np.exp(of_memory[rows, top])
    bins = np.minimum((mixture * 15).astype(int), 14)
    error = sum(abs((mixture - (top == labels))[bins == number].sum()) for number in range(15)) / len(labels)
    found = {arm["name"]: arm["calibration"]["error"] for arm in evaluation["arms"]}
    assert found["base+memory"] == pytest.approx(error, abs=1e-5)
    assert len(set(found.values())) == len(found)


def test_breakdowns_speeds_and_samples(finished, corpus_dir):
    config, _, evaluation = finished
    entropy, frequency, kind = (
        next(part for part in evaluation["breakdowns"] if part["name"] == name)
        for name in (ENTROPY, FREQUENCY, KIND)
    )
    corpus, train = open_corpus(corpus_dir, "test"), open_corpus(corpus_dir, "train")
    for part in (entropy, frequency, kind):
        assert sum(part["positions"]) == corpus.num_positions
        assert set(part["arms"]) == {arm["name"] for arm in evaluation["arms"][1:]}
    counts = Counter(train.tokens(0, train.num_tokens).tolist())
    values = corpus.values(0, corpus.num_positions).tolist()
    assert frequency["positions"][2] == sum(10 <= counts[value] < 100 for value in values) > 0
    ends = [number for number, value in enumerate(values) if value == corpus.end_of_document_id]
    base = read_scores(config.output, "test", "base").astype(np.float64)
    at = kind["labels"].index("end of document")
    assert kind["positions"][at] == len(ends)
    assert kind["base_ppl"][at] == pytest.approx(math.exp(-base[ends].mean()))
    sizes = {row["keys"] for row in evaluation["speeds"] if row["arm"] == "base+knn_ivfpq"}
    assert len(sizes) == 3 and None not in sizes
    assert {row["arm"] for row in evaluation["speeds"] if row["keys"] is None} == {
        "base", "base+memory", "base+memory_ce_only",
    }  # fmt: skip
    assert len(evaluation["samples"]) == 3
    assert any(sample["base"] != sample["memory"] for sample in evaluation["samples"])
    assert evaluation["samples"][0]["memory"] in (config.output / "report.md").read_text()
    for name in ("wins.png", "speed.png"):
        assert (config.output / name).read_bytes().startswith(b"\x89PNG")


def test_a_part_of_the_datastore_is_searched_as_if_it_were_the_whole(finished, keys_dir):
    store = open_inputs(finished[0]).datastore
    part = store.first(700)
    queries = store.stored_NE[900:950]
    for arm in ("base+knn_exact", "base+knn_ivfpq"):
        found = part.search(arm, queries).ids_QK
        assert found.max() < 700 and (found >= 0).all()
    distances = ((queries[:, None].astype(np.int64) - store.stored_NE[None, :700]) ** 2).sum(-1)
    nearest = np.sort(distances, axis=1)[:, :K]
    np.testing.assert_array_equal(part.search("base+knn_exact", queries).distances_QK, nearest)
    assert store.search("base+knn_exact", queries).ids_QK.max() >= 900  # the whole is as it was
    assert store.search("base+knn_ivfpq", queries).ids_QK.max() >= 900


def test_no_score_depends_on_the_batch(config, monkeypatch):
    """On a CPU every forward has one shape, whatever the flag: no other number of rows, no other rounding."""
    inputs = open_inputs(replace(config, keys=None, index=None, targets=None, control=()))
    (memory,) = inputs.memories
    corpus = inputs.streams["test"]
    monkeypatch.setattr(evaluation_scores, "_CPU_TOKENS", 3 * corpus.block_size)
    shapes, read = [], inputs.source.read
    monkeypatch.setattr(
        inputs.source, "read", lambda tokens, points: shapes.append(tokens.shape) or read(tokens, points)
    )
    found, blocks = [], (Block(0, 80), Block(80, 200))
    for batch_windows in (1, 2, 16):
        parts = [
            evaluation_scores.scan(
                inputs.source, corpus, block, {"input": memory.point}, batch_windows=batch_windows
            )
            for block in blocks
        ]
        logs = [
            evaluation_scores.memory_log_probabilities(
                memory.memory, part.states["input"], corpus.values(*block)[:, None]
            )
            for part, block in zip(parts, blocks, strict=True)
        ]
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


def test_perplexities_are_sums_in_float64_in_any_pieces(finished):
    config, _, evaluation = finished
    scores = read_scores(config.output, "test", "base")
    pieces = [np.asarray(scores[at : at + 7], np.float64).sum() for at in range(0, len(scores), 7)]
    assert evaluation["arms"][0]["ppl"] == pytest.approx(math.exp(-sum(pieces) / len(scores)), rel=1e-12)


def test_a_gpu_reads_as_many_windows_as_the_flag_says(config, corpus_dir):
    source = type("Source", (), {"device": torch.device("cuda")})()
    assert evaluation_scores.windows_at_once(source, open_corpus(corpus_dir, "test"), 5) == 5


def test_the_base_alone_has_a_report(config):
    evaluate.run(replace(config, memory=None, keys=None, index=None, targets=None, control=()), World())
    page = (config.output / "report.md").read_text()
    assert (config.output / "manifest.json").is_file()
    assert "cost.png" in page and "wins.png" not in page and not (config.output / "wins.png").exists()


def test_a_report_begun_without_guesses_is_still_read(config, finished):
    shutil.copytree(finished[0].output, config.output)
    shutil.rmtree(config.output / "guesses")
    for path in (config.output / "done").glob("*.json"):
        record = read_json(path)
        record["files"] = [file for file in record["files"] if not file["name"].startswith("guesses/")]
        path.write_text(json.dumps(record))
    evaluate.run(config, World())
    evaluation = json.loads((config.output / "eval.json").read_bytes())
    assert {arm["calibration"] for arm in evaluation["arms"]} == {None}
    assert [part["name"] for part in evaluation["breakdowns"]] == [KIND, FREQUENCY]
    assert [arm["ppl"] for arm in evaluation["arms"]] == [arm["ppl"] for arm in finished[2]["arms"]]


def test_eval_json_has_the_arms_by_name_and_their_prices(finished, parts, base_dir, keys_dir):
    config, table, evaluation = finished
    names = [
        "base",
        "base+knn_exact",
        "base+knn_ivfpq",
        "base+memory",
        "base+memory_ce_only",
        "base_trained_on",
    ]
    assert [arm["name"] for arm in evaluation["arms"]] == names
    arms = dict(zip(names, evaluation["arms"], strict=True))
    for arm in arms.values():
        assert {
            "ppl",
            "bits_per_byte",
            "ppl_change",
            "ppl_interval",
            "lambda",
            "temperature",
            "win_rate",
            "parameters",
            "bytes",
            "seconds",
            "tokens_per_second",
            "splits",
        } <= set(arm)
        assert set(arm["splits"]) == {"tuning", "test", "heldout"}
        assert arm["tokens_per_second"] > 0
    assert set(evaluation["wins"]) == {"base+memory_ce_only", "base_trained_on"}
    base_parameters = sum(p.numel() for p in GPT2LMHeadModel.from_pretrained(base_dir).parameters())
    memory = json.loads((parts / "memory" / "weights" / "config.json").read_bytes())["memory"]
    assert arms["base"]["parameters"] == arms["base+knn_exact"]["parameters"] == base_parameters
    assert (
        arms["base+memory"]["parameters"] == base_parameters + MemoryConfig.from_dict(memory).num_parameters()
    )
    model_bytes = sum((base_dir / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert arms["base"]["bytes"] == model_bytes
    key_bytes = sum(
        path.stat().st_size for name in ("keys-*", "values-*", "codec/*") for path in keys_dir.glob(name)
    )
    assert arms["base+knn_exact"]["bytes"] == model_bytes + key_bytes
    index_bytes = sum(path.stat().st_size for path in (parts / "index").glob("*.faissindex"))
    assert arms["base+knn_ivfpq"]["bytes"] >= model_bytes + key_bytes + index_bytes
    assert arms["base+memory"]["bytes"] == model_bytes + sum(
        path.stat().st_size for path in (parts / "memory" / "weights").iterdir()
    )
    logs = {
        name: seconds_of_stage(root)
        for name, root in (
            ("keys", keys_dir),
            ("index", parts / "index"),
            ("targets", parts / "targets"),
            ("memory", parts / "memory"),
            ("ce_only", parts / "ce_only"),
        )
    }
    assert arms["base+knn_ivfpq"]["seconds"] == pytest.approx(logs["keys"] + logs["index"])
    assert arms["base+knn_exact"]["tokens"] == open_keys(keys_dir).num_positions
    assert arms["base+memory"]["tokens"] == 7 * 512 and arms["base+memory_ce_only"]["tokens"] == 7 * 512
    assert arms["base_trained_on"]["tokens"] is None and arms["base"]["tokens"] is None
    assert arms["base+memory"]["seconds"] == pytest.approx(sum(logs.values()) - logs["ce_only"])
    assert arms["base+memory_ce_only"]["seconds"] == pytest.approx(logs["keys"] + logs["ce_only"])
    assert arms["base_trained_on"]["seconds"] is None  # this model came without a log
    assert all(name in table for name in names)
    report = (config.output / "report.md").read_text()
    assert (
        table.splitlines()[2].split()[1] in report
        and "distances are then computed from the stored keys" in report
    )
    assert (config.output / "lambda.png").is_file() and (config.output / "cost.png").is_file()


def test_ivfpq_finds_less_than_exact_and_its_distances_are_exact(finished, keys_dir, parts):
    config, _, evaluation = finished
    exact, approximate = (
        read_scores(config.output, "test", f"base+knn_{kind}") for kind in ("exact", "ivfpq")
    )
    assert exact.shape == approximate.shape
    assert not np.array_equal(exact, approximate)
    assert np.corrcoef(np.exp(exact[:, 2]), np.exp(approximate[:, 2]))[0, 1] > 0.5


def test_all_lists_of_whole_vectors_give_the_exact_scores(config, parts, keys_dir, finished):
    build_index.run(build_index.Config(keys=keys_dir, output=parts / "flat", factory="IVF4,Flat"), World())
    evaluate.run(replace(config, index=parts / "flat", control=(), memory=None), World())
    exact, all_lists = (read_scores(config.output, "test", f"base+knn_{kind}") for kind in ("exact", "ivfpq"))
    np.testing.assert_array_equal(exact, read_scores(finished[0].output, "test", "base+knn_exact"))
    # Equal distances at the k-th place may be cut differently by faiss; elsewhere every bit agrees.
    assert (exact == all_lists).mean() > 0.99
    np.testing.assert_allclose(np.exp(exact), np.exp(all_lists), atol=0.05)


def test_fewer_neighbours_are_the_nearest_in_whatever_order_they_were_found(finished):
    store = open_inputs(finished[0]).datastore
    found = store.search("base+knn_exact", store.stored_NE[900:950])
    generator = np.random.default_rng(0)
    order = generator.permuted(np.tile(np.arange(K), (50, 1)), axis=1)
    shuffled = Neighbours(
        ids_QK=np.take_along_axis(found.ids_QK, order, axis=1),
        distances_QK=np.take_along_axis(found.distances_QK, order, axis=1),
    )
    values = store.values_N[900:950]
    assert [count for count, _ in store.choices] == [
        count for count in NEIGHBOURS for _ in TEMPERATURE_FACTORS
    ]
    wanted = store.log_probabilities(found, values)
    np.testing.assert_allclose(store.log_probabilities(shuffled, values), wanted, atol=1e-6)
    assert not np.allclose(np.exp(wanted[:, 0]), np.exp(wanted[:, -len(TEMPERATURE_FACTORS)]), atol=0.01)


TIMES = {"tokens_per_second", "seconds"}


def check_equal_results(root, evaluation, wanted):
    """The bytes of every score, and every number of eval.json but the times."""
    assert scores_of(root) == scores_of(wanted[0].output)
    for before, after in zip(wanted[2]["arms"], evaluation["arms"], strict=True):
        assert {name: value for name, value in before.items() if name not in TIMES} == {
            name: value for name, value in after.items() if name not in TIMES
        }
    assert evaluation["breakdowns"] == wanted[2]["breakdowns"]


@pytest.mark.parametrize(("rank", "size"), [(1, 2), (2, 3)])
def test_a_rank_that_is_left_alone_makes_the_same_bytes_in_its_own_order(config, finished, rank, size):
    assert (
        evaluate.run(replace(config, samples=0, speed_positions=0), World(rank=rank, size=size)) is not None
    )
    check_equal_results(config.output, json.loads((config.output / "eval.json").read_bytes()), finished)


def test_three_ranks_killed_at_random_leave_the_bytes_of_one(config, finished, killed_runs):
    config = replace(config, samples=0, speed_positions=0)
    assert killed_runs(evaluate.run, config, ranks=3, kills=1, seed=3) == 1
    for root in (config.output, config.output.with_name(f"{config.output.name}-undisturbed")):
        check_equal_results(root, json.loads((root / "eval.json").read_bytes()), finished)
        read_manifest(root, stage="report", version=1, flag="--output")


def test_stopped_in_a_unit_and_run_again(config, finished, monkeypatch):
    calls = []
    real = evaluate.scan

    def fail(*arguments, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("stopped")
        return real(*arguments, **settings)

    monkeypatch.setattr(evaluate, "scan", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate.run(config, World())
    assert len(list((config.output / "done").iterdir())) == 3
    evaluate.run(config, World())
    assert len(calls) == 4 + len(list((config.output / "done").iterdir())) - 3
    assert scores_of(config.output) == scores_of(finished[0].output)


def _command(config):
    flags = {
        "model": config.model,
        "corpus": config.corpus,
        "output": config.output,
        "memory": config.memory,
        "keys": config.keys,
        "index": config.index,
        "targets": config.targets,
        "nprobe": 4,
        "bootstrap-samples": 200,
        "bootstrap-block": 32,
        "unit-positions": UNIT,
        "batch-windows": 3,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*words, "--control", *config.control]


def test_front_end_prints_the_table_and_refuses_with_2(config, finished, capsys, monkeypatch):
    import importlib.util

    specification = importlib.util.spec_from_file_location(
        "evaluate_front_end", ROOT / "launch" / "evaluate.py"
    )
    front_end = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(front_end)
    shutil.copytree(finished[0].output, config.output)
    assert front_end.main(_command(config)) == 0
    assert "base+memory_ce_only" in capsys.readouterr().out
    assert front_end.main([*_command(config), "--lambdas", "0:1.5:0.1"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err


def test_each_rank_counts_to_its_own_share_and_the_report_is_named(config, finished, monkeypatch, caplog):
    shutil.copytree(finished[0].output, config.output)
    totals = []
    real = evaluate.Progress
    monkeypatch.setattr(
        evaluate, "Progress", lambda total, **words: totals.append(total) or real(total, **words)
    )
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        for rank in range(2):
            evaluate.run(replace(config, speed_positions=0, samples=0), World(rank=rank, size=2))
    inputs = open_inputs(config)
    positions = sum(corpus.num_positions for corpus in inputs.streams.values()) * (1 + len(inputs.models))
    assert sum(totals) == positions and 0 < min(totals) <= max(totals) < positions
    assert caplog.text.count(f"the report is {config.output / 'report.md'}") == 1


def test_a_further_split_that_is_not_there_is_told_where_it_was_asked_for(config, monkeypatch, caplog):
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        splits = evaluation_inputs._open_splits(replace(config, extra_splits=("nothing",)))
        assert list(splits) == ["tuning", "test"] and caplog.text.count("has no split nothing") == 1
        monkeypatch.setattr(evaluation_inputs, "DEFAULT_EXTRA_SPLITS", ("nothing",))
        evaluation_inputs._open_splits(replace(config, extra_splits=("nothing",)))
    assert caplog.text.count("has no split") == 1


def test_all_keys_are_searched_where_that_is_no_long_work(config, finished, monkeypatch, caplog):
    def exact_of(**changes):
        with caplog.at_level("INFO", logger="mlpmem_ds"):
            return open_inputs(replace(config, **changes)).datastore.exact

    assert exact_of() and "all keys are searched too" in caplog.text
    monkeypatch.setattr(evaluation_arms, "max_keys_for_exact", lambda: 10)
    assert not exact_of() and "without base+knn_exact; --exact searches" in caplog.text
    assert exact_of(exact=True) and not exact_of(exact=False)
    with pytest.raises(UserError, match="long work for exact search: give --index, or --exact"):
        exact_of(index=None)
    shutil.copytree(finished[0].output, config.output)
    identity = json.loads((config.output / "identity.json").read_text())
    assert identity["config"]["exact"] is True  # as where the flag was on by default
    assert exact_of()  # a report goes on as it was begun


def test_a_damaged_score_is_found_and_made_again(config, finished):
    shutil.copytree(finished[0].output, config.output)
    victim = sorted((config.output / "scores").iterdir())[3]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    evaluate.run(config, World())
    assert scores_of(config.output) == scores_of(finished[0].output)


def test_another_grid_reads_the_same_scores(config, finished, monkeypatch):
    shutil.copytree(finished[0].output, config.output)
    monkeypatch.setattr(evaluate, "scan", lambda *_, **__: pytest.fail("a forward pass for a grid"))
    evaluate.run(replace(config, lambdas="0:0.5:0.5", bootstrap_samples=150), World())
    evaluation = json.loads((config.output / "eval.json").read_bytes())
    assert evaluation["lambdas"] == [0, 0.5]
    assert {arm["lambda"] for arm in evaluation["arms"]} <= {None, 0, 0.5}


def test_an_exported_memory_scores_as_the_training_does(
    config, parts, base_dir, corpus_dir, keys_dir, finished
):
    memory_config = json.loads((parts / "memory" / "weights" / "config.json").read_bytes())
    memory = Memory(MemoryConfig.from_dict(memory_config["memory"]))
    from safetensors.torch import load_file

    memory.load_state_dict(load_file(parts / "memory" / "weights" / "model.safetensors"))
    provenance = memory_config["provenance"]
    joint = MemoryAugmentedLM.from_parts(
        GPT2LMHeadModel.from_pretrained(base_dir),
        memory,
        lmbda=0.3,
        provenance=provenance,
        input_point=CapturePoint(layer=provenance["input_layer"], point=provenance["key_point"]),
        vocabulary_sha256=provenance["vocabulary_sha256"],
    )
    joint.save_pretrained(config.output.parent / "export")
    evaluate.run(
        replace(
            config, memory=config.output.parent / "export", keys=None, index=None, targets=None, control=()
        ),
        World(),
    )
    found, wanted = (read_scores(root, "test", "base+memory") for root in (config.output, finished[0].output))
    np.testing.assert_array_equal(found, wanted)
    evaluation = json.loads((config.output / "eval.json").read_bytes())
    assert [arm["name"] for arm in evaluation["arms"]] == ["base", "base+memory"]
    assert evaluation["arms"][1]["seconds"] is None and evaluation["settings"]["k"] is None
    assert "kNN:" not in (config.output / "report.md").read_text()


def test_an_export_that_lacks_weights_is_refused(config, parts, base_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    joint = MemoryAugmentedLM.from_pretrained(base_dir, parts / "memory")
    joint.save_pretrained(tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    weights = load_file(file)
    del weights["memory.blocks.1.mlp.down.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights.*export the memory again"):
        evaluate.run(replace(config, memory=tmp_path / "export"), World())
    assert not config.output.exists()


def test_int8_memories_are_scored_as_generation_reads_them(
    config, finished, base_dir, parts, corpus_dir, monkeypatch
):
    config = replace(
        config, keys=None, index=None, targets=None, control=(), samples=0, memory_weights="int8"
    )
    monkeypatch.setattr(evaluation_scores, "_INT8_ROWS", 50)
    evaluate.run(config, World())
    rounded, plain = (
        read_scores(root, "test", "base+memory") for root in (config.output, finished[0].output)
    )
    assert not np.array_equal(rounded, plain)
    np.testing.assert_allclose(rounded, plain, atol=0.2)
    corpus = open_corpus(corpus_dir, "test")
    joint = MemoryAugmentedLM.from_pretrained(base_dir, parts / "memory", lmbda=1.0).quantize_memory()
    with torch.no_grad():
        logits = joint(torch.from_numpy(corpus.tokens(0, 32).astype(np.int64))[None]).logits[0]
    wanted = logits.gather(1, torch.from_numpy(corpus.values(0, 32))[:, None])[:, 0]
    np.testing.assert_allclose(
        rounded[:32], wanted, atol=2e-2
    )  # bfloat16 may round a state of another last bit otherwise
    np.testing.assert_array_equal(
        *(read_scores(root, "test", "base") for root in (config.output, finished[0].output))
    )
    evaluation = json.loads((config.output / "eval.json").read_bytes())
    wanted_row = next(arm for arm in finished[2]["arms"] if arm["name"] == "base+memory")
    assert evaluation["arms"][1]["parameters"] == wanted_row["parameters"]
    assert evaluation["arms"][1]["ppl"] == pytest.approx(wanted_row["ppl"], rel=5e-3)
    assert "rounded to int8" in (config.output / "report.md").read_text()
    with pytest.raises(UserError, match="already holds another run"):
        evaluate.run(replace(config, memory_weights="float"), World())


def test_a_memory_is_read_in_parts_and_what_is_no_number_is_refused(parts, monkeypatch):
    from safetensors.torch import load_file

    shape = json.loads((parts / "memory" / "weights" / "config.json").read_bytes())["memory"]
    memory = Memory(MemoryConfig.from_dict(shape))
    memory.load_state_dict(load_file(parts / "memory" / "weights" / "model.safetensors"))
    generator = torch.Generator().manual_seed(0)
    inputs, tokens = torch.randn(23, 16, generator=generator), np.arange(46).reshape(23, 2)
    with torch.no_grad():
        wanted = (
            memory.head(memory(inputs)).double().log_softmax(-1).gather(1, torch.from_numpy(tokens)).numpy()
        )
    monkeypatch.setattr(evaluation_scores, "_MEMORY_ROWS", 5)
    np.testing.assert_allclose(
        evaluation_scores.memory_log_probabilities(memory, inputs, tokens), wanted, atol=1e-5
    )
    inputs[7, 3] = math.nan
    with pytest.raises(UserError, match=r"2 of 46 log-probabilities .* --dtype float32"):
        evaluation_scores.memory_log_probabilities(memory, inputs, tokens)


@pytest.fixture(scope="module")
def unsplit_dir(text_dir, corpus_dir, tmp_path_factory):
    """Other text, tokenized as the corpus, all of it in the training split."""
    from mlpmem_ds.stages.corpus import prepare_corpus

    text = tmp_path_factory.mktemp("other_text")
    for number, path in enumerate(sorted(text_dir.rglob("*.py"))[:8]):
        (text / f"other{number}.py").write_text(path.read_text()[5:] + "value index\n")
    output = tmp_path_factory.mktemp("unsplit") / "corpus"
    prepare_corpus.run(
        prepare_corpus.Config(
            input=(str(text),),
            tokenizer=str(corpus_dir / "tokenizer"),
            output=output,
            block_size=32,
            stride=16,
        ),
        World(),
    )
    return output


def test_an_unsplit_corpus_is_dealt_in_halves_by_document(config, unsplit_dir, base_dir):
    evaluate.run(replace(config, corpus=unsplit_dir, index=None), World())
    evaluation = json.loads((config.output / "eval.json").read_bytes())
    corpus = open_corpus(unsplit_dir)
    assert sum(evaluation["tokens"].values()) == corpus.num_positions
    assert min(evaluation["tokens"].values()) > 32
    scores = read_scores(config.output, "train", "base").astype(np.float64)
    from mlpmem_ds.core.hashing import hash_fraction

    halves = np.array([hash_fraction(f"evaluate:{document['name']}") < 0.5 for document in corpus.documents])
    is_tuning = halves[corpus.documents_of(np.arange(corpus.num_positions))]
    for split, chosen, documents in (("tuning", is_tuning, halves), ("test", ~is_tuning, ~halves)):
        row = evaluation["arms"][0]["splits"][split]
        assert row["ppl"] == pytest.approx(math.exp(-scores[chosen].mean()))
        num_bytes = sum(
            document["bytes"] for document, mine in zip(corpus.documents, documents, strict=True) if mine
        )
        assert row["bits_per_byte"] == pytest.approx(-scores[chosen].sum() / math.log(2) / num_bytes)


def _wrong_memory(root, keys_dir, corpus_dir, **changes):
    return save_memory(root, open_keys(keys_dir), open_corpus(corpus_dir), seed=3, **changes)


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"test_split": "train"}, "is the text that the keys"),
        ({"test_split": "nothing"}, "choose another split"),
        ({"bootstrap_block": 100_000}, "smaller block"),
        ({"targets": None}, "need a temperature"),
        ({"k": 10**6}, r"1,000,000 neighbours are more than the .* smaller --k"),
        ({"memory": Path("/nowhere/memory")}, "does not exist"),
        ({"keys": Path("/nowhere/keys")}, "does not exist"),
        ({"model": "/nowhere/base"}, "/nowhere/base"),
        ({"control": ("other=/nowhere/model",)}, "neither a memory nor a language model"),
        ({"control": ("base+other={parts}/trained_on",)}, "choose another name"),
        ({"control": ("a={parts}/ce_only", "base+a={parts}/ce_only")}, "the same name"),
    ],
)
def test_bad_inputs_leave_nothing_behind(config, parts, changes, needle):
    if "control" in changes:
        changes = {"control": tuple(word.format(parts=parts) for word in changes["control"])}
    with pytest.raises(UserError, match=needle):
        evaluate.run(replace(config, **changes), World())
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"base": "0" * 64}, "another base"),
        ({"vocabulary_sha256": "0" * 64}, "another vocabulary"),
    ],
)
def test_a_memory_of_something_else_is_refused(config, keys_dir, corpus_dir, tmp_path, changes, needle):
    root = _wrong_memory(tmp_path / "wrong", keys_dir, corpus_dir, **changes)
    for flags in ({"memory": root}, {"control": (f"wrong={root}",)}):
        with pytest.raises(UserError, match=needle):
            evaluate.run(replace(config, **flags), World())
        assert not config.output.exists()


def test_keys_index_and_targets_of_something_else_are_refused(config, parts, tmp_path, corpus_dir):
    other = replace(config, model=str(parts / "trained_on"), memory=None, control=())
    with pytest.raises(UserError, match="extracted from another base"):
        evaluate.run(other, World())
    targets = save_targets(tmp_path / "targets", "0" * 64, version=1)
    with pytest.raises(UserError, match="are of other keys"):
        evaluate.run(replace(config, targets=targets), World())
    index = tmp_path / "index"
    shutil.copytree(parts / "index", index)
    manifest = read_json(index / "manifest.json")
    manifest["inputs"]["keys"] = "0" * 64
    (index / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is of other keys"):
        evaluate.run(replace(config, index=index), World())
    assert not config.output.exists()


def test_an_unfinished_control_is_refused(config, parts, tmp_path):
    for kind, name in (("ce_only", "base+x"), ("trained_on", "x")):
        shutil.copytree(parts / kind, tmp_path / kind)
        (tmp_path / kind / "manifest.json").unlink(missing_ok=True)
        if kind == "trained_on":
            (tmp_path / kind / "identity.json").write_text(json.dumps({"format": "mlpmem-base"}))
        with pytest.raises(UserError, match="is not complete: run its stage again"):
            evaluate.run(replace(config, control=(f"{name}={tmp_path / kind}",)), World())
        assert not config.output.exists()


def test_a_model_with_other_words_is_refused(config, parts, tmp_path):
    shutil.copytree(parts / "trained_on", tmp_path / "other_words")
    path = tmp_path / "other_words" / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="another vocabulary"):
        evaluate.run(replace(config, control=(f"other={tmp_path / 'other_words'}",)), World())
    assert not config.output.exists()


def test_another_run_in_the_output_is_refused_and_untouched(config, finished):
    shutil.copytree(finished[0].output, config.output)
    before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds another run"):
        evaluate.run(replace(config, k=7), World())
    assert {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"lambdas": "0:1.2:0.1"}, "between 0 and 1"),
        ({"lambdas": "-0.1:1:0.1"}, "between 0 and 1"),
        ({"lambdas": "0:1"}, "first:last:step"),
        ({"lambdas": "0:1:0"}, "first:last:step"),
        ({"lambdas": "0:1:nan"}, "first:last:step"),
        ({"lambdas": "1:1:0.1"}, "need a λ below 1"),
        ({"k": 0}, "--k 0"),
        ({"nprobe": 0}, "--nprobe"),
        ({"samples": -1}, "--samples must be 0 or more"),
        ({"speed_positions": -5}, "--speed-positions must be 0 or more"),
        ({"temperature": -1.0}, "--temperature"),
        ({"bootstrap_samples": 3}, "--bootstrap-samples"),
        ({"test_split": "tuning"}, "must differ"),
        ({"keys": None}, "--index needs --keys"),
        ({"control": ("nameless",)}, "NAME=DIR"),
        ({"control": ("base=/tmp",)}, "is taken"),
        ({"control": ("base+memory=/tmp",)}, "is taken"),
        ({"control": ("base + x=/tmp",)}, "NAME=DIR"),
        ({"control": ("a=/tmp", "a=/tmp")}, "is taken"),
    ],
)
def test_wrong_flags(config, changes, needle):
    with pytest.raises(UserError, match=needle):
        replace(config, **changes)


def test_lambda_grid_has_both_ends():
    grid = lambda_grid("0:1:0.05")
    assert len(grid) == 21 and grid[0] == 0.0 and grid[-1] == 1.0 and grid[7] == 0.35


def test_fingerprints_tell_the_models_apart(parts, base_dir):
    assert fingerprint_model(str(base_dir)) != fingerprint_model(str(parts / "trained_on"))
