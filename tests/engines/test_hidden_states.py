"""The forward pass over a corpus: unmasked, the same from a base that is spread out, exact
log-probabilities."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines import hidden_states
from mlpmem_ds.engines.hidden_states import TransformersSource, masks_of_layers, scan_positions
from mlpmem_ds.engines.host_copies import HostCopies
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.maths.head_scores import label_log_probabilities
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.structure import decoder_layers

from ..conftest import with_begin_tokens

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 64},
    "qwen2": SIZES,
    "qwen3": SIZES,
    "gemma2": SIZES | {"sliding_window": 64},
    "gemma3_text": SIZES | {"sliding_window": 64},
    "phi3": SIZES,
    "gpt_neox": SIZES,
    "opt": SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "mixtral": SIZES | {"num_local_experts": 3},
    "qwen3_moe": SIZES | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}
POINTS = {"key": CapturePoint(layer=1), "input": CapturePoint(layer=0, point="layer_output")}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_windows_are_read_without_a_mask_and_scored_as_the_model_scores(
    family: str, tmp_path: Path, save_model: Any
) -> None:
    path = save_model(family, FAMILIES[family], tmp_path / family)
    source = TransformersSource(path, device="cpu")
    # Its soft cap of the scores is not in sdpa.
    assert source.attention == ("eager" if family == "gemma2" else "sdpa")
    tokens_BS = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))
    with masks_of_layers(decoder_layers(source.model)) as masks:
        batch = source.read(tokens_BS, POINTS)
    assert masks == [source.attention == "eager"] * 2
    values_BS = tokens_BS.roll(-1, 1)
    found_N = source.log_probabilities(batch.final_BSD.reshape(64, -1), values_BS.reshape(64))
    logits_BSV = source.model(tokens_BS).logits
    expected_BS = logits_BSV.double().log_softmax(-1).gather(2, values_BS[..., None])[..., 0]
    np.testing.assert_allclose(found_N, expected_BS.reshape(64), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral"])
def test_windows_are_read_with_the_begin_tokens_before_them(
    family: str, corpus_dir: Path, tmp_path: Path, save_model: Any
) -> None:
    """The states are those of the model on begin tokens + window, without the begin tokens' own."""
    plain = open_corpus(corpus_dir)
    begin = tuple(plain.tokens(16, 18).tolist())  # as the second window begins
    corpus = open_corpus(with_begin_tokens(corpus_dir, tmp_path / "begun", begin))
    source = TransformersSource(save_model(family, FAMILIES[family], tmp_path / family), device="cpu")
    block = Block(5, 150)
    found = list(scan_positions(source, corpus, block, POINTS, batch_windows=4))
    states, scores = [], []
    for number in corpus.windows().covering(block):
        window = corpus.windows()[number]
        tokens = corpus.tokens(window.context_start, window.stop)
        shift = 0 if tuple(tokens[:2]) == begin else 2
        read = torch.tensor(tokens if shift == 0 else [*begin, *tokens])[None]
        first, stop = max(window.start, block.start), min(window.stop, block.stop)
        rows = slice(first - window.context_start + shift, stop - window.context_start + shift)
        states.append(source.read(read, POINTS).states["key"][0, rows])
        log_p = source.model(read).logits[0, rows].double().log_softmax(-1)
        scores.append(log_p.gather(1, torch.from_numpy(corpus.values(first, stop))[:, None])[:, 0])
    np.testing.assert_allclose(
        torch.cat([part.states["key"] for part in found]), torch.cat(states), atol=1e-5
    )
    np.testing.assert_allclose(
        np.concatenate([part.log_probabilities for part in found]), torch.cat(scores), atol=1e-4
    )
    unlike = next(scan_positions(source, plain, block, POINTS, batch_windows=4))
    assert (found[0].states["key"] - unlike.states["key"]).abs().max() > 1e-3, "nothing is shown"


def test_two_threads_read_one_base_without_a_mix_up(tmp_path: Path, save_model: Any) -> None:
    """As where a training looks at a step whose gradients were not finite while its reader goes on."""
    source = TransformersSource(save_model("gpt2", FAMILIES["gpt2"], tmp_path / "base"), device="cpu")
    here_BS, there_BS = (torch.full((2, 8), token) for token in (3, 7))
    expected = [source.read(tokens_BS, POINTS).states for tokens_BS in (here_BS, there_BS)]
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(source.read(there_BS, POINTS).states))

    def enter_meanwhile(*_: Any) -> None:
        if not other.ident:
            other.start()
            other.join(0.5)  # time enough to put its hooks on the layers, and to run

    handle = decoder_layers(source.model)[1].register_forward_hook(enter_meanwhile)  # all is recorded
    found.insert(0, source.read(here_BS, POINTS).states)
    other.join()
    handle.remove()
    for states, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(states[name], wanted[name]) for name in POINTS)


def test_a_mask_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **SIZES | {"sliding_window": 8}))
    model.save_pretrained(tmp_path / "short")
    source = TransformersSource(str(tmp_path / "short"), device="cpu")
    with caplog.at_level("WARNING"):
        for _ in range(2):
            source.read(torch.zeros(2, 32, dtype=torch.int64), POINTS)
    assert caplog.text.count("2 of 2 layers read windows of 32 tokens with an attention mask") == 1


@pytest.mark.parametrize(
    "where", [{"transformer.h.1": "disk"}, {"lm_head": "disk", "transformer.wte": "disk"}]
)
def test_a_base_that_is_spread_out_gives_the_same(
    base_dir: Path, corpus_dir: Path, tmp_path: Path, where: dict[str, str]
) -> None:
    """A part of it on disk stands for a second GPU: accelerate's hooks bring weights and states together."""
    parts = (
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.0",
        "transformer.h.1",
        "transformer.ln_f",
        "lm_head",
    )
    spread = TransformersSource(
        str(base_dir),
        device="cpu",
        device_map=dict.fromkeys(parts, "cpu") | where,
        offload_folder=tmp_path / "offload",
    )
    assert spread.model.get_submodule(next(iter(where))).state_dict().popitem()[1].is_meta
    whole, corpus, block = (
        TransformersSource(str(base_dir), device="cpu"),
        open_corpus(corpus_dir),
        Block(10, 300),
    )
    found = list(scan_positions(spread, corpus, block, POINTS, batch_windows=4))
    expected = list(scan_positions(whole, corpus, block, POINTS, batch_windows=4))
    assert [rows.block for rows in found] == [rows.block for rows in expected] and len(found) > 1
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours.states[name], theirs.states[name]) for name in POINTS)
        np.testing.assert_array_equal(ours.log_probabilities, theirs.log_probabilities)


def test_a_batch_ahead_gives_the_same_and_its_errors(base_dir: Path, corpus_dir: Path) -> None:
    source, corpus = TransformersSource(str(base_dir), device="cpu"), open_corpus(corpus_dir)
    found, expected = (
        list(scan_positions(source, corpus, Block(5, 400), POINTS, batch_windows=3, ahead=ahead))
        for ahead in (True, False)
    )
    assert [rows.block for rows in found] == [rows.block for rows in expected] and len(found) > 3
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours.states[name], theirs.states[name]) for name in POINTS)
        np.testing.assert_array_equal(ours.log_probabilities, theirs.log_probabilities)
    dropped = scan_positions(source, corpus, Block(5, 400), POINTS, batch_windows=3, ahead=True)
    next(dropped)
    dropped.close()  # type: ignore[attr-defined]
    wrong = {"key": CapturePoint(layer=7)}
    with pytest.raises(ValueError, match="layer 7"):
        list(scan_positions(source, corpus, Block(5, 400), wrong, batch_windows=3, ahead=True))
    assert list(scan_positions(source, corpus, Block(5, 5), POINTS, batch_windows=3, ahead=True)) == []


def test_device_map_auto_works_on_any_machine(base_dir: Path) -> None:
    source = TransformersSource(str(base_dir), device="cpu", device_map="auto")
    assert source.read(torch.zeros(1, 8, dtype=torch.int64), POINTS).states["key"].shape == (1, 8, 16)
    with pytest.raises(UserError, match="--model .*nonsense"):
        TransformersSource(str(base_dir), device="cpu", device_map="nonsense")


def test_label_log_probabilities_keep_to_their_bound_at_a_large_vocabulary() -> None:
    """At most 1e-5 from float64, with logits as far apart as a trained model's, over several chunks."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = (torch.randn(rows, 64, generator=generator) for rows in (96, 20011))
    weight_VD *= 0.4
    labels_N = torch.randint(20011, (96,), generator=generator)
    exact_N = (hidden_ND.double() @ weight_VD.double().t()).log_softmax(1).gather(1, labels_N[:, None])[:, 0]
    found_N = label_log_probabilities(hidden_ND, weight_VD, labels_N, chunk_bytes=4 * 20011 * 10)
    assert exact_N.min() < -20 and float((found_N - exact_N).abs().max()) < 1e-5


def test_a_base_that_is_not_there_is_named_once_with_one_that_is(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        TransformersSource("./bse")
    assert str(raised.value) == (
        "--model ./bse: there is no such directory (did you mean base?), and it is no name of a model on the"
        " Hub: check the path"
    )
    with pytest.raises(UserError, match=r"^--base ./base: cannot load the causal language model \(dtype"):
        TransformersSource("./base", flag="--base")


def test_a_layers_path_is_used_and_asked_for(base_dir: Path) -> None:
    assert TransformersSource(str(base_dir), device="cpu", layers_path="transformer.h").num_layers == 2
    with pytest.raises(UserError, match=r"transformer\.h: 2 x GPT2Block(?s:.*)--layers-path transformer\.h"):
        TransformersSource(str(base_dir), device="cpu", layers_path="transformer.blocks")


def test_the_next_batch_is_queued_before_this_one_is_waited_for(
    base_dir: Path, corpus_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the device has work while the host takes what is done."""
    source, corpus, block = TransformersSource(str(base_dir)), open_corpus(corpus_dir), Block(0, 300)
    expected = list(scan_positions(source, corpus, block, POINTS, batch_windows=2, ahead=False))
    queued = [threading.Event() for _ in expected]
    queued[0].set()

    class Copies(HostCopies):
        def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
            self.number = next(numbers)
            queued[self.number].set()
            super().__init__(tensors)

        def wait(self) -> dict[str, torch.Tensor]:
            following = min(self.number + 1, len(queued) - 1)
            assert queued[following].wait(20), f"batch {following} waits for batch {self.number}"
            return super().wait()

    monkeypatch.setattr(hidden_states, "HostCopies", Copies)
    numbers = itertools.count()
    found = list(scan_positions(source, corpus, block, POINTS, batch_windows=2, ahead=True))
    assert len(found) == len(expected) > 3
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.log_probabilities, theirs.log_probabilities)


def test_what_is_made_of_the_states_replaces_them(base_dir: Path, corpus_dir: Path) -> None:
    source, corpus, block = TransformersSource(str(base_dir)), open_corpus(corpus_dir), Block(5, 100)
    whole = list(scan_positions(source, corpus, block, POINTS, batch_windows=2))
    sums = list(
        scan_positions(
            source,
            corpus,
            block,
            POINTS,
            batch_windows=2,
            with_log_probabilities=False,
            finish=lambda states: {"sum": states["key"].sum(1)},
        )
    )
    for made, rows in zip(sums, whole, strict=True):
        assert list(made.states) == ["sum"] and len(made.log_probabilities) == 0
        assert torch.equal(made.states["sum"], rows.states["key"].sum(1))
