"""The base mixed with a second language model: its own scores, λ from the tuning split, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.evaluation import read_evaluation
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.config import Config

from ..conftest import forward_base, read_scores, save_baseline


def test_it_is_the_mixture_of_both_models_at_the_best_lambda(
    config: Config, artifacts: Path, base_dir: Path, corpus_dir: Path
) -> None:
    other = artifacts / "trained_on"
    only = {"memory": (), "keys": None, "index": None, "targets": None, "control": ()}
    config = replace(config, ensemble=(f"second={other}",), **only)
    assert evaluate.run(config, World()) is not None
    row = read_evaluation(config.output).arm("base+second")
    perplexities = {}
    for split in ("tuning", "test"):
        corpus = open_corpus(corpus_dir, split)
        labels = corpus.values(0, corpus.num_positions)
        rows = np.arange(len(labels))
        base_NV, second_NV = (forward_base(path, corpus)[0] for path in (base_dir, other))
        first, second = base_NV[rows, labels], second_NV[rows, labels]
        np.testing.assert_allclose(read_scores(config.output, split, "base+second"), second, atol=1e-5)
        top = base_NV.argmax(1)
        np.testing.assert_allclose(
            read_scores(config.output, split, "base+second", "guesses"), second_NV[rows, top], atol=1e-5
        )
        entropy = -(np.exp(second_NV) * second_NV).sum(1)
        agrees = second_NV.argmax(1) == top
        np.testing.assert_allclose(
            read_scores(config.output, split, "base+second", "confidences"),
            np.stack([entropy, second_NV.max(1), agrees], axis=1),
            atol=2e-5,
        )
        perplexities[split] = {
            lmbda: math.exp(-np.log((1 - lmbda) * np.exp(first) + lmbda * np.exp(second)).mean())
            for lmbda in config.grid.lambdas
        }
    assert row.lmbda == min(perplexities["tuning"], key=perplexities["tuning"].get)
    assert row.ppl == pytest.approx(perplexities["test"][row.lmbda], rel=1e-5)
    assert row.parameters == 2 * read_evaluation(config.output).arm("base").parameters


@pytest.mark.parametrize(
    "word, said",
    [
        ("second", "--ensemble second: give NAME=DIR"),
        ("base+second=DIR", "--ensemble base.second=DIR: give NAME=DIR"),
        ("memory=DIR", "the name memory is taken"),
    ],
)
def test_a_wrong_name_is_refused(config: Config, word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(config, ensemble=(word,))


def test_a_directory_without_a_model_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ensemble second .*directory without config.json"):
        evaluate.run(replace(config, ensemble=(f"second={tmp_path}",)), World())
    assert not config.output.exists()


def test_the_text_that_it_was_trained_on_is_refused(
    config: Config, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    model = save_baseline(base_dir, corpus_dir, tmp_path / "model", kind="baseline")
    only = {"memory": (), "keys": None, "index": None, "targets": None, "control": ()}
    config = replace(config, ensemble=(f"second={model}",), test_split="train", **only)
    with pytest.raises(UserError, match="the train split is the text that base.second was made from"):
        evaluate.run(config, World())
    assert not config.output.exists()
