"""Keys, inputs and log-probabilities against an independent pass, in every codec."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.log import read_events
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.keys.extract_keys import Config
from mlpmem_ds.stages.targets import write_targets

from ...conftest import save_narrow_base
from .conftest import CODECS


def test_raw_keys_inputs_and_log_probabilities_match_an_independent_pass(
    config: Config, oracle: dict[str, np.ndarray]
) -> None:
    extract_keys.run(replace(config, codec="raw", input_layer=(0,), batch_windows=3), World())
    keys = open_keys(config.output)
    corpus = open_corpus(config.corpus)
    np.testing.assert_allclose(keys.read("keys").astype(np.float64), oracle["layer1"], rtol=2e-3, atol=2e-3)
    inputs = torch.from_numpy(keys.read("inputs")).view(torch.bfloat16).double().numpy()
    np.testing.assert_allclose(inputs, oracle["layer0"], rtol=8e-3, atol=1e-6)
    np.testing.assert_allclose(keys.read("log_probabilities"), oracle["log_probabilities"], atol=1e-5)
    np.testing.assert_array_equal(keys.read("values"), corpus.values(0, corpus.num_positions))


@pytest.mark.parametrize(
    ("flags", "point"),
    [
        ({}, "final_norm"),
        ({"input_layer": (0.99,)}, "final_norm"),
        ({"input_layer": (0, -1)}, "final_norm"),
        ({"key_point": "layer_output"}, "final_norm"),
        ({"input_layer": (0,)}, "ffn_input"),
        ({"input_layer": (0,), "key_point": "layer_output"}, "layer_output"),
    ],
)
def test_inputs_of_the_last_layer_are_what_the_head_reads_and_others_as_the_keys(
    config: Config, tmp_path: Path, flags: dict[str, Any], point: str
) -> None:
    chosen = replace(config, **flags)
    extract_keys.run(chosen, World())
    assert open_keys(config.output).input_point == point
    given = replace(chosen, output=tmp_path / "given", input_point=point)
    extract_keys.run(given, World())
    inputs = [open_keys(root).read("inputs") for root in (config.output, given.output)]
    np.testing.assert_array_equal(*inputs)


def test_int8_distances_are_those_of_the_states(config: Config, oracle: dict[str, np.ndarray]) -> None:
    extract_keys.run(config, World())
    keys = open_keys(config.output)
    chosen = np.random.default_rng(0).permutation(keys.num_positions)[:200]
    codes = keys.gather("keys", chosen).astype(np.int64)
    states = oracle["layer1"][chosen].astype(np.float64)
    found = keys.scale**2 * ((codes[:, None] - codes[None]) ** 2).sum(-1)
    exact = ((states[:, None] - states[None]) ** 2).sum(-1)
    assert keys.manifest.codec.energy_kept == pytest.approx(1, abs=1e-6)
    assert np.abs(found - exact).mean() < 0.01 * exact.mean()


def test_fewer_dimensions_keep_less_energy(config: Config) -> None:
    extract_keys.run(replace(config, dim=4, input_codec="none"), World())
    keys = open_keys(config.output)
    assert keys.read("keys").shape[1] == 4
    assert 0 < keys.manifest.codec.energy_kept < 1
    assert keys.input_size == 0 and not list(config.output.glob("inputs-*"))


@pytest.mark.parametrize("codec", ["int8, int8 inputs", "raw bfloat16", "raw float16"])
def test_codecs_give_back_what_an_independent_pass_sees(
    config: Config, oracle: dict[str, np.ndarray], codec: str
) -> None:
    extract_keys.run(replace(config, **{**CODECS[codec], "dim": None}, input_layer=(0,)), World())
    keys = open_keys(config.output)
    inputs = torch.from_numpy(keys.read_inputs(5, 300)).view(torch.bfloat16).double().numpy()
    largest = np.abs(oracle["layer0"][5:300]).max(axis=1, keepdims=True)
    assert (np.abs(inputs - oracle["layer0"][5:300]) <= 0.0085 * largest).all()  # 1/254 and bfloat16's 1/256
    if codec.startswith("raw"):
        found = keys.gather("keys", np.arange(300)[::-1])[::-1]
        assert found.dtype == (np.float32 if "bfloat16" in codec else np.float16)
        np.testing.assert_allclose(found.astype(np.float64), oracle["layer1"][:300], rtol=4e-3, atol=1e-3)
        np.testing.assert_array_equal(keys.unit("keys", 256), keys.read("keys", 256, 512))


@pytest.mark.parametrize("raw_dtype", ["float16", "bfloat16"])
def test_raw_keys_pass_through_index_and_targets(config: Config, tmp_path: Path, raw_dtype: str) -> None:
    extract_keys.run(replace(config, codec="raw", raw_dtype=raw_dtype, input_codec="none"), World())
    keys = open_keys(config.output)
    build_index.run(
        build_index.Config(keys=config.output, output=tmp_path / "index", factory="IVF4,Flat", num_shards=2),
        World(),
    )
    settings = write_targets.Config(
        keys=config.output,
        output=tmp_path / "exact",
        k=50,
        neighbour_perplexity=10,
        shard_positions=1024,
        mass=1.0,
    )
    write_targets.run(settings, World())
    every_list = replace(settings, output=tmp_path / "ivf", index=tmp_path / "index", search="ivf", nprobe=4)
    write_targets.run(every_list, World())
    exact, ivf = (open_targets(of.output).read(0, 100) for of in (settings, every_list))
    vectors = keys.read("keys").astype(np.float64)
    squared = np.square(vectors[:100, None] - vectors[None]).sum(-1)
    squared[np.arange(100), np.arange(100)] = np.inf
    nearest = np.argsort(squared, axis=1, kind="stable")[:, :50]
    temperature = open_targets(settings.output).weighting.temperature
    weights = np.exp(
        -(np.take_along_axis(squared, nearest, axis=1) - squared.min(1, keepdims=True)) / temperature
    )
    values = keys.read("values")
    for row in range(100):
        expected = np.bincount(values[nearest[row]], weights=weights[row] / weights[row].sum(), minlength=300)
        for found in (exact, ivf):
            part = slice(found.offsets[row], found.offsets[row + 1])
            dense = np.zeros(300)
            dense[found.ids[part]] = found.probabilities[part]
            assert np.abs(dense - expected).sum() / 2 < 5e-3


def test_massive_activations_are_reported_and_clipped(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(config.model)
    with torch.no_grad():  # the first of a window's positions carry a number that the others do not
        model.transformer.wpe.weight[1, 5] = 5000.0
        for block in model.transformer.h:
            block.attn.c_proj.weight.mul_(1e-3)
    model.save_pretrained(tmp_path / "massive")
    with caplog.at_level(logging.INFO, logger="mlpmem_ds"):
        extract_keys.run(replace(config, model=str(tmp_path / "massive"), key_point="layer_output"), World())
    assert "1 dimensions with massive activations: 5 (up to 5000 from its median, clipped to [" in caplog.text
    keys = open_keys(config.output)
    (entry,) = keys.manifest.codec.massive_dimensions
    assert entry.dimension == 5 and entry.largest > 4000 and entry.high < 200
    (in_codec,) = keys.load_codec().massive
    assert in_codec.high == entry.high


def test_what_a_position_takes_is_said_first_and_true(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mlpmem_ds"):
        extract_keys.run(replace(config, input_codec="int8", dim=8), World())
    assert "at 34 bytes: key 8 (int8), input 20 (int8), value 2, log-probability 4, list id 0" in caplog.text
    assert "% of the time outside the forward pass" in caplog.text
    keys = open_keys(config.output)
    on_disk = sum(path.stat().st_size for path in config.output.glob("*.npy"))
    assert 34 * keys.num_positions <= on_disk <= 34 * keys.num_positions + 128 * 5 * len(keys.blocks)
    (event,) = [event for event in read_events(config.output / "log.jsonl") if event["event"] == "extracted"]
    assert event["positions"] == keys.num_positions and event["bytes"] == 34 * keys.num_positions
    assert 0 < event["forward_seconds"] <= event["seconds"]


def test_a_padded_head_is_recorded(config: Config, tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=320, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(tmp_path / "padded")
    extract_keys.run(replace(config, model=str(tmp_path / "padded")), World())
    manifest = open_keys(config.output).manifest
    assert (manifest.vocab_size, manifest.head_size) == (300, 320)


def test_keys_behind_the_final_norm_are_as_wide_as_the_head(config: Config, tmp_path: Path) -> None:
    narrow = replace(config, model=str(save_narrow_base(tmp_path / "base")), key_point="final_norm")
    extract_keys.run(replace(narrow, audit=20, audit_dims=(4,)), World())
    manifest = open_keys(config.output).manifest
    assert (manifest.key_size, manifest.codec.dim) == (8, 8)
    raw = replace(narrow, codec="raw", output=tmp_path / "raw")
    extract_keys.run(raw, World())
    assert open_keys(raw.output).read("keys").shape[1] == 8
    with pytest.raises(UserError, match="--dim 9 is more than the 8 numbers of a raw key"):
        extract_keys.run(replace(narrow, dim=9, output=tmp_path / "wide"), World())
