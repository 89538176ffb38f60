"""The fit of a gate from text to file: features by brute force, figures, same bytes, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.gates import read_gate
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.models.gates import LearnedGate, load_gate
from mlpmem_ds.stages.evaluation.splits import Split, open_tuning_split
from mlpmem_ds.stages.gating import fit_gate, fitting
from mlpmem_ds.stages.gating.config import Config

from ...conftest import save_narrow_base, with_vocabulary
from ..evaluation.conftest import forward_base, load_memory, read_scores, save_baseline, save_memory
from .conftest import Parts, make_config


def brute_force(
    base_dir: Path, memory_dir: Path, corpus: CorpusSplit
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`evidence_by_hand` of a base and a memory."""
    log_base_NV, states_ND = forward_base(base_dir, corpus)
    memory = load_memory(memory_dir)
    with torch.no_grad():
        log_memory_NV = memory.head(memory(torch.from_numpy(states_ND))).double().log_softmax(-1).numpy()
    return evidence_by_hand(log_base_NV, log_memory_NV, corpus)


def brute_force_of_models(
    base_dir: Path, second_dir: Path, corpus: CorpusSplit
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`evidence_by_hand` of a base and a second language model."""
    return evidence_by_hand(*(forward_base(path, corpus)[0] for path in (base_dir, second_dir)), corpus)


def evidence_by_hand(
    log_base_NV: np.ndarray, log_memory_NV: np.ndarray, corpus: CorpusSplit
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p of the values by base and memory [N, 2], confidences [N, 6] and histories [N, 4], by plain
    loops."""
    values_N = corpus.values(0, corpus.num_positions)
    places = np.arange(len(values_N))
    logs_N2 = np.stack([log_base_NV[places, values_N], log_memory_NV[places, values_N]], 1)
    top_N = log_base_NV.argmax(1)

    def entropy(log_NV: np.ndarray) -> np.ndarray:
        result: np.ndarray = -(np.exp(log_NV) * log_NV).sum(1)
        return result

    confidences = np.stack(
        [
            entropy(log_base_NV),
            log_base_NV.max(1),
            entropy(log_memory_NV),
            log_memory_NV.max(1),
            log_memory_NV.argmax(1) == top_N,
            log_memory_NV[places, top_N],
        ],
        axis=1,
    )
    first_tokens = {0, *corpus.document_stops[:-1].tolist()}  # of the documents
    state, histories = np.zeros(4), []
    for position, (base, memory_log) in enumerate(logs_N2):
        if position in first_tokens:
            state = np.zeros(4)
        histories.append(state)
        news = np.array([memory_log - base] * 3 + [base])
        decays = np.array([0.8, 0.95, 0.99, 0.95])
        state = decays * state + (1 - decays) * news
    return logs_N2, confidences, np.array(histories)


def rebuilt(config: Config) -> LearnedGate:
    stored = read_gate(config.output)
    return load_gate(stored.manifest.gate, stored.weights)


def weights_of(gate: LearnedGate, *features: np.ndarray) -> np.ndarray:
    """What it gives each memory, fp64 [N, M], from its features in their order, [N, …] each."""
    with torch.no_grad():
        weights = gate.weights(torch.from_numpy(np.concatenate(features, 1)).float())
    result: np.ndarray = weights.double().numpy()
    return result


@pytest.mark.parametrize("weighed", ["memory", "second_model"])
def test_a_gate_and_its_figures_are_those_of_brute_force(
    parts: Parts, fitted: Config, second_gate: Config, weighed: str
) -> None:
    of_memory = weighed == "memory"
    config = fitted if of_memory else second_gate
    evidence = (
        partial(brute_force, parts.base, parts.memory)
        if of_memory
        else partial(brute_force_of_models, parts.base, parts.second)
    )
    manifest, gate = read_gate(config.output).manifest, rebuilt(config)
    assert [memory.name for memory in manifest.memories] == [weighed]
    assert [text.part for text in manifest.texts] == ["domain", "general"]
    for text, root in zip(manifest.texts, (parts.corpus, parts.general), strict=True):
        corpus = open_corpus(root, "tuning")
        logs_N2, confidences, histories = evidence(corpus)
        stream = "domain0" if text.part == "domain" else "general1"
        np.testing.assert_allclose(
            read_scores(config.output, stream, f"base+{weighed}"), logs_N2[:, 1], rtol=1e-5, atol=1e-5
        )
        weights = weights_of(gate, confidences, histories)[:, 0]
        # Those of whole documents, by hash, that chose when to stop.
        chosen = fitting.choose_stopping(_tuning(root), 0.5)
        assert text.stopping_positions == chosen.sum() and text.positions == len(chosen)
        p = np.exp(logs_N2)[chosen]
        lmbda = weights[chosen]
        assert text.base_ppl == pytest.approx(np.exp(-logs_N2[chosen, 0].mean()), rel=1e-5)
        assert text.memory_ppl[0] == pytest.approx(np.exp(-logs_N2[chosen, 1].mean()), rel=1e-5)
        gated = np.exp(-np.log((1 - lmbda) * p[:, 0] + lmbda * p[:, 1]).mean())
        assert text.gate_ppl == pytest.approx(gated, rel=1e-4)
        assert text.weights.mean == pytest.approx(lmbda.mean(), rel=1e-3)
        (fixed,) = manifest.fixed
        at_fixed = np.exp(-np.log((1 - fixed) * p[:, 0] + fixed * p[:, 1]).mean())
        assert text.fixed_ppl == pytest.approx(at_fixed, rel=1e-5)
        assert text.own_fixed_ppl <= text.fixed_ppl + 1e-9
    nats = [np.log([text.gate_ppl, text.fixed_ppl]) for text in manifest.texts]
    gated_mean, fixed_mean = np.mean(nats, axis=0)
    assert gated_mean <= fixed_mean + 1e-6  # the epoch was chosen for it, and the first is the fixed weights


def _tuning(root: Path) -> Split:
    return open_tuning_split(root, "tuning", flag="--corpus", min_positions=2)


def test_the_same_bytes_again_by_two_ranks_and_after_a_loss(
    parts: Parts, fitted: Config, tmp_path: Path
) -> None:
    config = replace(fitted, output=tmp_path / "gate")
    for rank in (1, 0):
        fit_gate.run(config, World(rank=rank, size=2))
    fit_gate.run(config, World(rank=1, size=2))
    first, second = (root.joinpath("gate.safetensors") for root in (fitted.output, config.output))
    assert first.read_bytes() == second.read_bytes()
    manifests = [root.joinpath("manifest.json").read_bytes() for root in (fitted.output, config.output)]
    assert manifests[0] == manifests[1]
    second.unlink()
    (config.output / "manifest.json").unlink()
    fit_gate.run(config, World())
    assert config.output.joinpath("manifest.json").read_bytes() == manifests[0]
    with pytest.raises(UserError, match="already holds another run"):
        fit_gate.run(replace(config, kind="confidences"), World())


def test_killed_at_random_and_run_again_it_is_undisturbed(
    fitted: Config, tmp_path: Path, killed_runs: Callable[..., int]
) -> None:
    config = replace(fitted, output=tmp_path / "gate")
    assert killed_runs(fit_gate.run, config, ranks=2, kills=2) >= 2
    for name in ("gate.safetensors", "manifest.json"):
        assert (config.output / name).read_bytes() == (fitted.output / name).read_bytes()


@pytest.mark.parametrize("kind", ["history", "confidences", "router"])
def test_a_bank_of_any_kind(parts: Parts, tmp_path: Path, kind: str) -> None:
    config = make_config(parts, tmp_path / "gate", num_memories=2, kind=kind, max_epochs=3)
    fit_gate.run(config, World())
    stored, gate = read_gate(config.output), rebuilt(config)
    manifest = stored.manifest
    assert [memory.name for memory in manifest.memories] == ["memory", "other"]
    assert len(manifest.fixed) == 2 and 0 <= sum(manifest.fixed) <= 1
    assert gate.num_memories == 2 and gate.kind == kind == manifest.gate["kind"]
    for text in manifest.texts:
        assert len(text.memory_ppl) == 2 and sum(text.weights.means) == pytest.approx(text.weights.mean)
        assert text.weights.quantiles == tuple(sorted(text.weights.quantiles))
    if kind == "router":
        states = np.load(next((config.output / "scores").glob("domain0-states-*.npy")))
        assert states.shape[1] == 16 * 3 and manifest.gate["base_size"] == 16


def test_a_router_of_a_base_whose_head_is_narrower_than_its_layers(
    parts: Parts, tmp_path: Path, keys_dir: Path
) -> None:
    base = str(save_narrow_base(tmp_path / "base"))
    memory = save_memory(
        tmp_path / "memory",
        open_keys(keys_dir),
        open_corpus(parts.corpus),
        seed=1,
        base=fingerprint_model(base),
    )
    config = make_config(
        parts, tmp_path / "gate", model=base, memory=(str(memory),), kind="router", max_epochs=1
    )
    fit_gate.run(config, World())
    states = np.load(next((config.output / "scores").glob("domain0-states-*.npy")))
    assert states.shape[1] == 8 + 16 and read_gate(config.output).manifest.gate["base_size"] == 8


def test_stopping_text_is_whole_documents_or_the_end(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    split = _tuning(parts.corpus)
    documents = split.corpus.documents_of(np.arange(split.num_positions))
    for fraction in (0.25, 0.5):
        chosen = fitting.choose_stopping(split, fraction)
        assert 0.4 * fraction < chosen.mean() < 1 - 0.4 * (1 - fraction)
        assert all(len(np.unique(chosen[documents == number])) == 1 for number in np.unique(documents))
    assert not caplog.records
    one = replace(split, positions=np.flatnonzero(documents == documents[-1]))
    chosen = fitting.choose_stopping(one, 0.25)
    assert "do not part well" in caplog.text
    assert chosen.mean() == pytest.approx(0.25, abs=0.05) and (np.diff(chosen.astype(int)) >= 0).all()
    for fraction, count in ((1e-6, 1), (1 - 1e-6, len(chosen) - 1)):  # either part has a position
        assert fitting.choose_stopping(one, fraction).sum() == count


def test_wrong_inputs_are_refused_before_anything_is_written(
    parts: Parts, tmp_path: Path, keys_dir: Path, base_dir: Path
) -> None:
    def refused(match: str, **changes: object) -> None:
        config = make_config(parts, tmp_path / "gate", **changes)
        with pytest.raises(UserError, match=match):
            fit_gate.run(config, World())
        assert not config.output.exists()

    refused("needs 5,000 or more: give more text", min_positions=5000)
    refused("has no split validation", tuning_split="validation")
    refused("text that base.memory was made from", tuning_split="train")
    trained = save_baseline(base_dir, parts.corpus, tmp_path / "trained", kind="base")
    others = {"memory": (), "ensemble": str(parts.second), "tuning_split": "train"}
    refused("text that base was made from .*give another --model", model=str(trained), **others)
    other_base = save_memory(
        tmp_path / "stranger", open_keys(keys_dir), open_corpus(parts.corpus), seed=3, base="0" * 64
    )
    refused("was trained for another base", memory=(str(other_base),))
    other_words = with_vocabulary(parts.general, tmp_path / "words", "5" * 64)
    refused(f"another vocabulary .* than the corpus {other_words} has", general=(str(other_words),))
    refused("--ensemble second_model .*directory without config.json", memory=(), ensemble=str(tmp_path))
    for changes, match in (
        ({"memory": ()}, "give either --memory or --ensemble"),
        ({"ensemble": "model"}, "give either --memory or --ensemble"),
        ({"corpus": ()}, "at least one --corpus"),
        ({"memory": (), "ensemble": "model", "kind": "router"}, "--ensemble has none: choose another kind"),
        ({"general": (str(parts.corpus),)}, "twice"),
        ({"memory": (str(parts.memory), str(parts.memory))}, "is taken"),
        ({"memory": ("bank=x", "y")}, "is taken"),
        ({"memory": ("a b=x", "y")}, "letters, digits"),
    ):
        with pytest.raises(UserError, match=match):
            make_config(parts, tmp_path / "gate", **changes)


def test_without_general_text_there_is_a_warning(
    parts: Parts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(parts, tmp_path / "gate", general=(), max_epochs=0)
    fit_gate.run(config, World())
    assert "--general" in caplog.text
    manifest = read_gate(config.output).manifest
    assert manifest.best_epoch == 0 and manifest.texts[0].gate_ppl == pytest.approx(
        manifest.texts[0].fixed_ppl, rel=1e-6
    )
