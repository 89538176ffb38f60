"""Baselines of a memory: each kind learns, resumes to the same bytes, is a plain model at the end."""

import math
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mlpmem_ds.core.config import parse_config
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.stages.baseline.config import Config

from ...conftest import with_two_ids_swapped

VOCAB_SIZE = 300
FLAGS = {"batch_tokens": 256, "epochs": 2, "log_every_steps": 1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama with tied embeddings and grouped heads, stored in bfloat16."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    path = tmp_path_factory.mktemp("llama") / "base"
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def runs(make_runs, corpus_dir, llama):
    return make_runs({**FLAGS, "corpus": corpus_dir, "model": llama}, stage="train_baseline")


def perplexity(path, corpus_dir):
    """Of a plain model directory, on the tuning split, token by token."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    corpus, total = open_corpus(corpus_dir, "tuning"), 0.0
    for window in corpus.windows():
        tokens = torch.from_numpy(corpus.tokens(window.context_start, window.stop + 1))
        logs = torch.log_softmax(model(tokens[None, :-1]).logits[0].double(), dim=1)
        scores = logs.gather(1, tokens[1:, None])[:, 0]
        total += float(scores[window.start - window.context_start :].sum())
    return math.exp(-total / corpus.num_positions)


@pytest.mark.parametrize("ds_config", ["float32", "bf16"])
def test_training_on_gives_a_better_plain_model(runs, corpus_dir, llama, ds_config):
    name, is_bf16 = f"continued-{ds_config}", ds_config == "bf16"
    job = {"kind": "continued", "learning_rate": 0.01}
    (said,) = runs.succeed(runs.start(name, runs.ds_config(1, bf16=is_bf16), **job))
    assert "all weights of the base" in said
    manifest, found = runs.manifest(name), runs.perplexities(name)
    assert manifest["format"] == "mlpmem-baseline" and manifest["kind"] == "continued"
    assert manifest["parameters"] == manifest["parameters_trained"] and manifest["rank"] is None
    assert len(found) > manifest["training"]["steps"] / len(found) >= 1  # several times an epoch
    tolerance = 0.02 if is_bf16 else 1e-5  # validation rounds the weights too
    assert perplexity(runs / name, corpus_dir) == pytest.approx(min(found), rel=tolerance)
    assert min(found) < 0.8 * perplexity(llama, corpus_dir)


def test_a_stopped_run_continues_and_two_ranks_are_one(runs):
    job = {"kind": "continued", "learning_rate": 0.01}
    straight, stopped, again, two = (
        runs.start(name, 2, **job, **more)
        for name, more in (
            ("straight", {}),
            ("stopped", {"signal_at": 3}),
            ("stopped", {}),
            ("two", {"size": 2}),
        )
    )
    runs.succeed(straight, stopped, again, two)
    runs.assert_same_bytes("straight", "stopped")
    np.testing.assert_allclose(runs.perplexities("two"), runs.perplexities("straight"), rtol=1e-4)


@pytest.fixture(scope="module")
def low_rank(runs):
    """Low-rank trainings, and what they said."""
    pytest.importorskip("peft", reason="LoRA is trained with the optional package peft")
    job = {"kind": "lora", "match_parameters": 6000, "lora_alpha": 8.0, "learning_rate": 0.02}
    return "".join(
        runs.succeed(
            runs.start("lora", 2, **job),
            runs.start("lora-stopped", 2, signal_at=3, save_every_steps=2, **job),
            runs.start("lora-stopped", 2, **job),
            runs.start("lora-two", 2, size=2, **job),
            runs.start("lora-moved", 2, signal_at=3, **job),
            runs.start("lora-moved", 1, size=2, **job),
            runs.start("lora-bf16", runs.ds_config(1, bf16=True), **job),
        )
    )


def test_low_rank_matrices_are_merged_into_a_plain_model(runs, corpus_dir, llama, low_rank):
    import peft

    manifest, found = runs.manifest("lora"), runs.perplexities("lora")
    # A rank adds the inputs and outputs of q, k, v, o, gate, up and down in each of two layers.
    each = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert manifest["rank"] == round(6000 / each) == 6
    assert manifest["parameters_trained"] == 6 * each and manifest["parameters_matched"] == 6000
    assert f"matrices of rank 6 next to the base's linear layers: {6 * each:,} parameters trained" in low_rank
    assert perplexity(runs / "lora", corpus_dir) == pytest.approx(min(found), rel=1e-4)
    assert min(found) < 0.9 * perplexity(llama, corpus_dir)
    merged, base = (load_file(path / "model.safetensors") for path in (runs / "lora", llama))
    assert merged.keys() == base.keys()  # no lora_A, and the tied head once
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"].float())
    again = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(again, runs / "lora" / "adapter").merge_and_unload()
    torch.testing.assert_close(
        adapted.state_dict()["model.layers.0.mlp.up_proj.weight"], merged["model.layers.0.mlp.up_proj.weight"]
    )


def test_low_rank_training_resumes_and_keeps_nothing_of_the_base(runs, low_rank):
    runs.assert_same_bytes("lora", "lora-stopped")
    for name in ("lora-two", "lora-moved", "lora-bf16"):
        tolerance = 0.05 if name == "lora-bf16" else 1e-4
        np.testing.assert_allclose(runs.perplexities(name), runs.perplexities("lora"), rtol=tolerance)
    (weights,) = (runs / "lora" / "best").glob("step-*.safetensors")
    assert all("lora_" in name for name in load_file(weights))
    trained = runs.manifest("lora")["parameters_trained"]
    newest = sorted((runs / "lora" / "checkpoints").glob("step-*"))[-1]
    num_bytes = sum(path.stat().st_size for path in newest.rglob("*.pt"))
    assert num_bytes < 20 * trained + 200_000  # weights, masters and moments of A and B; file headers


def test_a_bigger_model_has_the_size_of_base_and_memory(runs, corpus_dir, llama):
    job = {"kind": "bigger", "match_parameters": 15_000, "learning_rate": 0.01}
    (said,) = runs.succeed(runs.start("bigger", 2, **job))
    base = AutoModelForCausalLM.from_pretrained(llama).num_parameters()
    manifest = runs.manifest("bigger")
    assert manifest["parameters"] == pytest.approx(base + 15_000, rel=0.05)
    assert manifest["parameters_trained"] == manifest["parameters"]
    model = AutoModelForCausalLM.from_pretrained(runs / "bigger")
    assert model.num_parameters() == manifest["parameters"] and "a new model of the base's family" in said
    assert isinstance(model, LlamaForCausalLM) and model.config.tie_word_embeddings
    assert runs.perplexities("bigger")[-1] < VOCAB_SIZE
    assert perplexity(runs / "bigger", corpus_dir) == pytest.approx(
        min(runs.perplexities("bigger")), rel=1e-5
    )


def test_steps_and_the_default_rates(runs):
    kinds = {"continued": ({}, 1e-4), "bigger": ({"match_parameters": 12_000}, 2e-3)}
    runs.succeed(
        *(runs.start(f"steps-{kind}", 2, kind=kind, steps=3, **more) for kind, (more, _) in kinds.items())
    )
    for kind, (_, rate) in kinds.items():
        manifest = runs.manifest(f"steps-{kind}")
        assert manifest["training"]["steps"] == 3
        assert manifest["config"]["learning_rate"] == rate


def test_a_killed_start_changes_no_byte(runs):
    job = {"kind": "continued", "learning_rate": 0.01, "save_every_steps": 2}
    results, said = runs.run(
        runs.start("killed", 2, **job, kill_at=5),
        runs.start("killed", 2, **job),
        runs.start("whole", 2, **job),
    )
    assert results == [[-signal.SIGKILL], [0], [0]], "".join(said)
    runs.assert_same_bytes("killed", "whole")


@pytest.mark.parametrize(
    "words, said",
    [
        ("--kind continued --rank 3", "--kind continued trains the weights that there are: leave out --rank"),
        ("--kind lora", "--kind lora needs its size"),
        ("--kind lora --rank 3 --match-parameters 9", "needs its size.*not --match-parameters and --rank"),
        ("--kind bigger --rank 3", "--rank is of --kind lora"),
        ("--kind continued --lora-alpha 3", "--lora-alpha is of --kind lora: add that, or leave it out"),
        (
            "--kind bigger",
            "--kind bigger needs its size: give one of --match-memory, --match-parameters, not",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        parse_config(
            Config, [*words.split(), "--model", "m", "--corpus", "c", "--output", "o"], prog="train_baseline"
        )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": "/nowhere/at/all"}, "nowhere"),
        ({"kind": "lora", "match_parameters": 10}, "matrices of rank 1 next to all linear layers have 928"),
        ({"kind": "lora", "match_memory": "/nowhere"}, "--match-memory /nowhere"),
    ],
)
def test_wrong_inputs_leave_the_disk_untouched(runs, changes, said):
    if changes.get("kind") == "lora":
        pytest.importorskip("peft", reason="LoRA is trained with the optional package peft")
    runs.refuse(said, "wrong", **{"ds_config": 2, "kind": "continued", **changes})


@pytest.mark.parametrize(
    "shape, changes, said",
    [
        ({"n_positions": 16}, {}, "blocks of 32 tokens, the model reads at most 16 .--model"),
        ({"n_positions": 16}, {"context": 8}, "blocks of 32 tokens"),  # the tuning split is read in blocks
        ({"n_positions": 32}, {"context": 33}, "--context 33 is more than the 32 tokens"),
        ({"vocab_size": 100}, {}, "--model .* has rows for 100 tokens, and the train split .* holds token 2"),
        ({"swap": True}, {}, "--model .* has another vocabulary than the corpus.*model's own tokenizer"),
    ],
)
def test_a_model_that_cannot_read_the_corpus_is_refused(runs, corpus_dir, tmp_path, shape, changes, said):
    values = {"vocab_size": VOCAB_SIZE, "n_positions": 64, **shape}
    if values.pop("swap", False):
        with_two_ids_swapped(corpus_dir / "tokenizer" / "tokenizer.json", tmp_path / "tokenizer.json")
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0, **values)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    runs.refuse(said, "wrong", 2, kind="continued", model=tmp_path, **changes)
