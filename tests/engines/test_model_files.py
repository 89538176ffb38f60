"""A model's files by path and by Hub name, without a network: a cache as huggingface_hub lays it out."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers.utils import hub

from mlpmem_ds.benchmarks.scale.counted_calls import counted_calls
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json, read_sealed_json
from mlpmem_ds.engines.model_files import (
    check_generation_file,
    check_model_reads,
    fetch_directory,
    fingerprint_model,
    model_file,
    vocabulary_of_model,
)
from mlpmem_ds.formats.corpus import open_corpus

from ..conftest import with_begin_tokens, with_two_ids_swapped


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True, raising=False)
    return tmp_path


def add_to_cache(cache: Path, name: str, *files: str) -> Path:
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    for file in files:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_text("{}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_hub_name_becomes_its_directory(cache: Path) -> None:
    snapshot = add_to_cache(cache, "owner/memory", "config.json", "pytorch_model.bin")
    assert fetch_directory("owner/memory", flag="--x") == snapshot
    below = add_to_cache(cache, "owner/joint", "knn_generator/config.json", "knn_generator/model.safetensors")
    assert fetch_directory("owner/joint", flag="--x", subdirectory="knn_generator") == below / "knn_generator"
    assert model_file("owner/memory", "model.safetensors") is None


def test_paths_are_left_as_they_are(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache)
    (cache / "run" / "memory").mkdir(parents=True)
    assert fetch_directory("run/memory", flag="--x") == Path("run/memory")
    assert fetch_directory("/no/such/place", flag="--x") == Path(
        "/no/such/place"
    )  # its reader says what is missing


@pytest.mark.parametrize("files", [(), ("config.json",)])
def test_what_the_hub_does_not_give_is_refused(cache: Path, files: tuple[str, ...]) -> None:
    if files:
        add_to_cache(cache, "owner/gone", *files)
    remedy = "has no weights" if files else "hf download owner/gone --local-dir DIR"
    with pytest.raises(UserError, match=f"--x owner/gone .*{remedy}"):
        fetch_directory("owner/gone", flag="--x")


def test_the_weights_are_read_by_one_of_several_ranks(base_dir: Path, tmp_path: Path) -> None:
    model, shared = tmp_path / "model", tmp_path / "out"
    shutil.copytree(base_dir, model)
    with counted_calls(model) as once:
        alone = fingerprint_model(str(model))
    with counted_calls(model) as calls:
        assert [fingerprint_model(str(model), shared=shared) for _ in range(4)] == [alone] * 4
    assert calls["model.safetensors"] == once["model.safetensors"] > 0
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    other = fingerprint_model(str(model), shared=shared)
    assert other != alone and other == fingerprint_model(str(model))


def test_models_of_one_shape_and_time_are_told_apart(base_dir: Path, tmp_path: Path) -> None:
    """As those of one tar, whose times are whole seconds."""
    first, second, shared = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    shutil.copytree(base_dir, first)
    shutil.copytree(base_dir, second)
    weights = second / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for path in (*first.iterdir(), *second.iterdir()):
        os.utime(path, (10**9, 10**9))
    found = [fingerprint_model(str(model), shared=shared) for model in (first, second)]
    assert found == [fingerprint_model(str(model)) for model in (first, second)] and found[0] != found[1]


def test_begin_tokens_count_in_what_a_model_must_read(corpus_dir: Path, tmp_path: Path) -> None:
    corpus = open_corpus(with_begin_tokens(corpus_dir, tmp_path / "begun", (1, 2)))
    check_model_reads(str(tmp_path), [corpus], vocab_size=300, max_context=34)
    with pytest.raises(UserError, match="blocks of 32 tokens and 2 begin tokens before each, .* at most 33"):
        check_model_reads(str(tmp_path), [corpus], vocab_size=300, max_context=33)


def test_each_of_several_corpora_must_fit_the_model(corpus_dir: Path, tmp_path: Path) -> None:
    """A gate is fitted to texts of several corpora."""
    shutil.copyfile(corpus_dir / "tokenizer" / "tokenizer.json", tmp_path / "tokenizer.json")
    own = [open_corpus(corpus_dir, name) for name in ("train", "tuning")]
    other = shutil.copytree(corpus_dir, tmp_path / "other")
    with_two_ids_swapped(tmp_path / "tokenizer.json", other / "tokenizer" / "tokenizer.json")
    check_model_reads(str(tmp_path), own, vocab_size=300, max_context=64)
    swapped = replace(own[1], root=other)
    with pytest.raises(UserError, match=f"another vocabulary than the corpus {other}: '.' is"):
        check_model_reads(str(tmp_path), [*own, swapped], vocab_size=300, max_context=64)
    longer = replace(own[1], root=tmp_path / "c", manifest=replace(own[1].manifest, block_size=128))
    with pytest.raises(UserError, match=f"the corpus {tmp_path / 'c'} has blocks of 128 tokens, .* 64"):
        check_model_reads(str(tmp_path), [*own, longer], vocab_size=300, max_context=64)


@pytest.mark.parametrize("content", ["", '{"version"', "[]", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_of_the_model_is_the_users_to_mend(
    corpus_dir: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"--input-model .*tokenizer.json is cut short or damaged .* again"):
        check_model_reads(
            str(tmp_path), [open_corpus(corpus_dir)], vocab_size=300, max_context=34, flag="--input-model"
        )
    with pytest.raises(UserError, match=r"tokenizer.json is cut short or damaged .* again"):
        vocabulary_of_model(str(tmp_path))


@pytest.fixture
def padded_corpus(corpus_dir: Path, tmp_path: Path) -> Path:
    """A corpus whose tokenizer knows ten tokens more than the text holds."""
    root = tmp_path / "padded"
    shutil.copytree(corpus_dir, root)
    manifest = read_sealed_json(root / "manifest.json")
    manifest["tokenizer"]["vocab_size"] += 10
    publish_json(root / "manifest.json", manifest, seal=True)
    return root


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_token_without_a_row_is_refused_only_where_the_text_holds_it(
    padded_corpus: Path, tmp_path: Path, is_shared: bool
) -> None:
    splits = [open_corpus(padded_corpus, name) for name in ("train", "test")]
    largest = [int(split.tokens(0, split.num_tokens).max()) for split in splits]
    assert [split.largest_token() for split in splits] == largest
    shared = tmp_path / "out" if is_shared else None

    def check(rows: int) -> None:
        check_model_reads(str(tmp_path), splits, vocab_size=rows, max_context=32, flag="--x", shared=shared)

    check(max(largest) + 1)
    with pytest.raises(
        UserError, match=rf"--x {tmp_path} has rows for {max(largest)} tokens, and the .* holds"
    ):
        check(max(largest))
    with pytest.raises(UserError, match=r"token \d+ \(.+\): give the model rows"):
        check(max(largest))


@pytest.mark.parametrize("content", ["", "{}", "3", '{"weight_map": []}', "\xff"])
def test_an_index_of_weights_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="model.safetensors.index.json is not an index of weights"):
        fingerprint_model(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ('{"eos_token_id": [0, 5], "pad_token_id": null, "temperature": 0.5}', None),
        (None, None),
        ('{"eos_token_id": 0', r"generation_config.json is damaged \(.*\): restore it"),
        ("", "generation_config.json is damaged"),
        ("[]", "generation_config.json is damaged .it holds no object"),
        ('{"eos_token_id": "5"}', "has '5' as eos_token_id, which is no token id"),
        ('{"eos_token_id": [0, null]}', r"has '\[0, None\]' as eos_token_id"),
        ('{"eos_token_id": true}', "has 'True' as eos_token_id"),
        ('{"pad_token_id": [0]}', r"has '\[0\]' as pad_token_id"),
        ('{"bos_token_id": 1.5}', "has '1.5' as bos_token_id"),
    ],
)
def test_a_generation_file_that_transformers_would_pass_over(
    content: str | None, needle: str | None, base_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(base_dir / "config.json", tmp_path)
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    if needle is None:
        check_generation_file(str(tmp_path))
    else:
        with pytest.raises(UserError, match=needle):
            check_generation_file(str(tmp_path))
