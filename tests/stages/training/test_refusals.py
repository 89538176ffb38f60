"""What a training refuses: always before anything is written, with the remedy."""

import json
import shutil
import sys

import pytest
import torch

from mlpmem_ds.core.config import parse_config
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.target_shards import shard_name
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.training import train

FLAGS = {
    "epochs": 1.6,
    "batch_positions": 48,
    "hidden_size": 16,
    "num_blocks": 2,
    "micro_batch_positions": 12,
    "learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def runs(make_runs, inputs_dir):
    return make_runs({**FLAGS, "corpus": inputs_dir / "corpus", "targets": inputs_dir / "targets"})


@pytest.fixture(scope="module")
def tuned_runs(make_runs, corpus_dir, keys_dir):
    """Of a corpus with a tuning split, without targets."""
    return make_runs({**FLAGS, "corpus": corpus_dir, "keys": keys_dir, "alpha": 0.0, "validate_every": None})


@pytest.fixture(scope="module")
def bare_keys(corpus_dir, base_dir, tmp_path_factory):
    """The keys of `keys_dir`, without memory inputs."""
    output = tmp_path_factory.mktemp("bare") / "keys"
    config = extract_keys.Config(
        model=str(base_dir), corpus=corpus_dir, output=output, unit_positions=256, input_codec="none"
    )
    extract_keys.run(config, World())
    return output


@pytest.mark.parametrize(
    "name, said",
    [
        ("gap", "leave positions from {block} out"),
        ("short", "hold {held} of {all}"),
        ("uneven", "is missing"),
    ],
)
def test_too_few_shards(runs, inputs_dir, tmp_path, name, said):
    keys = open_keys(inputs_dir / "keys")
    block = keys.manifest.block_size
    shutil.copytree(inputs_dir / name, tmp_path / "targets")
    if name == "uneven":
        (tmp_path / "targets" / shard_name(block, 2 * block)).unlink()
    said = said.format(block=block, held=3 * block, all=keys.num_positions)
    runs.refuse(said, "wrong", 2, targets=tmp_path / "targets", keys=inputs_dir / "keys")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_positions": 1000}, "do not fill one batch"),
        ({"batch_positions": 47}, "cannot be dealt evenly to 2 ranks"),
        ({"model": "/nowhere/at/all", "head": "base"}, "--model"),
        ({"keys": "corpus"}, "--keys"),
    ],
)
def test_wrong_inputs(runs, inputs_dir, changes, said):
    if "keys" in changes:
        changes = {"keys": inputs_dir / changes["keys"]}
    runs.refuse(said, "wrong", 2, World(rank=0, size=2), **changes)


@pytest.mark.parametrize(
    "content, said",
    [
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"elasticity": {}}, "the batch is the same at any number of GPUs"),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}},
            'stage3_prefetch_bucket_size is "auto"',
        ),
    ],
)
def test_wrong_ds_configs(runs, tmp_path, content, said):
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    runs.refuse(said, "wrong", str(tmp_path / "wrong.json"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keys": "bare"}, "hold no memory inputs: give --model"),
        ({"keys": "bare", "model": "base", "order": "positions"}, "leave out --order positions"),
        ({"validate_every": 3}, "--validate-every needs --model"),
        ({"validate_every": "epoch"}, "--validate-every needs --model"),
        ({"validate_every": 3, "select": "best"}, "need validation"),
        ({"select": "best"}, "need validation"),
        ({"validate_every": "auto", "early_stopping_patience": 0, "model": "base"}, "must be at least 1"),
        ({"decay_fraction": 0.5}, "of --schedule wsd"),
        ({"stop_after_seconds": -1.0}, "--stop-after-seconds must be above 0"),
        ({"time_budget_seconds": 0.0}, "--time-budget-seconds must be above 0"),
        ({"wandb_project": "memory"}, "pip install wandb"),
    ],
)
def test_wrong_flags(tuned_runs, base_dir, bare_keys, monkeypatch, changes, said):
    monkeypatch.setitem(sys.modules, "wandb", None)
    paths = {"bare": bare_keys, "base": str(base_dir)}
    tuned_runs.refuse(said, "wrong", 2, **{name: paths.get(value, value) for name, value in changes.items()})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--mixture-lambda", "0.5"],
            "--mixture-lambda is of --ce-through mixture: add that, or leave it out",
        ),
        (["--joined-lambda", "0.5"], "--joined-lambda is of --objective joined"),
        (["--init-from", "x", "--head", "random"], "brings its own weights: leave out --head random"),
        (["--init-from", "x", "--head", "base", "--model", "x"], "leave out --head base"),
        (["--init-from", "x", "--start", "base", "--model", "x"], "leave out --start base"),
        (["--open-shards", "2"], "--open-shards is of --loader webdataset"),
        (["--shuffle-buffer-positions", "9"], "--shuffle-buffer-positions is of --loader webdataset"),
        (
            ["--loader", "webdataset", "--shuffle-window-blocks", "9"],
            "--shuffle-window-blocks is of --loader st",
        ),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--epochs", "1e300"], "--epochs must be above 0 and at most 1000000.0"),
        (["--reader-threads", "1e6"], "--reader-threads must be at least 1 and at most 1024"),
    ],
)
def test_flags_that_nothing_reads_or_no_machine_can(words, said):
    given = ("--ds_config", "x", "--corpus", "x", "--targets", "x", "--output", "x", *words)
    with pytest.raises(UserError, match=said):
        parse_config(train.Config, given, prog="train")


def test_copies_go_to_a_place_of_their_own(inputs_dir, tmp_path):
    """Another stage's directory is no place for them, and its own disk is the one that may be lost."""

    def copied(place):
        given = {"--corpus": "x", "--targets": "x", "--output": tmp_path / "memory", "--copy-to": place}
        words = [str(word) for pair in given.items() for word in pair]
        return parse_config(train.Config, [*words, "--ds_config", "x"], prog="train").copy_to

    assert copied(tmp_path / "copies") == tmp_path / "copies"
    for place in (tmp_path / "memory", tmp_path / "memory" / "copies", tmp_path / "x" / ".." / "memory"):
        with pytest.raises(
            UserError, match=r"--copy-to .*memory, which a command of .*: name a directory of"
        ):
            copied(place)
    with pytest.raises(UserError, match=f"--copy-to .* is in {inputs_dir / 'keys'}, which a command"):
        copied(inputs_dir / "keys" / "copies")


@pytest.mark.parametrize("array", ["inputs", "values", "log_probabilities", "tokens"])
def test_a_flipped_bit_of_what_is_read_is_refused_before_the_first_step(
    tuned_runs, corpus_dir, keys_dir, base_dir, tmp_path, array
):
    keys, corpus = shutil.copytree(keys_dir, tmp_path / "keys"), corpus_dir
    if array == "tokens":  # of the split that is validated on; its copy has the same manifest
        corpus = shutil.copytree(corpus_dir, tmp_path / "corpus")
        path = next((corpus / "tuning").glob("tokens-*.bin"))
    else:
        path = keys / open_keys(keys).array_files(array)[0]
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    changes = {"keys": keys, "corpus": corpus, "model": base_dir, "validate_every": 1}
    with pytest.raises(DamagedDataError, match=rf"{array}.* does not have the checksum"):
        tuned_runs.train(f"flipped-{array}", 1, ce_through="mixture", **changes)
    assert not (tuned_runs / f"flipped-{array}" / "checkpoints").exists()


def test_no_compiler(tuned_runs, monkeypatch):
    def compile_nothing(function):
        raise RuntimeError("no g++\nmany lines")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    said = r"--compile: torch.compile does not work on rank 0 \(no g\+\+\): .* leave --compile out"
    tuned_runs.refuse(said, "wrong", 0, compile=True)


@pytest.mark.parametrize("without_validation", [False, True])
def test_no_base_to_cut(tuned_runs, base_dir, without_validation):
    changes = (
        {"model": base_dir, "validate_every": None} if without_validation else {"validate_every": "auto"}
    )
    said = "--base-sharding zero3 cuts the base .* and none does here .*: leave it out"
    tuned_runs.refuse(said, "wrong", 2, base_sharding="zero3", **changes)


def test_another_learning_rate_than_the_default_one(runs, monkeypatch):
    """The default depends on the size of the memory, and binds as a number."""

    class BegunError(Exception):
        pass

    def begin(*args, **settings):
        raise BegunError

    monkeypatch.setattr(train, "build_engine", begin)
    for rate in (None, 2e-3):
        with pytest.raises(BegunError):
            runs.train("rate", 2, learning_rate=rate)
        for file in ("identity.json", "run.json"):
            assert json.loads((runs / "rate" / file).read_text())["config"]["learning_rate"] == 2e-3
    with pytest.raises(UserError, match="--learning-rate was 0.002, now 0.001"):
        runs.train("rate", 2, learning_rate=1e-3)
