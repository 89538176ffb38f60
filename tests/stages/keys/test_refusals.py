"""What extract_keys refuses: numbers, models, outputs and flags, with the position or the flag named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.keys.extract_keys import Config


def test_numbers_beyond_float16_name_position_layer_and_remedy(config: Config, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(config.model)
    with torch.no_grad():
        model.transformer.h[1].ln_2.bias[3] = -1e5
    model.save_pretrained(tmp_path / "large")
    large = replace(config, model=str(tmp_path / "large"), codec="raw")
    message = (
        r"key at position 0, layer 1 \(ffn_input\), holds -\d+.*65,504: choose --raw-dtype bfloat16, or"
        r" --codec int8"
    )
    with pytest.raises(UserError, match=message):
        extract_keys.run(large, World())
    assert not list(config.output.glob("*.npy")) and not (config.output / "manifest.json").exists()
    extract_keys.run(replace(large, raw_dtype="bfloat16", output=tmp_path / "wide"), World())
    assert open_keys(tmp_path / "wide").read("keys", 0, 9)[:, 3] == pytest.approx(-1e5, rel=0.01)


def test_a_used_output_is_refused_before_the_model_is_loaded(config: Config) -> None:
    config.output.mkdir()
    (config.output / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        extract_keys.run(replace(config, model="/no/such/model"), World())


def test_another_model_in_the_same_output_is_refused(config: Config, tmp_path: Path) -> None:
    extract_keys.run(config, World())
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(config.model)
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight.add_(1)
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"inputs\.model"):
        extract_keys.run(replace(config, model=str(other)), World())


@pytest.mark.parametrize(
    ("weights", "row", "message"),
    [
        (
            "h.1.ln_2.weight",
            slice(None),
            r"key at position 0, layer 1 \(ffn_input\), is not finite.*another --output",
        ),
        ("ln_f.weight", slice(None), r"input at position 0, layer 1 \(final_norm\), is not finite"),
        ("wpe.weight", 20, r"key at position \d+, layer 1 \(ffn_input\), is not finite"),
    ],
)
def test_weights_that_are_not_finite_name_position_and_layer(
    config: Config, tmp_path: Path, weights: str, row: Any, message: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(config.model)
    with torch.no_grad():
        model.transformer.get_parameter(weights)[row] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=message):
        extract_keys.run(replace(config, model=str(tmp_path / "nan"), codec="raw"), World())
    assert not (config.output / "manifest.json").exists()
    assert config.output.exists() == (row == 20)


def test_log_probabilities_that_are_not_finite_are_refused(config: Config, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(config.model)
    with torch.no_grad():
        model.transformer.ln_f.weight[:] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="log-probability at position 0 is not finite"):
        extract_keys.run(replace(config, model=str(tmp_path / "nan"), input_point="ffn_input"), World())
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "--model /no/such/model"),
        ({"corpus": Path("/no/such/corpus")}, "--corpus /no/such/corpus does not exist"),
        ({"split": "nonsense"}, "no text in split"),
        ({"key_layer": 7}, "--key-layer: layer 7"),
        ({"device": "banana"}, "--device banana is not here"),
        ({"input_layer": (1.5,)}, "--input-layer"),
        ({"input_layer": (0, 7)}, "--input-layer"),
        ({"input_layer": (1, -1)}, r"--input-layer 1 -1 names a layer twice \(layers 1, 1 of 2\): give each"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
        ({"audit_candidates": 99}, "--audit-candidates is of --audit: add that, or leave it out"),
        ({"device": "meta"}, "--device meta is not here"),
        ({"input_layer": ()}, "--input-layer needs one layer"),
        ({"dim": 17}, "more than the 16 numbers of a raw key"),
        ({"dim": 2000}, "--dim must be at least 1 and at most 1040, not 2000"),
        ({"unit_positions": 100}, "multiple of the corpus's block size 32"),
        ({"batch_windows": 0}, "--batch-windows must be at least 1"),
        ({"codec": "raw", "dim": 8}, "--codec raw keeps all 16 numbers"),
        ({"input_model": "/no/such/model"}, "--input-model /no/such/model"),
        ({"input_layers_path": "transformer.h"}, "give --layers-path for --model"),
        ({"input_point": "final_norm", "input_layer": (0,)}, "final_norm is read after the last layer"),
        ({"audit": -1}, "--audit must be at least 1, not -1"),
        ({"audit": 10, "audit_dims": (17,)}, "--audit-dims 17 is more than"),
        ({"audit": 10, "audit_dims": (0,)}, "--audit-dims must be at least 1 and at most 1040, not 0"),
        ({"audit_dims": (8,)}, "--audit-dims is of --audit: add that, or leave it out"),
        ({"audit": 10, "audit_candidates": 12}, "give at least 20"),
    ],
)
def test_wrong_inputs_leave_the_disk_untouched(config: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extract_keys.run(replace(config, **changes), World())
    assert not config.output.exists()


def test_a_small_vocabulary_model_is_refused(config: Config, tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=100, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(tmp_path / "small")
    with pytest.raises(
        UserError, match="has rows for 100 tokens, and the train split .* holds token 2[0-9]{2} "
    ):
        extract_keys.run(replace(config, model=str(tmp_path / "small")), World())
    shutil.rmtree(tmp_path / "small")


def test_blocks_longer_than_the_context_are_refused(config: Config, text_dir: Path, tmp_path: Path) -> None:
    from mlpmem_ds.stages.corpus import prepare_corpus

    prepare_corpus.run(
        prepare_corpus.Config(
            input=(str(text_dir),), tokenizer="train:300", output=tmp_path / "long", block_size=128, stride=64
        ),
        World(),
    )
    with pytest.raises(UserError, match="blocks of 128 tokens, the model reads at most 64"):
        extract_keys.run(replace(config, corpus=tmp_path / "long"), World())


def test_a_flipped_bit_of_the_text_is_refused_before_a_key_is_written(config: Config, tmp_path: Path) -> None:
    """Its token would be another one in silence, or one that the model has no row for."""
    shutil.copytree(config.corpus, tmp_path / "corpus")
    path = tmp_path / "corpus" / open_corpus(tmp_path / "corpus").token_files[0]
    content = bytearray(path.read_bytes())
    content[101] ^= 64
    path.write_bytes(content)
    with pytest.raises(DamagedDataError, match="tokens-.*checksum"):
        extract_keys.run(replace(config, corpus=tmp_path / "corpus"), World())
    assert not list(config.output.rglob("keys-*"))


def test_shares_of_the_depth_may_meet_in_a_shallow_model(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extract_keys.run(replace(config, input_layer=(0.33, 0.67, -1), output=tmp_path / "keys"), World())
    assert "--input-layer 0.33 0.67 -1 names a layer twice (layers 0, 1, 1 of 2)" in caplog.text
    assert open_keys(tmp_path / "keys").manifest.input_layer == 1
