"""eval.json and the report: arms and prices by name, breakdowns, samples, splits."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2LMHeadModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.core.log import seconds_of_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.evaluation import read_document_sums, read_evaluation
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.corpus import prepare_corpus
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.report.breakdowns import ENTROPY, FREQUENCY, KIND

from .conftest import Finished, read_scores, save_baseline


def test_eval_json_has_the_arms_by_name_and_their_prices(
    finished: Finished, artifacts: Path, base_dir: Path, keys_dir: Path
) -> None:
    config, table, evaluation = finished
    names = [
        "base",
        "base+knn_exact",
        "base+knn_ivfpq",
        "base+memory",
        "base+memory_ce_only",
        "base_trained_on",
    ]
    assert [arm.name for arm in evaluation.arms] == names
    arms = dict(zip(names, evaluation.arms, strict=True))
    for arm, written in zip(
        arms.values(), json.loads((config.output / "eval.json").read_bytes())["arms"], strict=True
    ):
        assert {
            "ppl",
            "bits_per_byte",
            "ppl_change",
            "ppl_interval",
            "lambda",
            "chosen",
            "win_rate",
            "parameters",
            "bytes",
            "seconds",
            "tokens_per_second",
            "splits",
        } <= set(written)
        assert set(arm.splits) == {"tuning", "test", "heldout"}
        assert arm.tokens_per_second > 0
    assert set(evaluation.wins) == {"base+memory_ce_only", "base_trained_on"}
    base_parameters = sum(p.numel() for p in GPT2LMHeadModel.from_pretrained(base_dir).parameters())
    memory = json.loads((artifacts / "memory" / "weights" / "config.json").read_bytes())["memory"]
    assert arms["base"].parameters == arms["base+knn_exact"].parameters == base_parameters
    assert arms["base+memory"].parameters == base_parameters + MemoryConfig.from_dict(memory).num_parameters()
    model_bytes = sum((base_dir / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert arms["base"].bytes == model_bytes
    key_bytes = sum(
        path.stat().st_size for name in ("keys-*", "values-*", "codec/*") for path in keys_dir.glob(name)
    )
    assert arms["base+knn_exact"].bytes == model_bytes + key_bytes
    index_bytes = sum(path.stat().st_size for path in (artifacts / "index").glob("*.faissindex"))
    assert arms["base+knn_ivfpq"].bytes >= model_bytes + key_bytes + index_bytes
    assert arms["base+memory"].bytes == model_bytes + sum(
        path.stat().st_size for path in (artifacts / "memory" / "weights").iterdir()
    )
    assert all(name in table for name in names)
    report = (config.output / "report.md").read_text()
    assert (
        table.splitlines()[2].split()[1] in report
        and "distances are then computed from the stored keys" in report
    )
    assert (config.output / "lambda.png").is_file() and (config.output / "cost.png").is_file()


def test_each_arm_has_the_seconds_and_tokens_that_its_making_took(
    finished: Finished, artifacts: Path, keys_dir: Path
) -> None:
    arms = {arm.name: arm for arm in finished.evaluation.arms}
    logs = {
        name: seconds_of_stage(root)
        for name, root in (
            ("keys", keys_dir),
            ("index", artifacts / "index"),
            ("targets", artifacts / "targets"),
            ("memory", artifacts / "memory"),
            ("ce_only", artifacts / "ce_only"),
        )
    }
    assert arms["base+knn_ivfpq"].seconds == pytest.approx(logs["keys"] + logs["index"])
    assert arms["base+knn_exact"].tokens == open_keys(keys_dir).num_positions
    assert arms["base+memory"].tokens == 7 * 512 and arms["base+memory_ce_only"].tokens == 7 * 512
    assert arms["base_trained_on"].tokens is None and arms["base"].tokens is None
    assert arms["base+memory"].seconds == pytest.approx(sum(logs.values()) - logs["ce_only"])
    assert arms["base+memory_ce_only"].seconds == pytest.approx(logs["keys"] + logs["ce_only"])
    assert arms["base_trained_on"].seconds is None  # this model has no log


def test_breakdowns_count_every_position_and_speeds_and_samples_are_there(
    finished: Finished, corpus_dir: Path
) -> None:
    config, _, evaluation = finished
    entropy, frequency, kind = (
        next(part for part in evaluation.breakdowns if part.name == name)
        for name in (ENTROPY, FREQUENCY, KIND)
    )
    corpus, train = open_corpus(corpus_dir, "test"), open_corpus(corpus_dir, "train")
    for part in (entropy, frequency, kind):
        assert sum(part.positions) == corpus.num_positions
        assert set(part.arms) == {arm.name for arm in evaluation.arms[1:]}
    counts = Counter(train.tokens(0, train.num_tokens).tolist())
    values = corpus.values(0, corpus.num_positions).tolist()
    assert frequency.positions[2] == sum(10 <= counts[value] < 100 for value in values) > 0
    ends = [number for number, value in enumerate(values) if value == corpus.end_of_document_id]
    base = read_scores(config.output, "test", "base").astype(np.float64)
    at = kind.labels.index("end of document")
    assert kind.positions[at] == len(ends)
    assert kind.base_ppl[at] == pytest.approx(math.exp(-base[ends].mean()))
    sizes = {row.keys for row in evaluation.speeds if row.arm == "base+knn_ivfpq"}
    assert len(sizes) == 3 and None not in sizes
    assert {row.arm for row in evaluation.speeds if row.keys is None} == {
        "base", "base+memory", "base+memory_ce_only",
    }  # fmt: skip
    assert len(evaluation.samples) == 3
    assert any(sample.base != sample.memory for sample in evaluation.samples)
    assert evaluation.samples[0].memory in (config.output / "report.md").read_text()
    for name in ("wins.png", "speed.png"):
        assert (config.output / name).read_bytes().startswith(b"\x89PNG")


def test_the_base_alone_has_a_report(config: Config) -> None:
    evaluate.run(replace(config, memory=(), keys=None, index=None, targets=None, control=()), World())
    page = (config.output / "report.md").read_text()
    assert (config.output / "manifest.json").is_file()
    assert "cost.png" in page and "wins.png" not in page and not (config.output / "wins.png").exists()


@pytest.fixture(scope="module")
def unsplit_dir(text_dir: Path, corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text, tokenized as the corpus, all of it in the training split."""
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


def test_an_unsplit_corpus_is_dealt_in_halves_by_document(
    config: Config, unsplit_dir: Path, base_dir: Path
) -> None:
    evaluate.run(replace(config, corpus=unsplit_dir, index=None), World())
    evaluation = read_evaluation(config.output)
    corpus = open_corpus(unsplit_dir)
    assert sum(evaluation.tokens.values()) == corpus.num_positions
    assert min(evaluation.tokens.values()) > 32
    scores = read_scores(config.output, "train", "base").astype(np.float64)
    halves = np.array([hash_fraction(f"evaluate:{document['name']}") < 0.5 for document in corpus.documents])
    is_tuning = halves[corpus.documents_of(np.arange(corpus.num_positions))]
    for split, chosen, documents in (("tuning", is_tuning, halves), ("test", ~is_tuning, ~halves)):
        row = evaluation.arms[0].splits[split]
        assert row.ppl == pytest.approx(math.exp(-scores[chosen].mean()))
        num_bytes = sum(
            document["bytes"] for document, mine in zip(corpus.documents, documents, strict=True) if mine
        )
        assert row.bits_per_byte == pytest.approx(-scores[chosen].sum() / math.log(2) / num_bytes)


def test_a_corpus_that_is_dealt_is_refused_to_the_base_that_learned_it(
    config: Config, unsplit_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    model = save_baseline(base_dir, unsplit_dir, tmp_path / "model", kind="base")
    only = {"memory": (), "keys": None, "index": None, "targets": None, "control": ()}
    with pytest.raises(UserError, match="the tuning split is the text that base was made from"):
        evaluate.run(replace(config, corpus=unsplit_dir, model=str(model), **only), World())
    assert not config.output.exists()


def test_the_sums_by_document_give_the_perplexity_of_each_arm(finished: Finished) -> None:
    config, _, evaluation = finished
    for split in ("tuning", "test", "heldout"):
        sums = read_document_sums(config.output, split)
        corpus = open_corpus(config.corpus, split)
        assert sums.positions_M.sum() == corpus.num_positions
        assert len(sums.positions_M) == len(corpus.documents)
        for arm in evaluation.arms:
            ppl = math.exp(-sums.sums[arm.name].sum() / sums.positions_M.sum())
            assert ppl == pytest.approx(arm.splits[split].ppl, rel=1e-12)


def test_choices_of_another_report_are_taken_in_place_of_the_tuning_splits(
    config: Config, finished: Finished
) -> None:
    """A grid that does not hold the chosen λ shows that none was chosen anew."""
    shutil.copytree(finished.config.output, config.output)
    evaluate.run(
        replace(
            config,
            lambdas=("0.99",),
            choices_from=finished.config.output,
            speed_positions=None,
            samples=0,
        ),
        World(),
    )
    for before, after in zip(finished.evaluation.arms, read_evaluation(config.output).arms, strict=True):
        assert (after.lmbda, after.chosen, after.splits) == (before.lmbda, before.chosen, before.splits)
    page = (config.output / "report.md").read_text()
    assert f"from the report `{finished.config.output}`" in page and "λ was chosen on" not in page


def test_a_report_without_the_arm_is_refused_before_anything_is_written(
    config: Config, finished: Finished, artifacts: Path
) -> None:
    config = replace(
        config,
        control=(*config.control, f"base+another={artifacts / 'memory'}"),
        choices_from=finished.config.output,
    )
    with pytest.raises(UserError, match=r"has no choice for the arm base\+another"):
        evaluate.run(config, World())
    assert not config.output.exists()
