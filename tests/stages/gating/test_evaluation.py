"""Gates and banks in an evaluation: figures against fp64 by the definition, other text, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.evaluation import ArmFigures, Evaluation, read_evaluation
from mlpmem_ds.formats.gates import read_gate
from mlpmem_ds.models.gate_features import History
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.arms.arm import Scores
from mlpmem_ds.stages.evaluation.arms.ensemble import EnsembleArm
from mlpmem_ds.stages.evaluation.arms.memory import MemoryArm
from mlpmem_ds.stages.evaluation.config import Config as EvaluationConfig
from mlpmem_ds.stages.gating import fit_gate
from mlpmem_ds.stages.gating.config import Config

from .conftest import Parts, make_config
from .test_fit_gate import brute_force, brute_force_of_models, rebuilt, weights_of


def evaluation_of(parts: Parts, output: Path, *gates: Config, **changes: object) -> EvaluationConfig:
    values: dict[str, object] = {
        "model": str(parts.base),
        "memory": gates[0].memory if gates else (str(parts.memory),),
        "corpus": parts.corpus,
        "output": output,
        "gate": tuple(f"{gate.output.name}={gate.output}" for gate in gates),
        "bootstrap_samples": 100,
        "bootstrap_block": 16,
        "unit_positions": 96,
        "samples": 0,
    }
    return EvaluationConfig(**{**values, **changes})  # type: ignore[arg-type]


def evaluated(config: EvaluationConfig) -> Evaluation:
    evaluate.run(config, World())
    return read_evaluation(config.output)


def check_mixture(
    gated: ArmFigures, gate: Config, evidence: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """Compare an arm's figures of the test split with those by the definition; gives λ, fp64 [N]."""
    logs_N2, confidences, histories = evidence
    lambdas_N: np.ndarray = weights_of(rebuilt(gate), confidences, histories)[:, 0]
    p = np.exp(logs_N2)
    expected = np.exp(-np.log((1 - lambdas_N) * p[:, 0] + lambdas_N * p[:, 1]).mean())
    assert gated.ppl == pytest.approx(expected, rel=1e-4)
    assert gated.weights is not None
    assert gated.weights["test"].mean == pytest.approx(lambdas_N.mean(), rel=1e-3)
    return lambdas_N


@pytest.fixture(scope="session")
def bank_gate(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_config(parts, tmp_path_factory.mktemp("bank") / "gate", num_memories=2)
    fit_gate.run(config, World())
    return config


@pytest.mark.parametrize("text", ["corpus", "general"])
def test_a_gated_memory_is_the_mixture_at_the_weights_of_the_gate(
    parts: Parts, fitted: Config, tmp_path: Path, text: str
) -> None:
    root: Path = getattr(parts, text)
    evaluation = evaluated(evaluation_of(parts, tmp_path / "report", fitted, corpus=root))
    assert [arm.name for arm in evaluation.arms] == ["base", "base+memory", "base+memory+gate"]
    assert evaluation.subject == "base+memory"
    gated, corpus = evaluation.arm("base+memory+gate"), open_corpus(root, "test")
    lambdas_N = check_mixture(gated, fitted, brute_force(parts.base, parts.memory, corpus))
    assert gated.lmbda is None and gated.tuning_curve is None and gated.chosen == {}
    assert gated.weights is not None
    figures = gated.weights["test"]
    assert figures.means[0] == pytest.approx(lambdas_N.mean(), rel=1e-3)
    assert gated.parameters > evaluation.arm("base+memory").parameters
    assert 0 <= gated.calibration.error < 1 and gated.bits_per_byte > 0
    assert gated.splits["test"].document_interval is None  # too few documents
    page = (tmp_path / "report" / "report.md").read_text()
    assert "a gate gives λ at each token" in page and f"~{figures.mean:.2f}" in page


@pytest.mark.parametrize("text", ["corpus", "general"])
def test_a_gated_second_model_is_the_mixture_at_the_weights_of_the_gate(
    parts: Parts, second_gate: Config, tmp_path: Path, text: str
) -> None:
    root: Path = getattr(parts, text)
    ensemble = {"memory": (), "ensemble": (f"second={parts.second}",)}
    evaluation = evaluated(evaluation_of(parts, tmp_path / "report", second_gate, corpus=root, **ensemble))
    assert [arm.name for arm in evaluation.arms] == ["base", "base+second", "base+second+gate"]
    assert evaluation.subject is None
    gated, corpus = evaluation.arm("base+second+gate"), open_corpus(root, "test")
    check_mixture(gated, second_gate, brute_force_of_models(parts.base, parts.second, corpus))
    assert gated.parameters > evaluation.arm("base+second").parameters == 2 * evaluation.base.parameters
    assert "the same as `base+second`, but a gate" in (tmp_path / "report" / "report.md").read_text()


def test_gates_of_a_memory_and_of_a_second_model_stand_in_one_report(
    parts: Parts, fitted: Config, second_gate: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = (f"second={parts.second}",)
    config = evaluation_of(parts, tmp_path / "report", fitted, ensemble=ensemble)
    evaluated(config)
    monkeypatch.setattr(evaluate.UnitScorer, "score", None)  # nothing is scored again
    both = evaluated(replace(config, gate=(str(fitted.output), f"other={second_gate.output}")))
    names = ["base", "base+memory", "base+second", "base+memory+gate", "base+second+other"]
    assert [arm.name for arm in both.arms] == names and both.subject == "base+memory"
    assert set(both.wins) == {"base+second", "base+second+other"}  # controls


def test_a_bank_is_the_mixture_of_all_its_memories(parts: Parts, bank_gate: Config, tmp_path: Path) -> None:
    config = evaluation_of(parts, tmp_path / "report", bank_gate)
    evaluation = evaluated(config)
    names = ["base", "base+memory", "base+other", "base+bank", "base+bank+gate"]
    assert [arm.name for arm in evaluation.arms] == names and evaluation.subject == "base+bank"
    roots = (parts.memory, parts.other)
    parts_of_test = [brute_force(parts.base, root, open_corpus(parts.corpus, "test")) for root in roots]
    p = np.exp(np.stack([parts_of_test[0][0][:, 0], *(logs[:, 1] for logs, _, _ in parts_of_test)], 1))
    bank = evaluation.arm("base+bank")
    weights = np.array([bank.chosen["lambda_memory"], bank.chosen["lambda_other"]])
    assert bank.lmbda == pytest.approx(weights.sum())
    expected = np.exp(-np.log(p @ np.array([1 - weights.sum(), *weights])).mean())
    assert bank.ppl == pytest.approx(expected, rel=1e-5)
    at_best = evaluation.arm("base+bank").splits["tuning"].ppl
    for name in ("base", "base+memory", "base+other"):
        assert at_best <= evaluation.arm(name).splits["tuning"].ppl + 1e-6

    first, second = parts_of_test
    log_base, logs = torch.from_numpy(first[0][:, 0]), torch.from_numpy(np.log(p[:, 1:]))
    corpus = open_corpus(parts.corpus, "test")
    segments = torch.from_numpy(corpus.documents_of(np.arange(corpus.num_positions) - 1))
    history, _ = History(num_memories=2).along(log_base, logs, segments=segments)
    weights_N2 = weights_of(rebuilt(bank_gate), first[1], second[1][:, 2:], history.numpy())
    all_weights = np.concatenate([1 - weights_N2.sum(1, keepdims=True), weights_N2], 1)
    expected = np.exp(-np.log((all_weights * p).sum(1)).mean())
    assert evaluation.arm("base+bank+gate").ppl == pytest.approx(expected, rel=1e-4)
    page = (config.output / "report.md").read_text()
    assert "the best weights on that split: memory" in page

    # What this bank does to other text, at its own weights.
    other = replace(
        config, corpus=parts.general, output=tmp_path / "other", choices_from=config.output, gate=()
    )
    found = evaluated(other)
    assert found.arm("base+bank").chosen == bank.chosen
    with pytest.raises(UserError, match="no choice for the arm|no weights for"):
        renamed = tuple(f"{name}={root}" for name, root in zip("ab", config.memory, strict=True))
        evaluate.run(replace(other, memory=renamed, output=tmp_path / "none"), World())


def test_a_gate_that_reads_states_is_scored_with_the_models(parts: Parts, tmp_path: Path) -> None:
    router = make_config(parts, tmp_path / "router", kind="router", max_epochs=2)
    confident = make_config(parts, tmp_path / "confident", kind="confidences", max_epochs=2)
    for config in (router, confident):
        fit_gate.run(config, World())
    report = evaluation_of(parts, tmp_path / "report", router, confident)
    evaluation = evaluated(report)
    names = ["base", "base+memory", "base+memory+router", "base+memory+confident"]
    assert [arm.name for arm in evaluation.arms] == names
    # On the tuning split the same positions as in the fit: the same weights, and so the same perplexity.
    for config in (router, confident):
        (text, _), root = read_gate(config.output).manifest.texts, config.output.name
        figures = evaluation.arm(f"base+memory+{root}").weights
        assert figures is not None and figures["tuning"].mean == pytest.approx(text.weights.mean, abs=0.1)
    stored = sorted((report.output / "scores").glob("test-weights_of_router-*.npy"))
    weights_N = np.concatenate([np.load(path) for path in stored])[:, 0]
    figures = evaluation.arm("base+memory+router").weights
    assert figures is not None and figures["test"].mean == pytest.approx(weights_N.mean(), rel=1e-6)
    assert not list((report.output / "scores").glob("*weights_of_confident*"))


def test_a_gate_is_added_to_a_report_without_scoring_again(
    parts: Parts, fitted: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluation_of(parts, tmp_path / "report")
    before = evaluated(config)
    monkeypatch.setattr(evaluate.UnitScorer, "score", None)
    after = evaluated(replace(config, gate=(str(fitted.output),)))
    assert [arm.name for arm in after.arms][2:] == ["base+memory+gate"]
    assert [arm.ppl for arm in after.arms][:2] == [arm.ppl for arm in before.arms]


@pytest.mark.parametrize("kind", ["memory", "ensemble"])
def test_a_report_of_an_older_version_takes_no_gate(
    parts: Parts,
    fitted: Config,
    second_gate: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Its units have no confidences: of a memory before gates, of a second model before gates of those."""
    ensemble = {"memory": (), "ensemble": (f"second={parts.second}",)}
    gate, flags = (fitted, {}) if kind == "memory" else (second_gate, ensemble)
    config = evaluation_of(parts, tmp_path / "report", **flags)
    arm = MemoryArm if kind == "memory" else EnsembleArm

    def older(self: Any, scan: Any, score: Any = arm.score) -> Scores:
        return replace(score(self, scan), confidences=None)

    with monkeypatch.context() as patch:
        patch.setattr(arm, "score", older)
        evaluated(config)
    assert not (config.output / "confidences").exists()
    before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    name = "memory" if kind == "memory" else "second"
    with pytest.raises(UserError, match=rf"base\+{name} without the confidences .*another --output"):
        evaluate.run(replace(config, gate=(str(gate.output),)), World())
    assert {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()} == before
    evaluated(config)  # without a gate the report goes on


def test_a_lost_file_of_confidences_is_made_again_and_not_refused(
    parts: Parts, second_gate: Config, tmp_path: Path
) -> None:
    ensemble = {"memory": (), "ensemble": (f"second={parts.second}",)}
    config = evaluation_of(parts, tmp_path / "report", second_gate, **ensemble)
    before = evaluated(config)
    lost = sorted((config.output / "confidences").iterdir())[0]
    content = lost.read_bytes()
    lost.unlink()
    assert evaluated(config).arm("base+second+gate").ppl == before.arm("base+second+gate").ppl
    assert lost.read_bytes() == content


def test_gates_that_do_not_belong_are_refused(
    parts: Parts, fitted: Config, second_gate: Config, tmp_path: Path
) -> None:
    def refused(match: str, **changes: object) -> None:
        with pytest.raises(UserError, match=match):
            config = evaluation_of(parts, tmp_path / "report", fitted, **changes)
            evaluate.run(config, World())
        assert not (tmp_path / "report").exists()

    refused("weighs what neither --memory nor --ensemble names: memory", memory=(str(parts.other),))
    refused("was fitted to the tuning split", tuning_split="heldout", test_split="tuning", extra_splits=())
    refused("--gate needs --memory", memory=())
    second = (f"second={parts.second}",)
    refused("weighs what neither .*: memory ", memory=(), ensemble=second)
    refused("weighs what neither .*: second_model ", gate=(str(second_gate.output),))
    refused("a name of its own", gate=(str(fitted.output), str(fitted.output)))
    refused("fit_gate", gate=(str(parts.memory),))
