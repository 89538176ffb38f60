from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.log import read_events
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.formats.trained_models import Provenance
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.keys.extract_keys import Config
from mlpmem_ds.stages.targets import write_targets
from mlpmem_ds.stages.training import inputs as training_inputs
from mlpmem_ds.stages.training.memory_shape import memory_shape


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
    """One window at a time, with hooks of the test's own: what each layer's MLP reads, and the label
    log-probabilities."""
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
    assert keys.manifest.codec.energy_kept == pytest.approx(1, abs=1e-6)
    assert np.abs(found - exact).mean() < 0.01 * exact.mean()


def test_fewer_dimensions_keep_less_energy(config: Config) -> None:
    extract_keys.run(replace(config, dim=4, input_codec="none"), World())
    keys = open_keys(config.output)
    assert keys.read("keys").shape[1] == 4
    assert 0 < keys.manifest.codec.energy_kept < 1
    assert keys.input_size == 0 and not list(config.output.glob("inputs-*"))


def run_apart(config: Config, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank makes the units that it is dealt, and none of the others'; the last one completes the
    directory."""
    with monkeypatch.context() as patch:
        patch.setattr(StageDirectory, "_without_record", lambda self, units: iter(()))
        patch.setattr(StageDirectory, "_wait_while_missing", lambda self, units, is_missing: None)
        for rank in range(size):
            assert not (config.output / "manifest.json").exists()
            extract_keys.run(config, World(rank=rank, size=size))


CODECS: dict[str, dict[str, Any]] = {
    "int8, bf16 inputs": {},
    "int8, int8 inputs": {"input_codec": "int8", "dim": 7},
    "int8, no inputs": {"input_codec": "none"},
    "raw float16": {"codec": "raw"},
    "raw bfloat16": {"codec": "raw", "raw_dtype": "bfloat16", "input_codec": "int8"},
    "two models": {"input_model": "other"},
}


@pytest.mark.parametrize("codec", CODECS)
def test_ranks_share_the_work_byte_for_byte(
    config: Config, tmp_path: Path, other_base: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = CODECS[codec]
    config = replace(
        config, **changes | ({"input_model": str(other_base)} if "input_model" in changes else {})
    )
    extract_keys.run(config, World())
    for size in (2, 3):
        shared = replace(config, output=tmp_path / f"shared{size}")
        run_apart(shared, size, monkeypatch)
        assert result_of(config.output) == result_of(shared.output)
        makers = {
            event["rank"] for event in read_events(shared.output / "log.jsonl") if event["event"] == "unit"
        }
        assert makers == set(range(size))


def test_batch_and_threads_change_few_codes_and_none_by_more_than_one(config: Config, tmp_path: Path) -> None:
    """The bound that formats/README.md states: the codec is fitted window by window, so only the roundings
    differ."""
    extract_keys.run(replace(config, input_codec="int8", batch_windows=1), World())
    one, threads_before = open_keys(config.output), torch.get_num_threads()
    for size, threads in ((3, 1), (64, 1), (64, 3)):
        other = replace(config, input_codec="int8", batch_windows=size, output=tmp_path / f"{size}-{threads}")
        torch.set_num_threads(threads)
        try:
            extract_keys.run(other, World())
        finally:
            torch.set_num_threads(threads_before)
        keys = open_keys(other.output)
        assert keys.scale == pytest.approx(one.scale, rel=1e-5)
        for array in ("keys", "inputs"):
            steps = np.abs(keys.read(array).astype(int) - one.read(array))
            assert steps.max() <= 1 and (steps > 0).mean() <= 1e-4
        np.testing.assert_allclose(keys.read("log_probabilities"), one.read("log_probabilities"), atol=1e-4)


@pytest.mark.parametrize("codec", ["int8, int8 inputs", "raw bfloat16", "raw float16"])
def test_codecs_give_back_what_an_independent_pass_sees(
    config: Config, oracle: dict[str, np.ndarray], codec: str
) -> None:
    extract_keys.run(replace(config, **{**CODECS[codec], "dim": None}, input_layer=0), World())
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


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider and deeper base for the same tokenizer, with a padded head."""
    path = tmp_path_factory.mktemp("other") / "base"
    torch.manual_seed(5)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=304, n_positions=64, n_embd=24, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
            initializer_range=0.3,
        )
    ).save_pretrained(path)  # fmt: skip
    return path


def test_keys_and_inputs_of_two_models_are_those_of_each_alone(
    config: Config, other_base: Path, tmp_path: Path
) -> None:
    both = replace(
        config,
        model=str(other_base),
        input_model=config.model,
        key_layer=-1,
        input_layer=0,
        input_point="layer_output",
    )
    extract_keys.run(both, World())
    key_side = replace(config, model=str(other_base), output=tmp_path / "key_side")
    extract_keys.run(key_side, World())
    input_side = replace(config, input_layer=0, key_point="layer_output", output=tmp_path / "input_side")
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
    inputs = training_inputs.open_inputs(settings)
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
    assert provenance.input_point == "ffn_input"
    with pytest.raises(UserError, match="is not the base that"):
        training_inputs.open_inputs(replace(settings, model=str(other_base)))
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


def test_layers_path_reaches_the_model(config: Config) -> None:
    with pytest.raises(
        UserError, match="nothing at the path 'transformer.blocks'.*\n.*transformer.h: 2 x GPT2Block"
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


def test_flags_that_fit_the_codec_do_not_bind_raw_keys(config: Config) -> None:
    raw = replace(config, codec="raw", input_codec="none")
    extract_keys.run(raw, World())
    before = result_of(config.output)
    extract_keys.run(replace(raw, seed=5, fit_positions=99), World())
    assert result_of(config.output) == before
    with pytest.raises(UserError, match=r"--codec was 'raw', now 'int8'"):
        extract_keys.run(replace(config, input_codec="none"), World())


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
        ("ln_f.weight", slice(None), "log-probability at position 0 is not finite"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "--model /no/such/model"),
        ({"corpus": Path("/no/such/corpus")}, "--corpus /no/such/corpus does not exist"),
        ({"split": "nonsense"}, "no text in split"),
        ({"key_layer": 7}, "--key-layer: layer 7"),
        ({"device": "banana"}, "--device banana is not here"),
        ({"input_layer": 1.5}, "--input-layer"),
        ({"dim": 17}, "more than the model's width 16"),
        ({"dim": 2000}, "--dim must be at least 1 and at most 1040, not 2000"),
        ({"unit_positions": 100}, "multiple of the corpus's block size 32"),
        ({"batch_windows": 0}, "--batch-windows must be at least 1"),
        ({"codec": "raw", "dim": 8}, "--codec raw keeps all 16 numbers"),
        ({"input_model": "/no/such/model"}, "--input-model /no/such/model"),
        ({"input_layers_path": "transformer.h"}, "give --layers-path for --model"),
        ({"input_point": "final_norm", "input_layer": 0}, "final_norm is read after the last layer"),
        ({"audit": -1}, "--audit must be at least 1, not -1"),
        ({"audit": 10, "audit_dims": (17,)}, "--audit-dims 17 is more than"),
        ({"audit": 10, "audit_dims": (0,)}, "--audit-dims must be at least 1 and at most 1040, not 0"),
        ({"audit_dims": (8,)}, "give --audit 2000 too"),
        ({"audit": 10, "audit_candidates": 12}, "give at least 20"),
    ],
)
def test_wrong_inputs_leave_the_disk_untouched(config: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extract_keys.run(replace(config, **changes), World())
    assert not config.output.exists()


def test_a_padded_head_is_recorded(config: Config, tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=320, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(tmp_path / "padded")
    extract_keys.run(replace(config, model=str(tmp_path / "padded")), World())
    manifest = open_keys(config.output).manifest
    assert (manifest.vocab_size, manifest.head_size) == (300, 320)


def test_a_small_vocabulary_model_is_refused(config: Config, tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=100, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="vocabulary of 300, the model one of 100"):
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
