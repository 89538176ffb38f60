"""Keys of one model and inputs of another, and what training and evaluation read of each."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.trained_models import Provenance
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.keys.extract_keys import Config
from mlpmem_ds.stages.training import inputs as training_inputs
from mlpmem_ds.stages.training.memory_shape import memory_shape


def test_keys_and_inputs_of_two_models_are_those_of_each_alone(
    config: Config, other_base: Path, tmp_path: Path
) -> None:
    both = replace(
        config,
        model=str(other_base),
        input_model=config.model,
        key_layer=-1,
        input_layer=(0,),
        input_point="layer_output",
    )
    extract_keys.run(both, World())
    key_side = replace(config, model=str(other_base), output=tmp_path / "key_side")
    extract_keys.run(key_side, World())
    input_side = replace(config, input_layer=(0,), key_point="layer_output", output=tmp_path / "input_side")
    extract_keys.run(input_side, World())
    keys, of_key, of_input = (open_keys(each.output) for each in (both, key_side, input_side))
    np.testing.assert_array_equal(keys.read("keys"), of_key.read("keys"))
    for array in ("inputs", "log_probabilities", "values"):
        np.testing.assert_array_equal(keys.read(array), of_input.read(array))
    assert keys.model_sha256 == of_key.model_sha256
    assert keys.base_sha256 == of_input.base_sha256 == of_input.model_sha256
    manifest = keys.manifest
    assert (manifest.key_size, manifest.num_layers, manifest.key_layer) == (24, 3, 2)
    assert (manifest.input_size, manifest.input_num_layers, manifest.input_layer) == (16, 2, 0)
    assert (manifest.head_size, keys.input_point, manifest.key_point) == (
        300,
        "layer_output",
        "ffn_input",
    )


def provenance_of(settings: training_inputs.Config) -> Provenance:
    """Of the memory that a training with these flags would make."""
    inputs = training_inputs.open_inputs(settings, World())
    memory = memory_shape(settings, inputs, inputs.keys.input_size)
    return training_inputs.provenance_of(settings, inputs, memory, num_steps=1)


def test_training_and_evaluation_ask_for_the_model_of_the_inputs(
    config: Config, other_base: Path, tmp_path: Path
) -> None:
    extract_keys.run(replace(config, model=str(other_base), input_model=config.model), World())
    settings = training_inputs.Config(
        corpus=config.corpus,
        keys=config.output,
        output=tmp_path / "memory",
        ds_config=tmp_path / "unread.json",
        alpha=0.0,
        model=config.model,
    )
    provenance = provenance_of(settings)
    keys = open_keys(config.output)
    assert (provenance.base, provenance.key_model) == (keys.base_sha256, keys.model_sha256)
    assert provenance.input_point == "final_norm"
    with pytest.raises(UserError, match="is not the base that"):
        training_inputs.open_inputs(replace(settings, model=str(other_base)), World())
    asked = evaluate.Config(
        model=config.model,
        corpus=config.corpus,
        keys=config.output,
        temperature=10.0,
        output=tmp_path / "report",
    )
    with pytest.raises(UserError, match="leave --keys out to compare without the kNN arms"):
        evaluate.run(asked, World())
    assert not asked.output.exists()


def test_models_of_two_tokenizers_are_refused(config: Config, tmp_path: Path) -> None:
    for name, more in (("same", []), ("more", ["zzz"])):
        shutil.copytree(config.model, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(config.corpus / "tokenizer")
        tokenizer.add_tokens(more)
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="have different tokenizers"):
        extract_keys.run(
            replace(config, model=str(tmp_path / "same"), input_model=str(tmp_path / "more")), World()
        )
    assert not config.output.exists()


def test_layers_path_reaches_the_model(config: Config) -> None:
    with pytest.raises(
        UserError, match="nothing at the path 'transformer.blocks'.*transformer.h: 2 x GPT2Block"
    ):
        extract_keys.run(replace(config, layers_path="transformer.blocks"), World())
    assert not config.output.exists()
    extract_keys.run(replace(config, layers_path="transformer.h"), World())
    keys = open_keys(config.output)
    assert keys.manifest.input_layers_path == "transformer.h"
    settings = training_inputs.Config(
        ds_config=Path("none"),
        corpus=config.corpus,
        keys=keys.root,
        output=config.output.parent / "memory",
        alpha=0.0,
    )
    provenance = provenance_of(settings)
    assert provenance.input_layers_path == "transformer.h"  # evaluation and export load the base with it
    with pytest.raises(UserError, match=r"--layers-path was 'transformer.h', now none"):
        extract_keys.run(config, World())
