"""What does not belong together, is damaged or cannot be is refused before a byte is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation import inputs as evaluation_inputs
from mlpmem_ds.stages.evaluation.config import Config

from ...conftest import with_two_ids_swapped
from .conftest import Finished, save_memory, save_targets


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"test_split": "train"}, "is the text that base.knn_exact was made from"),
        ({"test_split": "nothing"}, "choose another split"),
        ({"bootstrap_block": 100_000}, "smaller block"),
        ({"targets": None}, "need a temperature"),
        ({"k": 10**6}, r"1,000,000 neighbours are more than the .* smaller --k"),
        ({"memory": ("/nowhere/memory",)}, "does not exist"),
        ({"keys": Path("/nowhere/keys")}, "does not exist"),
        ({"model": "/nowhere/base"}, "/nowhere/base"),
        ({"control": ("other=/nowhere/model",)}, "neither a memory nor a language model"),
        ({"control": ("base+other={artifacts}/trained_on",)}, "choose another name"),
        ({"control": ("a={artifacts}/ce_only", "base+a={artifacts}/ce_only")}, "the same name"),
    ],
)
def test_bad_inputs_are_refused_and_leave_no_output(
    config: Config, artifacts: Path, changes: dict[str, Any], needle: str
) -> None:
    if "control" in changes:
        changes = {"control": tuple(word.format(artifacts=artifacts) for word in changes["control"])}
    with pytest.raises(UserError, match=needle):
        evaluate.run(replace(config, **changes), World())
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"base": "0" * 64}, "another base"),
        ({"vocabulary_sha256": "0" * 64}, "another vocabulary"),
    ],
)
def test_a_memory_of_another_base_or_vocabulary_is_refused(
    config: Config, keys_dir: Path, corpus_dir: Path, tmp_path: Path, changes: dict[str, Any], needle: str
) -> None:
    root = save_memory(tmp_path / "wrong", open_keys(keys_dir), open_corpus(corpus_dir), seed=3, **changes)
    for flags in ({"memory": (str(root),)}, {"control": (f"wrong={root}",)}):
        with pytest.raises(UserError, match=needle):
            evaluate.run(replace(config, **flags), World())
        assert not config.output.exists()


def test_keys_index_and_targets_made_from_other_inputs_are_refused(
    config: Config, artifacts: Path, tmp_path: Path, corpus_dir: Path
) -> None:
    other = replace(config, model=str(artifacts / "trained_on"), memory=(), control=())
    with pytest.raises(UserError, match="extracted from another base"):
        evaluate.run(other, World())
    targets = save_targets(tmp_path / "targets", "0" * 64)
    with pytest.raises(UserError, match="are of other keys"):
        evaluate.run(replace(config, targets=targets), World())
    index = tmp_path / "index"
    shutil.copytree(artifacts / "index", index)
    manifest = read_json(index / "manifest.json")
    manifest["inputs"]["keys"] = "0" * 64
    publish_json(index / "manifest.json", manifest, seal=True)
    with pytest.raises(UserError, match="is of other keys"):
        evaluate.run(replace(config, index=index), World())
    assert not config.output.exists()


def test_an_unfinished_control_is_refused(config: Config, artifacts: Path, tmp_path: Path) -> None:
    for kind, name in (("ce_only", "base+x"), ("trained_on", "x")):
        shutil.copytree(artifacts / kind, tmp_path / kind)
        (tmp_path / kind / "manifest.json").unlink(missing_ok=True)
        if kind == "trained_on":
            (tmp_path / kind / "identity.json").write_text(json.dumps({"format": "mlpmem-base"}))
        with pytest.raises(UserError, match="is not complete: run its stage again"):
            evaluate.run(replace(config, control=(f"{name}={tmp_path / kind}",)), World())
        assert not config.output.exists()


def test_a_model_with_another_vocabulary_is_refused(config: Config, artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artifacts / "trained_on", tmp_path / "other_words")
    path = tmp_path / "other_words" / "tokenizer.json"
    with_two_ids_swapped(path, path)
    with pytest.raises(UserError, match="another vocabulary"):
        evaluate.run(replace(config, control=(f"other={tmp_path / 'other_words'}",)), World())
    assert not config.output.exists()


def test_an_export_that_lacks_weights_is_refused(
    config: Config, artifacts: Path, base_dir: Path, tmp_path: Path
) -> None:
    joint = MemoryAugmentedLM.from_pretrained(base_dir, artifacts / "memory")
    joint.save_pretrained(tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    weights = load_file(file)
    del weights["memory.blocks.1.mlp.down.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights.*export the memory again"):
        evaluate.run(replace(config, memory=(str(tmp_path / "export"),)), World())
    assert not config.output.exists()


def test_another_run_in_the_output_is_refused_and_untouched(config: Config, finished: Finished) -> None:
    shutil.copytree(finished.config.output, config.output)
    before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds another run"):
        evaluate.run(replace(config, k=7), World())
    assert {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()} == before


def test_a_missing_extra_split_is_reported_only_if_the_flag_names_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = {"memory": (), "keys": None, "index": None, "targets": None, "control": ()}
    config = replace(config, extra_splits=("nothing",), **alone)
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        splits = evaluation_inputs.open_inputs(config, World()).splits
        assert list(splits) == ["tuning", "test"] and caplog.text.count("has no split nothing") == 1
        monkeypatch.setattr(evaluation_inputs, "DEFAULT_EXTRA_SPLITS", ("nothing",))
        evaluation_inputs.open_inputs(config, World())
    assert caplog.text.count("has no split") == 1


def test_fingerprints_tell_the_models_apart(artifacts: Path, base_dir: Path) -> None:
    assert fingerprint_model(str(base_dir)) != fingerprint_model(str(artifacts / "trained_on"))


def test_a_flipped_bit_of_the_text_is_refused_before_a_score_is_written(
    config: Config, corpus_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus_dir, tmp_path / "corpus")
    path = tmp_path / "corpus" / open_corpus(tmp_path / "corpus", "test").token_files[0]
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedDataError, match="tokens-.*checksum"):
        evaluate.run(replace(config, corpus=tmp_path / "corpus"), World())
    assert not list(config.output.rglob("*.npy"))
