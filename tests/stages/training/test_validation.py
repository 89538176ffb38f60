"""The best weights: where they are, when they go, and how a checkpoint gives them back."""

import json

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.checkpoint import checkpoint_name
from mlpmem_ds.formats.weight_shards import WeightFiles, publish_index, shard_names
from mlpmem_ds.stages.training.validation import BestWeights, Validation


class FakeEngine:
    """Writes "weights" in so many files."""

    is_first = True

    def __init__(self, num_files):
        self._num_files = num_files

    def write_weights(self, root, stem):
        root.mkdir(parents=True, exist_ok=True)
        names = shard_names(stem, self._num_files)
        for name in names:
            (root / name).write_text(name)
        publish_index(root, stem, {name: [name] for name in names}, 1)
        return WeightFiles(root=root, stem=stem)


def train(output, perplexities, num_files):
    """A training that validates and saves at every step; its `BestWeights`."""
    best = BestWeights(output)
    for step, perplexity in enumerate(perplexities, start=1):
        validation = Validation(step=step, perplexity=perplexity)
        best.add(validation, FakeEngine(num_files), keep=True)
        best.held().link_to(output / "checkpoints" / checkpoint_name(step) / "best")
        best.remove_others()
    return best


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("num_files", [1, 3])
def test_an_older_checkpoint_gives_back_the_weights_that_its_history_names(tmp_path, num_files):
    history = train(tmp_path, [5, 4, 6, 3], num_files).to_json()
    saved = tmp_path / "checkpoints" / checkpoint_name(3)
    assert {name[:13] for name in contents(tmp_path / "best")} == {checkpoint_name(4)}

    again = BestWeights(tmp_path, history[:3])
    assert again.held() is None and again.restore(saved)
    assert again.files().stem == checkpoint_name(2) and not again.files().missing()
    assert json.loads((tmp_path / "best.json").read_text()) == {
        **history[1],
        "weights": f"best/{checkpoint_name(2)}.safetensors",
    }
    again.remove_others()
    assert contents(tmp_path / "best") == contents(saved / "best")

    (tmp_path / "best" / shard_names(checkpoint_name(2), num_files)[-1]).unlink()
    assert again.restore(saved) and contents(tmp_path / "best") == contents(saved / "best")
    assert not list(tmp_path.rglob("*.tmp"))


def test_weights_that_are_nowhere_are_forgotten(tmp_path):
    history = train(tmp_path / "whole", [5, 4, 6], 1).to_json()
    best = BestWeights(tmp_path / "lost", history)
    with pytest.raises(UserError, match="step-00000002.safetensors.* is gone: run the same command again"):
        best.files()
    assert not best.restore(tmp_path / "lost" / "checkpoints" / checkpoint_name(3))
    best.forget()
    assert best.best is None and best.held() is None and best.to_json() == []
    assert best.restore(tmp_path / "none")
