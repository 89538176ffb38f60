from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages import extract_keys
from mlpmem_ds.stages.extract_keys import Config


def result_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }


@pytest.fixture
def config(base_dir: Path, corpus_dir: Path, tmp_path: Path) -> Config:
    return Config(model=str(base_dir), corpus=corpus_dir, output=tmp_path / "keys", unit_positions=256)


@pytest.fixture(scope="module")
def oracle(base_dir: Path, corpus_dir: Path) -> dict[str, np.ndarray]:
    """One window at a time, with hooks of the test's own: what each layer's MLP reads, and the label log-probabilities."""
    corpus = open_corpus(corpus_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    seen: dict[int, torch.Tensor] = {}
    for index, block in enumerate(model.transformer.h):
        block.mlp.register_forward_pre_hook(lambda _, args, index=index: seen.__setitem__(index, args[0][0]))
    rows: dict[str, list[np.ndarray]] = {"layer0": [], "layer1": [], "log_probabilities": []}
    for window in corpus.windows():
        tokens = torch.from_numpy(corpus.tokens(window.context_start, window.stop))[None]
        with torch.no_grad():
            logits = model(tokens).logits[0]
        wanted = slice(window.start - window.context_start, None)
        values = torch.from_numpy(corpus.values(window.start, window.stop))
        log_probabilities = logits.double().log_softmax(-1)[wanted].gather(1, values[:, None])[:, 0]
        rows["log_probabilities"].append(log_probabilities.numpy())
        for layer in (0, 1):
            rows[f"layer{layer}"].append(seen[layer][wanted].numpy())
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def test_raw_keys_inputs_and_log_probabilities_match_an_independent_pass(
    config: Config, oracle: dict[str, np.ndarray]
) -> None:
    extract_keys.run(replace(config, codec="raw", input_layer=0, batch_windows=3), World())
    keys = open_keys(config.output)
    corpus = open_corpus(config.corpus)
    np.testing.assert_allclose(keys.read("keys").astype(np.float64), oracle["layer1"], rtol=2e-3, atol=2e-3)
    inputs = torch.from_numpy(keys.read("inputs")).view(torch.bfloat16).double().numpy()
    np.testing.assert_allclose(inputs, oracle["layer0"], rtol=8e-3, atol=1e-6)
    np.testing.assert_allclose(keys.read("log_probabilities"), oracle["log_probabilities"], atol=1e-5)
    np.testing.assert_array_equal(keys.read("values"), corpus.values(0, corpus.num_positions))


def test_int8_distances_are_those_of_the_states(config: Config, oracle: dict[str, np.ndarray]) -> None:
    extract_keys.run(config, World())
    keys = open_keys(config.output)
    chosen = np.random.default_rng(0).permutation(keys.num_positions)[:200]
    codes = keys.gather("keys", chosen).astype(np.int64)
    states = oracle["layer1"][chosen].astype(np.float64)
    found = keys.scale**2 * ((codes[:, None] - codes[None]) ** 2).sum(-1)
    exact = ((states[:, None] - states[None]) ** 2).sum(-1)
    assert keys.manifest["codec"]["energy_kept"] == pytest.approx(1, abs=1e-6)
    assert np.abs(found - exact).mean() < 0.01 * exact.mean()


def test_fewer_dimensions_keep_less_energy(config: Config) -> None:
    extract_keys.run(replace(config, dim=4, store_inputs=False), World())
    keys = open_keys(config.output)
    assert keys.read("keys").shape[1] == 4
    assert 0 < keys.manifest["codec"]["energy_kept"] < 1
    assert keys.input_size == 0 and not list(config.output.glob("inputs-*"))


@pytest.mark.parametrize("codec", ["int8", "raw"])
def test_ranks_share_the_work_byte_for_byte(config: Config, tmp_path: Path, codec: str) -> None:
    config = replace(config, codec=codec)
    extract_keys.run(config, World())
    shared = replace(config, output=tmp_path / "shared")
    for rank in (0, 1):
        extract_keys.run(shared, World(rank=rank, size=2))
    assert result_of(config.output) == result_of(shared.output)


def test_a_broken_run_continues_to_the_same_bytes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_keys.run(config, World())
    broken = replace(config, output=tmp_path / "broken")
    real, calls = extract_keys._extract_unit, []

    def fail_late(*arguments: Any) -> dict[str, Any]:
        summary = real(*arguments)
        calls.append(summary)
        if len(calls) == 2:
            raise RuntimeError("killed after the files, before the record")
        return summary

    monkeypatch.setattr(extract_keys, "_extract_unit", fail_late)
    with pytest.raises(RuntimeError):
        extract_keys.run(broken, World())
    extract_keys.run(broken, World())
    assert result_of(config.output) == result_of(broken.output)


def test_another_model_in_the_same_output_is_refused(config: Config, tmp_path: Path) -> None:
    extract_keys.run(config, World())
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(config.model)
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight.add_(1)
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"inputs\.model"):
        extract_keys.run(replace(config, model=str(other)), World())


def test_non_finite_states_name_position_and_layer(config: Config, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(config.model)
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"key at position \d+, layer 1 \(ffn_input\), is not finite"):
        extract_keys.run(replace(config, model=str(tmp_path / "nan"), codec="raw"), World())
    assert not (config.output / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "--model /no/such/model"),
        ({"corpus": Path("/no/such/corpus")}, "--corpus /no/such/corpus does not exist"),
        ({"split": "nonsense"}, "no text in split"),
        ({"key_layer": 7}, "--key-layer: layer 7"),
        ({"input_layer": 1.5}, "--input-layer"),
        ({"dim": 17}, "more than the base's width 16"),
        ({"dim": 2000}, "1 to 1040"),
        ({"unit_positions": 100}, "multiple of the corpus's block size 32"),
        ({"batch_windows": 0}, "--batch-windows must be at least 1"),
    ],
)
def test_wrong_inputs_leave_the_disk_untouched(config: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extract_keys.run(replace(config, **changes), World())
    assert not config.output.exists()


def test_a_padded_head_is_recorded(config: Config, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path / "padded")
    extract_keys.run(replace(config, model=str(tmp_path / "padded")), World())
    manifest = open_keys(config.output).manifest
    assert (manifest["vocab_size"], manifest["head_size"]) == (300, 320)


def test_a_small_vocabulary_model_is_refused(config: Config, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="vocabulary of 300, the model one of 100"):
        extract_keys.run(replace(config, model=str(tmp_path / "small")), World())
    shutil.rmtree(tmp_path / "small")


def test_blocks_longer_than_the_context_are_refused(config: Config, text_dir: Path, tmp_path: Path) -> None:
    from mlpmem_ds.stages import prepare_corpus

    prepare_corpus.run(
        prepare_corpus.Config(
            input=(str(text_dir),), tokenizer="train:300", output=tmp_path / "long", block_size=128, stride=64
        ),
        World(),
    )
    with pytest.raises(UserError, match="blocks of 128 tokens, the model reads at most 64"):
        extract_keys.run(replace(config, corpus=tmp_path / "long"), World())
