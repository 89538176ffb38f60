"""Every λ from one forward pass is what the model says by itself at that λ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.lm_eval import encode_pair
from mlpmem_ds.engines.tokenizer import open_encoder
from mlpmem_ds.models.gates import ConfidencesGate
from mlpmem_ds.models.hf import MemoryAugmentedLM, load_memory
from mlpmem_ds.models.mixture import Constant, Weights
from mlpmem_ds.stages.harness.grid_scores import Weighting, score_continuations
from mlpmem_ds.stages.questions.answering import Answerer
from mlpmem_ds.stages.questions.arms import ready_answerer

from .conftest import WORDS

LAMBDAS = (0.0, 0.3, 1.0)
CONTINUATIONS = [" alpha", " in range gamma", " é é value index", " beta"]
_MIXER = {"mamba_d_state": 4, "head_dim": 8}
WITHOUT_SHARED_CACHES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},  # `cache_params`
    "rwkv": {"attention_hidden_size": 32},  # `state`
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8, "num_hidden_layers": 3},  # in its modules
    # Its states are read for one new token alone.
    "jamba": {**_MIXER, "attn_layer_period": 2, "attn_layer_offset": 1},
    # Keys and values alone are repeated.
    "falcon_h1": {**_MIXER, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    # A cache of its own.
    "minimax": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
}


def answerer_of(export_dir: Path, model: Any) -> Answerer:
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    return ready_answerer(model.eval(), open_encoder(tokenizer, label="toy"))


def expected(answerer: Answerer, gate: Any, context: str, text: str) -> tuple[float, bool]:
    """By a plain forward of the whole text, in float64."""
    model = answerer.model
    before, after = encode_pair(answerer.encoder, context, text)
    if gate is not None:
        model.set_gate(gate)
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].double()
    logs = logits.log_softmax(-1)
    ids = torch.tensor(after)
    return float(logs.gather(1, ids[:, None]).sum()), bool((logs.argmax(-1) == ids).all())


@pytest.mark.parametrize("context", ["for value in", ""])
def test_each_weight_is_what_the_model_itself_says(export_dir: Path, context: str) -> None:
    model = MemoryAugmentedLM.from_pretrained(export_dir)
    answerer = answerer_of(export_dir, model)
    gate = ConfidencesGate(lmbdas=(0.3,), hidden=4)
    torch.manual_seed(1)
    for values in gate.parameters():
        torch.nn.init.normal_(values)
    model.set_gate(gate)
    found = score_continuations(
        answerer, context, CONTINUATIONS, Weighting(lambdas=LAMBDAS, gate=gate), with_greedy=True
    )
    assert model.gate is gate and model.lmbda == pytest.approx(0.35)
    model.lmbda = 0.9  # the weighting says which gate is meant, not what the model was left with
    again = score_continuations(
        answerer, context, CONTINUATIONS, Weighting(lambdas=LAMBDAS, gate=gate), with_greedy=True
    )
    assert again == found and model.lmbda == 0.9
    for text, one in zip(CONTINUATIONS, found, strict=True):
        for place, weight in enumerate((*map(Constant, LAMBDAS), gate)):
            log, is_greedy = expected(answerer, weight, context, text)
            assert one.log_probabilities[place] == pytest.approx(log, abs=1e-4)
            assert one.is_greedy[place] == is_greedy


def test_the_likeliest_token_is_found_at_each_weight(export_dir: Path) -> None:
    model = MemoryAugmentedLM.from_pretrained(export_dir)
    answerer = answerer_of(export_dir, model)
    texts = [f" {word}" for word in (*WORDS, "in", "for", "x", "é")]
    texts = [text for text in texts if len(encode_pair(answerer.encoder, "for", text)[1]) == 1]
    ids = [encode_pair(answerer.encoder, "for", text)[1][0] for text in texts]
    head = model.base.get_output_embeddings()
    assert len(ids) > 2
    before = torch.tensor([encode_pair(answerer.encoder, "for", texts[0])[0]])
    model.lmbda = 0.0
    with torch.no_grad():
        hidden_H = model.base.transformer(before).last_hidden_state[0, -1]
        head.weight[ids[1]] += 50 * hidden_H / hidden_H.square().sum()  # its logit grows by 50
    scored = score_continuations(answerer, "for", texts, Weighting(lambdas=(0.0, 1.0)), with_greedy=True)
    assert [one.is_greedy[0] for one in scored] == [number == 1 for number in range(len(texts))]
    model.lmbda = 1.0
    with torch.no_grad():
        likeliest = int(model(before).logits[0, -1].argmax())
    assert [one.is_greedy[1] for one in scored] == [token == likeliest for token in ids]


def plain_model(family: str, **sizes: Any) -> Any:
    """A tiny model of random weights, with the vocabulary of the export's tokenizer."""
    common = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**common, **sizes}))
    with torch.no_grad():
        for values in model.parameters():
            if values.dim() > 1:
                torch.nn.init.normal_(values, std=0.2)
    return model


@pytest.mark.parametrize("family", WITHOUT_SHARED_CACHES)
@pytest.mark.parametrize("texts", [CONTINUATIONS, CONTINUATIONS[1:2]])
def test_a_model_whose_cache_is_no_keys_and_values_reads_the_whole_context(
    export_dir: Path, family: str, texts: list[str]
) -> None:
    answerer = answerer_of(export_dir, plain_model(family, **WITHOUT_SHARED_CACHES[family]))
    found = score_continuations(answerer, "for value in", texts, Weighting(), with_greedy=True)
    for text, one in zip(texts, found, strict=True):
        log, is_greedy = expected(answerer, None, "for value in", text)
        assert one.log_probabilities == (pytest.approx(log, abs=1e-4),)
        assert one.is_greedy == (is_greedy,)


def test_a_context_is_read_once_where_keys_and_values_are_all(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = []
    repeat = DynamicCache.batch_repeat_interleave
    monkeypatch.setattr(
        DynamicCache,
        "batch_repeat_interleave",
        lambda cache, times: repeated.append(times) or repeat(cache, times),
    )
    sliding = plain_model("gemma3_text", head_dim=8, sliding_window=4, layer_types=["sliding_attention"] * 2)
    for model in (MemoryAugmentedLM.from_pretrained(export_dir), plain_model("llama"), sliding):
        answerer = answerer_of(export_dir, model)
        found = score_continuations(answerer, "for value in", CONTINUATIONS, Weighting())
        for text, one in zip(CONTINUATIONS, found, strict=True):
            gate = Constant(0.0) if isinstance(model, MemoryAugmentedLM) else None
            log, _ = expected(answerer, gate, "for value in", text)
            assert one.log_probabilities[0] == pytest.approx(log, abs=1e-4)
    assert repeated == [len(CONTINUATIONS)] * 3


def test_memories_of_a_bank_share_the_weight(export_dir: Path) -> None:
    one = load_memory(export_dir)
    model = MemoryAugmentedLM.from_pretrained(export_dir)
    with torch.no_grad():
        other = load_memory(export_dir)
        for values in other.module.parameters():
            values.mul_(1.5)
    bank = MemoryAugmentedLM.join(model.base, [one, other])
    answerer = answerer_of(export_dir, bank)
    [found] = score_continuations(answerer, "for value", [" in range"], Weighting(lambdas=(0.6,)))
    log, _ = expected(answerer, Weights((0.3, 0.3)), "for value", " in range")
    assert found.log_probabilities[0] == pytest.approx(log, abs=1e-4)


def test_a_long_context_loses_its_beginning(export_dir: Path) -> None:
    model = MemoryAugmentedLM.from_pretrained(export_dir)
    answerer = replace(answerer_of(export_dir, model), context=12)
    before, after = encode_pair(answerer.encoder, "alpha beta gamma " * 8, " in")
    ids = before[len(after) - 12 :] + after
    for text, is_cut in (("for", False), ("for " * 20, True)):
        [one] = score_continuations(answerer, text, [" in"], Weighting())
        assert one.is_cut == is_cut
    with pytest.raises(UserError, match="a choice has .* tokens, and the model reads 12 with the question"):
        score_continuations(answerer, "for", [" in", " é" * 30], Weighting())
    [found] = score_continuations(answerer, "alpha beta gamma " * 8, [" in"], Weighting(lambdas=(0.0, 0.5)))
    for weight, log in zip((0.0, 0.5), found.log_probabilities, strict=True):
        model.lmbda = weight
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, -len(after) - 1 : -1].log_softmax(-1)
        assert log == pytest.approx(float(logs.gather(1, torch.tensor(after)[:, None]).sum()), abs=1e-4)


def test_an_overflow_of_either_is_refused(export_dir: Path) -> None:
    said = "log-probabilities of {} are not finite: its weights are damaged, or --dtype float32 is needed"
    model = MemoryAugmentedLM.from_pretrained(export_dir)
    answerer = answerer_of(export_dir, model)
    with torch.no_grad():
        model.memory.head.weight.fill_(torch.inf)
    with pytest.raises(UserError, match=said.format("a memory")):
        score_continuations(answerer, "for value", CONTINUATIONS, Weighting())
    with torch.no_grad():
        model.base.get_output_embeddings().weight.fill_(torch.inf)
    with pytest.raises(UserError, match=said.format("the base")):
        score_continuations(answerer, "for value", CONTINUATIONS, Weighting())
