"""The harness's tasks and texts; what needs the package itself is skipped where it is not installed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines import lm_eval as engine
from mlpmem_ds.engines.lm_eval import encode_pair, load_tasks, score_tasks
from mlpmem_ds.engines.tokenizer import TextEncoder, open_encoder

from ..joint_models import joint_that_reads_padding
from ..lm_harness import leave_out_its_tasks, needs_harness
from ..toy_tokenizers import KINDS

CONTEXT = 64


def encoder_of(kind: str) -> TextEncoder:
    return open_encoder(KINDS[kind](), label="toy")


@pytest.mark.parametrize("kind", ["byte_level", "begin_and_end", "merged", "word_piece", "of_bytes"])
def test_a_pair_is_one_text_cut_where_its_context_ends(kind: str) -> None:
    encoder = encoder_of(kind)
    before, after = encode_pair(encoder, "the fox", " the")
    assert [before + after] == encoder.encode_prompts(["the fox the"])
    assert [before] == encoder.encode_prompts(["the fox"])
    assert encode_pair(encoder, "the fox ", "the") == (before, after)


def test_a_special_token_in_a_choice_is_text() -> None:
    encoder = encoder_of("begin_and_end")
    _, after = encode_pair(encoder, "a <s>", " b<e>")
    assert encoder.tokenizer.decode(after) == " b<e>" and not encoder.special_ids & {*after}


@pytest.mark.parametrize(("kind", "start"), [("begin_and_end", ["<s>", "<lang>"]), ("byte_level", ["<e>"])])
@pytest.mark.parametrize("context", ["", "  "])
def test_without_a_context_a_choice_follows_the_start_of_a_document(
    kind: str, start: list[str], context: str
) -> None:
    encoder = encoder_of(kind)
    before, after = encode_pair(encoder, context, " the")
    assert encoder.tokenizer.convert_ids_to_tokens(before) == start
    assert [after] == [one.ids for one in encoder.encode([context + " the"])]


def test_a_choice_without_tokens_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"continuation '  ' of a context that ends in 'the' has no tokens"):
        encode_pair(encoder_of("word_piece"), "the", "  ")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=CONTEXT)
    loaded = LlamaForCausalLM(config).eval()
    loaded.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return loaded


@pytest.fixture
def ranking(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """ranking(*records) → a task of the harness that asks them."""

    def write(*records: dict[str, Any], **changes: Any) -> dict[str, Any]:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return {
            "task": "toy",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(path)}},
            "test_split": "validation",
            "fewshot_split": "validation",
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metadata": {"version": 1.0, "same_question": "query"},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            **changes,
        }

    return write


def record(query: str, *choices: str, gold: int = 0) -> dict[str, Any]:
    return {"query": query, "choices": list(choices) or ["a", "b"], "gold": gold}


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The (context, continuation) of each request that is scored."""
    seen: list[tuple[str, str]] = []
    encode = engine.encode_pair

    def pair(encoder: TextEncoder, context: str, continuation: str) -> tuple[list[int], list[int]]:
        seen.append((context, continuation))
        return encode(encoder, context, continuation)

    monkeypatch.setattr(engine, "encode_pair", pair)
    return seen


@needs_harness
def test_texts_stay_as_they_are(
    ranking: Callable[..., dict[str, Any]], model: LlamaForCausalLM, contexts: list[tuple[str, str]]
) -> None:
    """A reader of data sets would make dates of the first, the harness a number of the second."""
    tasks = load_tasks(
        [ranking(record("2020-01-01", "2021-01-01 00:00:00", "1"), record("42", "a\u2028b", "<e>"))]
    )
    score_tasks(model, encoder_of("begin_and_end"), tasks, batch_size=2, context=CONTEXT)
    assert contexts == [
        ("2020-01-01", " 2021-01-01 00:00:00"),
        ("2020-01-01", " 1"),
        ("42", " a\u2028b"),
        ("42", " <e>"),
    ]


@needs_harness
def test_examples_are_other_questions_and_must_be_enough(
    ranking: Callable[..., dict[str, Any]], model: LlamaForCausalLM, contexts: list[tuple[str, str]]
) -> None:
    """ "one" is asked twice, with other choices: neither is an example of the other."""
    records = [record("one"), record("one", "x", "y"), record("two"), record("three")]
    encoder = encoder_of("byte_level")
    found = [
        score_tasks(
            model, encoder, load_tasks([ranking(*records)], num_fewshot=2), batch_size=3, context=CONTEXT
        )
        for _ in range(2)
    ]
    assert found[0] == found[1] and len(contexts) == 16
    for context, _ in contexts:
        *examples, question = context.split("\n\n")
        assert len(examples) == 2 and not [text for text in examples if text.startswith(question)]
    with pytest.raises(UserError, match="toy: --num-fewshot 4 examples, and it has 3 besides the question"):
        load_tasks([ranking(*records)], num_fewshot=4)


@needs_harness
def test_long_contexts_are_cut_and_counted_and_long_choices_refused(
    ranking: Callable[..., dict[str, Any]], model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of("byte_level")
    tasks = load_tasks([ranking(record("x" * 60, "xxxxx", "y"), record("a", "b", "c"))])
    score_tasks(model, encoder, tasks, batch_size=2, context=CONTEXT)
    assert "1 of 4 texts were longer than the 64 tokens that the model reads" in caplog.text
    tasks = load_tasks([ranking(record("a", "b", "x" * 80))])
    with pytest.raises(UserError, match="a choice has 81 tokens, and the model reads 64"):
        score_tasks(model, encoder, tasks, batch_size=2, context=CONTEXT)


@needs_harness
def test_a_context_that_is_cut_keeps_its_begin_tokens(
    ranking: Callable[..., dict[str, Any]], model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    forward = model.forward

    def seen(ids: torch.Tensor, **more: Any) -> Any:
        read.extend(ids.tolist())
        return forward(ids, **more)

    monkeypatch.setattr(model, "forward", seen)
    encoder = encoder_of("begin_and_end")
    tasks = load_tasks([ranking(record("x" * 90, "aa", "bbb"))])
    score_tasks(model, encoder, tasks, batch_size=2, context=CONTEXT)
    x = encoder.tokenizer.convert_tokens_to_ids("x")
    begin = list(encoder.begin_ids)
    assert {len(row) for row in read} == {CONTEXT}
    assert all(row[:3] == [*begin, x] for row in read)


@needs_harness
def test_what_is_scored_is_the_probability_of_the_tokens(
    ranking: Callable[..., dict[str, Any]], model: LlamaForCausalLM
) -> None:
    encoder = encoder_of("begin_and_end")  # it puts an end token after a text, which no choice has
    records = [record("the fox", "a", "again and again", "b", gold=number % 3) for number in range(3)]
    found = score_tasks(model, encoder, load_tasks([ranking(*records)]), batch_size=2, context=CONTEXT)
    scores = []
    for choice in records[0]["choices"]:
        before, after = encode_pair(encoder, "the fox", f" {choice}")
        with torch.no_grad():
            log_SV = (
                model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
            )
        scores.append(float(log_SV.gather(1, torch.tensor(after)[:, None]).sum()))
    best = scores.index(max(scores))
    assert found["toy"]["acc,none"] == sum(one["gold"] == best for one in records) / 3


@needs_harness
@pytest.mark.parametrize("way", ["max_gen_toks", "questions"])
def test_answers_end_at_every_end_token(
    way: str, ranking: Callable[..., dict[str, Any]], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    more = {
        "output_type": "generate_until",
        "generation_kwargs": {
            "until": ["\n"],
            "do_sample": False,
            "max_gen_toks": 99 if way == "max_gen_toks" else 8,
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    task = ranking(
        {"query": "the fox", "choices": ["a"], "gold": "x"},
        {"query": "a", "choices": [], "gold": "y"},
        **more,
    )
    task.pop("doc_to_choice")
    tasks = load_tasks([task])
    if way == "max_gen_toks":
        with pytest.raises(UserError, match="toy asks for answers of 99 tokens, and the model reads 64"):
            score_tasks(model, encoder_of("byte_level"), tasks, batch_size=2, context=CONTEXT)
    else:
        found = score_tasks(model, encoder_of("byte_level"), tasks, batch_size=2, context=CONTEXT)
        assert found["toy"]["exact_match,none"] == 0


@needs_harness
def test_a_base_that_would_read_the_padding_has_none(
    ranking: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of("byte_level")
    joint = joint_that_reads_padding(encoder.vocab_size)
    task = ranking(
        *({"query": query, "gold": "x"} for query in ("the fox", "a", "the cat the dog")),
        output_type="generate_until",
        generation_kwargs={"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    task.pop("doc_to_choice")
    lengths: list[int] = []
    generate = joint.generate

    def counted(*args: Any, **settings: Any) -> Any:
        lengths.append(int(settings["attention_mask"].sum(1).min()))
        assert bool(settings["attention_mask"].all())
        return generate(*args, **settings)

    monkeypatch.setattr(joint, "generate", counted)
    score_tasks(joint, encoder, load_tasks([task]), batch_size=2, context=CONTEXT)
    assert len(lengths) == len(set(lengths)) == 3


@needs_harness
def test_data_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(**_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    leave_out_its_tasks(monkeypatch, tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: nobody/nothing-of-this-name\noutput_type: generate_until\n"
        "test_split: test\ndoc_to_text: q\ndoc_to_target: a\n"
    )
    said = r"--tasks mine cannot be loaded \(no network\): .* --questions and --ranking fetch nothing"
    with pytest.raises(UserError, match=said):
        load_tasks(["mine"], include_path=tmp_path)


@needs_harness
def test_an_unknown_name_is_told_from_those_of_the_harness() -> None:
    with pytest.raises(UserError, match="the harness has no task no_such_task: `lm_eval ls tasks` lists"):
        load_tasks(["piqa", "no_such_task"])


@needs_harness
def test_the_files_of_the_harness_are_not_read_for_tasks_that_are_loaded(
    ranking: Callable[..., dict[str, Any]], model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import _index

    tasks = load_tasks([ranking(record("a"))])
    monkeypatch.setattr(_index, "load_yaml", lambda path, **_: pytest.fail(f"{path} is read"))
    score_tasks(model, encoder_of("byte_level"), tasks, batch_size=2, context=CONTEXT)


@needs_harness
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "output_type": "generate_until",
            "doc_to_choice": None,
            "doc_to_target": "query",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 2},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ],
)
def test_an_overflow_is_no_score(
    changes: dict[str, Any], ranking: Callable[..., dict[str, Any]], model: LlamaForCausalLM
) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.lm_head.weight.fill_(torch.inf)
    tasks = load_tasks([ranking(record("one"), record("two"), **changes)])
    with pytest.raises(UserError, match="of the model are not finite: its weights are damaged, or --dtype"):
        score_tasks(damaged, encoder_of("byte_level"), tasks, batch_size=2, context=CONTEXT)
