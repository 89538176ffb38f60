"""Conversations through the stages: answers alone are stored, imitated, learnt and scored."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.formats.corpus import open_corpus, read_corpus_manifest
from mlpmem_ds.formats.counted_rows import CountedRows
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.mapped_tokens import MappedTokens
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.base.objective import NextTokenModule
from mlpmem_ds.stages.base.validation import BaseValidator
from mlpmem_ds.stages.corpus import prepare_corpus
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.splits import open_splits
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.targets import write_targets
from mlpmem_ds.stages.training.memory_validation import MemoryValidator

from .test_prepare_corpus import config_of, result_of

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}\n{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
NUM_CHATS = 60


@pytest.fixture(scope="module")
def chats(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of conversations of one to three turns, and a tokenizer with a template."""
    root = tmp_path_factory.mktemp("chats")
    chosen = random.Random(3)
    words = ["list", "of", "numbers", "return", "value", "string", "the", "error", "if", "name"]
    lines = []
    for number in range(NUM_CHATS):
        messages = []
        for turn in range(chosen.randint(1, 3)):
            asked = " ".join(chosen.choices(words, k=chosen.randint(3, 9)))
            answered = " ".join(chosen.choices(words, k=chosen.randint(2, 12)))
            messages.append({"role": "user", "content": f"{asked}, {number}.{turn}?"})
            messages.append({"role": "assistant", "content": f"{answered}."})
        lines.append({"messages": messages})
    lines.insert(7, {"messages": [{"role": "user", "content": "no answer"}]})
    (root / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = AutoTokenizer.from_pretrained(corpus_dir / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "tokenizer")
    return root


def chat_config(chats: Path, output: Path, **changes: Any) -> prepare_corpus.Config:
    return replace(
        config_of(chats / "chats.jsonl", output, documents="chat", tokenizer=str(chats / "tokenizer")),
        **{"heldout_fraction": 0.0, **changes},
    )


@pytest.fixture(scope="module")
def answers_dir(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("answers") / "corpus"
    prepare_corpus.run(chat_config(chats, output), World())
    return output


def test_marks_are_of_the_answers(chats: Path, answers_dir: Path) -> None:
    manifest = read_corpus_manifest(answers_dir)
    assert manifest.counts == "answers" and manifest.left_out == {"no answer": 1}
    tokenizer = AutoTokenizer.from_pretrained(answers_dir / "tokenizer")
    assert tokenizer.chat_template == TEMPLATE
    conversations = {
        f"chats.jsonl:{number}": json.loads(line)["messages"]
        for number, line in enumerate((chats / "chats.jsonl").read_text().splitlines(), start=1)
    }
    corpus = open_corpus(answers_dir)
    start = 0
    for document, stop in zip(corpus.documents, corpus.document_stops.tolist(), strict=True):
        messages = conversations[document["name"]]
        tokens, is_answer = corpus.tokens(start, stop), corpus.is_answer(start, stop)
        said = [turn["content"] for turn in messages if turn["role"] == "assistant"]
        assert tokenizer.decode(tokens[is_answer]) == "".join(f"{text}<|endoftext|>" for text in said)
        assert document["answers"] == is_answer.sum()
        assert document["answer_bytes"] == sum(map(len, said))
        start = stop
    assert corpus.num_counted == corpus.counted(0, corpus.num_positions).sum()
    assert corpus.num_bytes == sum(document["answer_bytes"] for document in corpus.documents)


def test_ranks_processes_and_all_tokens_give_the_same_stream(
    chats: Path, answers_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (0, 1):
        prepare_corpus.run(chat_config(chats, tmp_path / "two"), World(rank=rank, size=2))
    prepare_corpus.run(chat_config(chats, tmp_path / "processes", processes=2), World())
    expected = result_of(answers_dir)
    assert result_of(tmp_path / "two") == expected == result_of(tmp_path / "processes")
    prepare_corpus.run(chat_config(chats, tmp_path / "all", train_on="all"), World())
    whole = open_corpus(tmp_path / "all")
    assert not whole.has_answers and whole.num_counted == whole.num_positions
    assert np.array_equal(
        whole.tokens(0, whole.num_tokens), open_corpus(answers_dir).tokens(0, whole.num_tokens)
    )


def test_what_cannot_be_a_corpus_of_chats_is_told(
    chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="--documents chat needs a tokenizer that has the special tokens"):
        chat_config(chats, tmp_path / "x", tokenizer="train:300")
    with pytest.raises(UserError, match="--chat-template is of --documents chat: add that, or leave it out"):
        chat_config(chats, tmp_path / "x", documents="text", chat_template=chats / "x.jinja")
    with pytest.raises(UserError, match="--cut-documents is of --documents text: add that, or leave it out"):
        chat_config(chats, tmp_path / "x", cut_documents=500)
    prepare_corpus.run(chat_config(chats, tmp_path / "named", text_field="content"), World())
    assert "--text-field is not used: --documents is chat" in caplog.text
    with pytest.raises(UserError, match="--strict.*the assistant says nothing: 1"):
        prepare_corpus.run(chat_config(chats, tmp_path / "x", strict=True), World())
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def answer_keys(answers_dir: Path, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("answer-keys") / "keys"
    extract_keys.run(key_config(answers_dir, base_dir, output), World())
    return output


def key_config(corpus: Path, base: Path, output: Path, **changes: Any) -> extract_keys.Config:
    return replace(
        extract_keys.Config(
            model=str(base), corpus=corpus, output=output, unit_positions=64, codec="raw", batch_windows=3
        ),
        **changes,
    )


def test_keys_are_those_of_the_answers(
    chats: Path, answers_dir: Path, answer_keys: Path, base_dir: Path, tmp_path: Path
) -> None:
    """Row by row what extraction of all positions gives at theirs; on one rank and on two."""
    prepare_corpus.run(chat_config(chats, tmp_path / "all", train_on="all"), World())
    extract_keys.run(key_config(tmp_path / "all", base_dir, tmp_path / "all-keys"), World())
    corpus, found, whole = open_corpus(answers_dir), open_keys(answer_keys), open_keys(tmp_path / "all-keys")
    positions_n = np.flatnonzero(corpus.counted(0, corpus.num_positions))
    assert found.manifest.counts == "answers" and found.num_positions == len(positions_n)
    assert np.array_equal(found.read("positions"), positions_n)
    assert np.array_equal(found.read("values"), corpus.values(0, corpus.num_positions)[positions_n])
    for array in ("keys", "log_probabilities"):
        stored, expected = found.read(array), whole.gather(array, positions_n)
        assert np.allclose(stored.astype(np.float64), expected.astype(np.float64), atol=2e-3)
    apart = found.read_inputs() != whole.gather_inputs(positions_n)
    assert apart.mean() < 1e-3, "bit patterns, but for a last bit"
    for rank in (0, 1):
        extract_keys.run(key_config(answers_dir, base_dir, tmp_path / "two"), World(rank=rank, size=2))
    assert result_of(tmp_path / "two") == result_of(answer_keys)


def test_an_audit_of_whole_texts_is_refused(answers_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--audit compares positions of the whole text"):
        extract_keys.run(key_config(answers_dir, base_dir, tmp_path / "keys", audit=16), World())


def test_targets_are_over_answers_and_leave_out_their_document(
    answers_dir: Path, answer_keys: Path, tmp_path: Path
) -> None:
    config = write_targets.Config(
        keys=answer_keys, output=tmp_path / "targets", k=8, temperature="10", mass=1.0,
        exclude="same-document", corpus=answers_dir,
    )  # fmt: skip
    write_targets.run(config, World())
    keys, corpus = open_keys(answer_keys), open_corpus(answers_dir)
    targets = open_targets(tmp_path / "targets")
    assert targets.manifest.num_positions == keys.num_positions
    vectors_ND = keys.read("keys").astype(np.float64)
    document_N = corpus.documents_of(keys.read("positions"))
    distances_NN = ((vectors_ND[:, None] - vectors_ND[None]) ** 2).sum(-1)
    distances_NN[document_N[:, None] == document_N[None]] = np.inf
    values_N = keys.read("values")
    rows = targets.read_all()
    for row in range(0, keys.num_positions, 17):
        nearest = np.argsort(distances_NN[row], kind="stable")[:8]
        ids = rows.ids[rows.offsets[row] : rows.offsets[row + 1]]
        assert set(ids.tolist()) == set(values_N[nearest].tolist())


def test_validation_and_evaluation_see_answers_alone(answers_dir: Path, base_dir: Path) -> None:
    splits = open_splits(
        answers_dir, tuning="tuning", test="test", extra=(), is_extra_requested=False, min_positions=2
    )
    for name, split in splits.items():
        corpus = open_corpus(answers_dir, name)
        assert split.positions is not None
        assert np.array_equal(split.positions, np.flatnonzero(corpus.counted(0, corpus.num_positions)))
        assert split.num_bytes == sum(document["answer_bytes"] for document in corpus.documents)
    tuning = open_corpus(answers_dir, "tuning")
    source = TransformersSource(str(base_dir), dtype="float32")
    validator = MemoryValidator(
        source, tuning, CapturePoint(layer=1), positions=tuning.num_positions, world=World()
    )
    assert validator.num_positions == tuning.num_counted
    assert validator.base_perplexity() == pytest.approx(np.exp(-validator._base_N.mean()), rel=1e-9)
    labels_N = tuning.values(0, tuning.num_positions)[tuning.counted(0, tuning.num_positions)]
    assert torch.equal(validator._labels_N, torch.from_numpy(labels_N))
    engine = SimpleNamespace(
        module=NextTokenModule(GPT2LMHeadModel.from_pretrained(base_dir).eval()),
        device=torch.device("cpu"),
        evaluating=contextlib.nullcontext,
    )
    found = BaseValidator(tuning, World()).run(engine, 0)  # type: ignore[arg-type]
    assert found.perplexity == pytest.approx(np.exp(-validator._base_N.mean()), rel=1e-5)


def test_windows_without_an_answer_are_refused(
    answers_dir: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountedRows, "offsets", lambda rows, positions: np.empty(0, np.int64))
    source = TransformersSource(str(base_dir), dtype="float32")
    with pytest.raises(UserError, match="--validation-positions 5: .* hold no answer: give more positions"):
        MemoryValidator(
            source, open_corpus(answers_dir, "tuning"), CapturePoint(layer=1), positions=5, world=World()
        )


def test_a_language_model_learns_answers_alone(answers_dir: Path) -> None:
    corpus = open_corpus(answers_dir)
    tokens = MappedTokens(corpus)[np.arange(corpus.num_tokens)]
    is_answer = corpus.is_answer(0, corpus.num_tokens)
    assert np.array_equal(tokens >= 0, is_answer)
    assert np.array_equal(np.where(tokens < 0, ~tokens, tokens), corpus.tokens(0, corpus.num_tokens))


def test_a_flipped_mark_is_refused_before_a_score_is_written(
    answers_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(answers_dir, corpus)
    path = corpus / open_corpus(corpus, "test").answer_files[0]
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    config = evaluate.Config(model=str(base_dir), corpus=corpus, output=tmp_path / "report")
    with pytest.raises(DamagedDataError, match="answers-.*checksum"):
        evaluate.run(config, World())
    assert not list(config.output.rglob("*.npy"))
