"""Trainings of each objective and of the controls, in real processes: one rank, two, and continued."""

import numpy as np
import pytest
import torch

from mlpmem_ds.core.manifest import CompleteStage, read_stage
from mlpmem_ds.formats.trained_models import MemoryManifest, read_weights

FLAGS = {
    "epochs": 1.0,
    "batch_positions": 48,
    "hidden_size": 16,
    "num_blocks": 2,
    "save_every_steps": 6,
    "keep_checkpoints": 9,
    "log_every_steps": 1,
    "shuffle_window_blocks": 4,
    "micro_batch_positions": 24,
    "learning_rate": 0.02,
}
OBJECTIVES = {"helpful": {"objective": "helpful"}, "permuted": {"control": "permuted-targets"}}


@pytest.fixture(scope="module")
def runs(make_runs, inputs_dir):
    return make_runs({**FLAGS, "corpus": inputs_dir / "corpus", "targets": inputs_dir / "targets"})


@pytest.fixture(scope="module")
def trained(runs):
    """Each objective on one rank, on two at ZeRO-3, stopped and continued; the controls."""
    steps = [runs.start("plain", 2), runs.start("random", 2, control="random-memory")]
    steps += [runs.start("random-two", 3, control="random-memory", size=2)]
    for name, flags in OBJECTIVES.items():
        steps += [
            runs.start(f"{name}-one", 2, **flags),
            runs.start(f"{name}-two", 3, size=2, **flags),
            runs.start(f"{name}-stopped", 2, signal_at=2, **flags),
            runs.start(f"{name}-stopped", 2, **flags),
        ]
    return "".join(runs.succeed(*steps))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_and_stops_change_nothing(runs, trained, name):
    expected = runs.losses(f"{name}-one")
    assert expected[-1] < expected[0] and not np.array_equal(expected, runs.losses("plain"))
    np.testing.assert_allclose(runs.losses(f"{name}-two"), expected, rtol=1e-5)
    runs.assert_same_weights(f"{name}-stopped", f"{name}-one")
    assert runs.manifest(f"{name}-one")["provenance"]["steps"] == len(expected)


def test_a_random_memory_is_what_a_training_starts_from(runs, trained):
    one, two = (read_weights(runs / name) for name in ("random", "random-two"))
    assert one.provenance.control == "random-memory" and one.provenance.steps == 0
    assert one.provenance.num_positions_read == 0
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, two.weights[name]), name
        is_fresh = name.endswith("bias") or "norm" in name
        assert tensor.std() == 0 if is_fresh else 0.005 < tensor.std() < 0.03, name
    stage = read_stage(CompleteStage, MemoryManifest, runs / "random", flag="--memory")
    assert stage.manifest.training.steps == 0
    assert not list((runs / "random" / "checkpoints").glob("step-*"))
    assert "complete: " in runs.succeed(runs.start("random", 2, control="random-memory"))[0]


def test_a_control_says_that_it_is_one(runs, trained):
    assert read_weights(runs / "permuted-one").provenance.control == "permuted-targets"
    assert read_weights(runs / "helpful-one").provenance.objective == "helpful"
