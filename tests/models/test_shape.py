"""The shape of a base is read from its configuration alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from mlpmem_ds.models.shape import read_shape


def test_the_shape_is_that_of_the_loaded_model_with_tied_weights_counted_once(base_dir: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(base_dir)
    shape = read_shape(str(base_dir))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.width, shape.vocab_size) == (model.config.n_embd, model.config.vocab_size)


def test_no_weights_are_needed_and_what_is_no_language_model_is_refused(
    base_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((base_dir / "config.json").read_bytes())
    assert read_shape(str(tmp_path)) == read_shape(str(base_dir))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="no configuration of a causal language model"):
        read_shape(str(tmp_path))
    for content in ("[1]", '{"model_type": "gpt2", "n_embd": -3}', '{"model_type": "gpt2", "n_layer": "x"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="no configuration of a causal language model"):
            read_shape(str(tmp_path))
