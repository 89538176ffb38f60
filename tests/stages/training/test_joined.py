"""The objective that joins the retriever with the base: a batch against a dense formula, and in processes."""

import numpy as np
import pytest
import torch

from mlpmem_ds.core.config import default_of
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.formats.batches import BatchReader
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.joined import Joined, read_base_end

from .conftest import write_targets

FLAGS = {
    "objective": "joined",
    "start": "base",
    "joined_lambda": 0.4,
    "epochs": 1.0,
    "batch_positions": 48,
    "num_blocks": 2,
    "save_every_steps": 6,
    "log_every_steps": 1,
    "shuffle_window_blocks": 4,
    "micro_batch_positions": 24,
    "learning_rate": 0.01,
    "validate_every": None,
}


@pytest.fixture(scope="module")
def last_dir(inputs_dir, base_dir, tmp_path_factory):
    """Keys of each point of the base's last layer, with targets over them."""
    root = tmp_path_factory.mktemp("joined-inputs")
    for point in ("layer_output", "final_norm", "ffn_input"):
        config = extract_keys.Config(
            model=str(base_dir),
            corpus=inputs_dir / "corpus",
            output=root / point / "keys",
            input_layer=(-1,),
            input_point=point,
            unit_positions=256,
        )
        extract_keys.run(config, World())
        write_targets(root / point / "targets", open_keys(root / point / "keys"))
    return root


@pytest.fixture(scope="module")
def runs(make_runs, inputs_dir, last_dir, base_dir):
    targets = last_dir / "layer_output" / "targets"
    return make_runs({**FLAGS, "corpus": inputs_dir / "corpus", "targets": targets, "model": base_dir})


@pytest.mark.parametrize("point", ["layer_output", "final_norm"])
@pytest.mark.parametrize("mixture_lambda", [None, 0.25])
def test_a_batch_is_the_dense_loss(last_dir, base_dir, point, mixture_lambda):
    keys = open_keys(last_dir / point / "keys")
    shape = MemoryConfig(
        input_size=keys.input_size,
        hidden_size=8,
        intermediate_size=16,
        num_blocks=1,
        vocab_size=keys.manifest.head_size,
        initializer_range=0.3,
    )
    alpha, lmbda = 0.3, 0.4
    objective = Joined(memory=shape, alpha=alpha, mixture_lambda=mixture_lambda, joined_lambda=lmbda)
    reader = BatchReader(
        keys,
        open_targets(last_dir / point / "targets"),
        TrainingOrder(
            num_positions=keys.num_positions, block_size=keys.manifest.block_size, window_blocks=2, seed=0
        ),
        batch_positions=40,
        rank=0,
        size=1,
        num_micro_batches=1,
        with_log_probabilities=True,
    )
    (batch,) = reader.read(0)
    torch.manual_seed(0)
    module = objective.make_module()
    names = set(module.state_dict())
    num_layers = keys.manifest.input_num_layers
    capture_point = keys.input_point
    assert capture_point == point
    module.base_end = read_base_end(str(base_dir), last_point(keys), num_layers=num_layers)
    assert set(module.state_dict()) == names  # nothing of the base is saved with the memory
    inputs_NI, targets = objective.arguments(batch, torch.device("cpu"), torch.float32)
    loss, sums = module(inputs_NI, targets)
    loss.backward()

    source = TransformersSource(str(base_dir), dtype="float32")
    final_ND = inputs_NI if point == "final_norm" else source.model.transformer.ln_f(inputs_NI)
    base_NV = source.model.lm_head(final_ND).double().softmax(-1).detach()
    stored_N = targets.base_log_probabilities_N
    found_N = base_NV.gather(1, targets.labels_N[:, None])[:, 0].log()
    assert (found_N - stored_N).abs().max() < 0.05  # the inputs are bfloat16
    hidden_NH = super(type(module), module).forward(inputs_NI).double().detach()
    log_p_NV = (hidden_NH @ module.head.weight.double().detach().T).log_softmax(-1)
    ce_N = -log_p_NV.gather(1, targets.labels_N[:, None])[:, 0]
    if mixture_lambda is not None:
        ce_N = -((1 - mixture_lambda) * stored_N.double().exp() + mixture_lambda * (-ce_N).exp()).log()
    expected = []
    for row, (start, stop) in enumerate(zip(targets.offsets_N1[:-1], targets.offsets_N1[1:], strict=True)):
        if start == stop:
            expected.append(ce_N[row])
            continue
        q_V = (1 - lmbda) * base_NV[row]
        weights = targets.probabilities[start:stop].double()
        q_V[targets.ids[start:stop]] += lmbda * weights / weights.sum()
        kl = (q_V * (q_V.log() - log_p_NV[row])).sum()
        expected.append(alpha * kl + (1 - alpha) * ce_N[row])
    assert loss.item() == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert all(parameter.grad is not None for parameter in module.parameters())


def last_point(keys):
    return CapturePoint(layer=keys.manifest.input_layer, point=keys.input_point)


def test_ranks_and_stops_change_nothing(runs, last_dir):
    runs.succeed(
        runs.start("one", 2),
        runs.start("two", 3, size=2),
        runs.start("stopped", 3, size=2, signal_at=2),
        runs.start("stopped", 3, size=2),
        runs.start("one-norm", 2, targets=last_dir / "final_norm" / "targets"),
        runs.start("imitation", 2, objective="imitation", joined_lambda=default_of(Config, "joined_lambda")),
    )
    expected = runs.losses("one")
    assert expected[-1] < expected[0] < runs.losses("imitation")[0]
    np.testing.assert_allclose(runs.losses("two"), expected, rtol=1e-5)
    runs.assert_same_weights("stopped", "two")
    np.testing.assert_allclose(runs.losses("one-norm")[0], expected[0], rtol=2e-3)
    trained = read_weights(runs / "two")
    assert trained.provenance.objective == "joined" and trained.provenance.joined_lambda == 0.4
    assert set(trained.weights) == set(read_weights(runs / "imitation").weights)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None, "start": "random"}, "--objective joined needs --model"),
        (
            {"targets": "ffn_input", "start": "random"},
            "--objective joined: the keys hold inputs of the point ffn_input",
        ),
    ],
)
def test_what_does_not_give_the_bases_distribution_is_refused(runs, last_dir, changes, said):
    values = dict(changes)
    if "targets" in values:
        values["targets"] = last_dir / values["targets"] / "targets"
    runs.refuse(said, "wrong", 2, **values)
